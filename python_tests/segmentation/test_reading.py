from __future__ import annotations

import io

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fdkernels.segmentation.data import SegmentationSample, reading
from fdkernels.segmentation.data.reading import load_pair, read_image, read_mask
from tiny_data import imagescope

LEFT = np.array([[True, False, False], [True, False, False]])  # the foreground of most masks here


def _save(path, values, mode=None, **options):
    image = Image.fromarray(np.asarray(values))
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def _scaled(mask, low, high, dtype=np.uint8):
    return np.where(mask, high, low).astype(dtype)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "file.png"


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "1"])
def test_every_kind_of_8_bit_image_gives_the_same_rgb(tmp_path, mode):
    pixels = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    file = _save(tmp_path / ("file.tif" if mode == "CMYK" else "file.png"), pixels, mode)
    with Image.open(file) as image:
        assert image.mode == mode
    assert np.array_equal(np.array(read_image(file)), pixels)


def test_transparent_pixels_keep_their_colour(file):
    pixels = np.array([[[10, 20, 30, 0], [40, 50, 60, 255]]], np.uint8)
    _save(file, pixels)
    assert np.array_equal(np.array(read_image(file)), pixels[..., :3])


def test_a_palette_with_transparency_is_resolved(file):
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([1, 2, 3, 4, 5, 6])
    assert image.mode == "P"
    image.save(file, transparency=b"\x00\x80")
    assert np.array(read_image(file)).tolist() == [[[1, 2, 3], [4, 5, 6]]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_by_its_type_and_not_by_its_content(tmp_path, suffix):
    values = np.array([[0, 128, 129, 257, 4095, 32896, 65535]], np.uint16)
    image = read_image(_save(tmp_path / f"file.{suffix}", values))
    assert image.mode == "RGB"
    expected = np.rint(values / 65535 * 255).astype(int)
    assert expected.tolist() == [[0, 0, 1, 1, 16, 128, 255]]
    assert np.array_equal(np.array(image), np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_images_are_rejected(tmp_path, dtype):
    file = _save(tmp_path / "file.tif", np.zeros((2, 3), dtype))
    with pytest.raises(ValueError, match=r"file.tif must have 8 or 16 bits a channel, got mode [IF]"):
        read_image(file)


@pytest.mark.parametrize(("low", "high"), [(0, 255), (0, 1), (0, 38), (0, 200)])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_non_zero_is_foreground_in_a_mask_of_two_values(file, low, high, mode):
    _save(file, _scaled(LEFT, low, high), mode)
    assert np.array_equal(read_mask(file), LEFT)


def test_1_bit_and_palette_masks_are_read(tmp_path):
    bits = _save(tmp_path / "bits.png", LEFT)
    with Image.open(bits) as image:
        assert image.mode == "1"
    assert np.array_equal(read_mask(bits), LEFT)
    image = Image.fromarray(LEFT.astype(np.uint8))
    image.putpalette([0, 0, 0, 128, 0, 0])
    image.save(tmp_path / "palette.png")
    assert np.array_equal(read_mask(tmp_path / "palette.png"), LEFT)


@pytest.mark.parametrize(("high", "dtype"), [(65535, np.uint16), (1, np.uint16), (7, np.int32)])
def test_wide_masks_of_two_values_are_read(tmp_path, high, dtype):
    file = _save(tmp_path / "file.tif", _scaled(LEFT, 0, high, dtype))
    assert np.array_equal(read_mask(file), LEFT)


def _disc(radius=15):
    rows, columns = np.mgrid[:96, :96]
    return (columns - 50.3) ** 2 + (rows - 44.7) ** 2 < radius**2


@pytest.mark.parametrize("quality", [60, 75, 95])
def test_a_jpeg_compressed_mask_is_thresholded_at_half_of_white(tmp_path, quality):
    file = _save(tmp_path / "file.jpg", _disc().astype(np.uint8) * 255, quality=quality)
    with Image.open(file) as image:
        assert np.unique(np.array(image)).size > 10
    assert np.array_equal(read_mask(file), _disc())


def test_antialiased_edges_are_thresholded_at_half_of_white(file):
    fine = np.kron(_disc(), np.ones((4, 4), bool))
    smooth = Image.fromarray(fine.astype(np.uint8) * 255).resize((90, 90), Image.Resampling.BOX)
    smooth.save(file)
    assert np.array_equal(read_mask(file), np.array(smooth) > 127.5)


@pytest.mark.parametrize(
    "values",
    [
        np.arange(256).reshape(16, 16),
        np.array([[0, 1, 2]]),
        np.array([[0, 128, 255]]),
        np.array([[100, 120]]),
        np.array([[3, 5]]),
    ],
    ids=["a ramp", "labels", "grey between", "two greys", "nothing white"],
)
def test_an_ambiguous_mask_is_rejected(file, values):
    _save(file, values.astype(np.uint8))
    with pytest.raises(ValueError, match=r"file.png must have 0 for background and one other value"):
        read_mask(file)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 0.5]], np.float32), "must contain integers, got mode F"),
        (np.array([[0, -1]], np.int32), "must not contain values below 0, got -1"),
    ],
)
def test_float_and_negative_masks_are_rejected(tmp_path, values, message):
    with pytest.raises(ValueError, match=f"file.tif {message}"):
        read_mask(_save(tmp_path / "file.tif", values))


def test_a_file_of_several_images_is_rejected(tmp_path):
    pages = [Image.new("L", (3, 2), shade) for shade in (0, 255)]
    pages[0].save(tmp_path / "file.tif", save_all=True, append_images=pages[1:])
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match=r"file.tif must contain one image, got 2"):
            read(tmp_path / "file.tif")


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_images_above_the_pixel_limit_raise_an_error_that_names_the_limit(tmp_path, monkeypatch, suffix):
    file = tmp_path / f"file.{suffix}"
    Image.new("RGB", (30, 20)).save(file)
    for limit in (599, 299):  # Pillow warns above the limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"decompression bomb.*FDKERNELS_MAX_IMAGE_PIXELS"):
            read_image(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    assert read_image(file).size == (30, 20)


def test_the_environment_raises_the_limit_and_lowers_it(tmp_path, monkeypatch):
    file = tmp_path / "file.png"
    Image.new("L", (30, 20)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    monkeypatch.setenv(reading.LIMIT_VARIABLE, "600")
    reading.apply_pixel_limit.cache_clear()
    try:
        assert read_image(file).size == (30, 20)
        monkeypatch.setenv(reading.LIMIT_VARIABLE, "many")
        reading.apply_pixel_limit.cache_clear()
        with pytest.raises(ValueError, match="must be a number of pixels, 1 or more, got 'many'"):
            read_image(file)
    finally:
        monkeypatch.undo()
        reading.apply_pixel_limit.cache_clear()


def test_a_png_with_a_text_bomb_is_rejected(file):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", "x" * 2**21, zip=True)
    Image.new("L", (3, 2)).save(file, pnginfo=info)
    assert file.stat().st_size < 5000
    with pytest.raises(ValueError, match=r"file.png cannot be read"):
        read_image(file)


def _complaint(read, file):
    """Return None if the file is read without error, else whether the error names it."""
    try:
        read(file)
    except ValueError as error:
        return str(file) in str(error)
    return None


def _wide(kind):
    """Write an image that tifffile reads."""
    options = {
        "deflate": {"compression": "deflate", "predictor": True},
        "tiles": {"tile": (16, 16)},
        "planes": {},
    }
    whole = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 65535, (3, 12, 14)).astype(np.uint16)
    tifffile.imwrite(
        whole, pixels, photometric="rgb", planarconfig="separate", metadata=None, **options[kind]
    )
    return whole.getvalue()


@pytest.mark.parametrize("kind", ["deflate", "tiles", "planes"])
def test_a_corrupt_file_that_tifffile_reads_raises_an_error_that_names_it(tmp_path_factory, kind):
    file, data = tmp_path_factory.mktemp("damaged") / "file.tif", _wide(kind)

    @settings(max_examples=150, suppress_health_check=[HealthCheck.differing_executors])
    @given(st.integers(0, min(len(data), 300) - 1), st.binary(min_size=1, max_size=6), st.booleans())
    def check(place, noise, cut):
        file.write_bytes(data[:place] + noise + (b"" if cut else data[place + len(noise) :]))
        for read in (read_image, read_mask):
            assert _complaint(read, file) in {None, True}

    check()


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "bmp"])
def test_a_corrupt_file_is_read_or_raises_an_error_that_names_it(tmp_path_factory, suffix):
    folder = tmp_path_factory.mktemp("damaged")
    whole = io.BytesIO()
    kind = {"png": "PNG", "tif": "TIFF", "jpg": "JPEG", "bmp": "BMP"}[suffix]
    options = {"compression": "tiff_lzw"} if suffix == "tif" else {}
    pixels = np.random.default_rng(0).integers(0, 255, (12, 14, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(whole, kind, **options)
    data = whole.getvalue()

    @settings(max_examples=150, suppress_health_check=[HealthCheck.differing_executors])
    @given(st.integers(0, len(data) - 1), st.binary(min_size=1, max_size=6), st.booleans())
    def check(place, noise, cut):
        file = folder / f"file.{suffix}"
        file.write_bytes(data[:place] + noise + (b"" if cut else data[place + len(noise) :]))
        for read in (read_image, read_mask):
            assert _complaint(read, file) in {None, True}

    check()


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "gone.png"):
        with pytest.raises(ValueError, match="cannot be read") as raised:
            read_image(path)
        assert str(path) in str(raised.value)


def test_several_masks_are_united_whatever_their_kinds(tmp_path):
    image = _save(tmp_path / "image.png", np.zeros((2, 3, 3), np.uint8))
    one = _save(tmp_path / "one.png", LEFT)
    other = _save(tmp_path / "other.png", _scaled(LEFT[:, ::-1], 0, 255), "RGBA")
    _, mask = load_pair(SegmentationSample(image, (one, other), "p"))
    assert mask.mode == "L"
    assert np.array(mask).tolist() == [[255, 0, 255]] * 2


def test_polygons_and_an_image_are_united(tmp_path):
    image = _save(tmp_path / "image.png", np.zeros((4, 5, 3), np.uint8))
    corner = np.zeros((4, 5), bool)
    corner[3, 4] = True
    outlines = tmp_path / "outlines.xml"
    outlines.write_text(imagescope([np.array([[1, 1], [2, 1], [2, 2], [1, 2]])]), "utf-8")
    _, mask = load_pair(SegmentationSample(image, (_save(tmp_path / "mask.png", corner), outlines), "p"))
    assert np.argwhere(np.array(mask)).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [3, 4]]


def test_polygons_need_the_size_of_their_image(tmp_path):
    with pytest.raises(ValueError, match=r"size must be given for the polygons in .*a.xml, got None"):
        read_mask(tmp_path / "a.xml")


def test_a_file_that_claims_more_memory_than_there_is_is_named(tmp_path, monkeypatch):
    file = tmp_path / "file.png"
    Image.new("L", (4, 4)).save(file)

    def no_memory(*arguments, **more):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", no_memory)
    with pytest.raises(ValueError, match=r"file\.png cannot be read: MemoryError"):
        read_image(file)
