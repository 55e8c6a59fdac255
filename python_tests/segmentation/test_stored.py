"""Images of every kind are read as they are shown: TIFF by its tags, both bytes of 16 bits, upright."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from fdkernels.segmentation.data import tiff
from fdkernels.segmentation.data.prepare.drawn_masks import read_drawn_mask
from fdkernels.segmentation.data.reading import SAID_BITS, read_image, read_mask
from fdkernels.segmentation.data.stored import read_picture
from made_images import lzw, packed, png
from made_images import tiff as tiff_of

HEIGHT, WIDTH = 19, 23
NOISE = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, 4)).astype(np.uint16)
SIZE_TAGS = {256: [WIDTH], 257: [HEIGHT], 278: [HEIGHT]}


def _eighth(values):
    return np.rint(values / 65535 * 255).astype(np.uint8)


def _shown(path, **options):
    return np.array(read_image(path, **options))


def _tiff(path, values, **options):
    """Write [H, W, C] or [H, W] with tifffile; "separate" planes from the same values."""
    if options.get("planarconfig") == "separate":
        values = np.ascontiguousarray(np.moveaxis(values, -1, 0))
    tifffile.imwrite(path, values, metadata=None, **options)
    return path


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tile": (16, 16)},
        {"compression": "deflate"},
        {"compression": "deflate", "predictor": True},
        {"compression": "deflate", "tile": (16, 16)},
        {"bigtiff": True},
        {"rowsperstrip": 5},
    ],
    ids=["plain", "tiles", "deflate", "predictor", "deflated tiles", "BigTIFF", "strips"],
)
def test_16_bit_colours_of_a_tiff(tmp_path, channels, planes, order, options):
    if channels == 4:
        options = {**options, "extrasamples": ["unassalpha"]}
    values = NOISE[..., :channels]
    path = _tiff(
        tmp_path / "file.tif", values, photometric="rgb", planarconfig=planes, byteorder=order, **options
    )
    assert np.array_equal(_shown(path), _eighth(values[..., :3]))


@pytest.mark.parametrize("samples", [1, 3, 4])
@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_in_a_compression_that_only_pillow_has(tmp_path, monkeypatch, samples, order):
    monkeypatch.setattr(tiff.TiffTags, "decodable", False)
    values = NOISE[..., :samples]
    tags = {**SIZE_TAGS, 258: [16] * samples, 259: [5], 262: [2 if samples > 1 else 1], 277: [samples]}
    if samples == 4:
        tags[338] = [2]
    strip = lzw(values.astype(f"{order}u2").tobytes())
    (tmp_path / "file.tif").write_bytes(tiff_of(tags, [strip], order))
    wanted = _eighth(values[..., :3] if samples > 1 else np.repeat(values, 3, axis=2))
    assert np.array_equal(_shown(tmp_path / "file.tif"), wanted)


@pytest.mark.parametrize(
    ("photometric", "samples", "planar"), [(0, 1, 1), (2, 3, 2), (1, 2, 1)], ids=["white", "planes", "alpha"]
)
def test_what_needs_imagecodecs_is_refused_with_its_name(tmp_path, monkeypatch, photometric, samples, planar):
    monkeypatch.setattr(tiff.TiffTags, "decodable", False)
    values = NOISE[..., :samples].astype("<u2")
    strips = [lzw(values.tobytes())]
    if planar == 2:
        strips = [lzw(np.ascontiguousarray(values[..., plane]).tobytes()) for plane in range(samples)]
    tags = {**SIZE_TAGS, 258: [16] * samples, 259: [5], 262: [photometric], 277: [samples], 284: [planar]}
    if samples == 2:
        tags[338] = [2]
    (tmp_path / "file.tif").write_bytes(tiff_of(tags, strips))
    with pytest.raises(ValueError, match=r"file.tif has . samples of 16 bits .* pip install imagecodecs"):
        read_image(tmp_path / "file.tif")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [1, 8, 32773], ids=["plain", "deflate", "PackBits"])
def test_white_is_zero_is_inverted(tmp_path, dtype, order, compression):
    values = NOISE[..., 0].astype(dtype)
    rows = [row.astype(np.dtype(dtype).newbyteorder(order)).tobytes() for row in values]
    strip = {
        1: b"".join(rows),
        8: zlib.compress(b"".join(rows)),
        32773: b"".join(bytes([len(row) - 1]) + row for row in rows),  # as they are: number less one, bytes
    }[compression]
    tags = {**SIZE_TAGS, 258: [np.dtype(dtype).itemsize * 8], 259: [compression], 262: [0], 277: [1]}
    path = tmp_path / "file.tif"
    path.write_bytes(tiff_of(tags, [strip], order))
    wanted = 255 - (_eighth(values) if dtype == np.uint16 else values)
    assert np.array_equal(_shown(path), np.repeat(wanted[..., None], 3, axis=2))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("photometric", [0, 1, 3])
@pytest.mark.parametrize("fill", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiffs_of_few_bits(tmp_path, bits, photometric, fill, order):
    values = NOISE[..., 0] % 2**bits
    rows = [packed("".join(f"{value:0{bits}b}" for value in row)) for row in values]
    if fill == 2:
        rows = [bytes(int(f"{byte:08b}"[::-1], 2) for byte in row) for row in rows]
    tags = {**SIZE_TAGS, 258: [bits], 259: [1], 262: [photometric], 266: [fill], 277: [1]}
    colours = np.random.default_rng(1).integers(0, 256, (3, 2**bits))
    colours[:, 0] = 255  # so that the map has more than 8-bit values
    if photometric == 3:
        tags[320] = [int(level) * 257 for level in colours.ravel()]
    (tmp_path / "file.tif").write_bytes(tiff_of(tags, [b"".join(rows)], order))
    top = 2**bits - 1
    grey = values * (255 // top)
    wanted = {0: 255 - grey, 1: grey, 3: None}[photometric]
    wanted = colours.T[values] if wanted is None else np.repeat(wanted[..., None], 3, axis=2)
    try:
        shown = _shown(tmp_path / "file.tif")
    except ValueError:
        assert fill == 2  # Pillow does not know every reversed order
        assert photometric != 1
        return
    assert np.array_equal(shown, wanted)
    assert np.array_equal(read_picture(tmp_path / "file.tif").values, values)


def test_a_colour_map_of_8_bit_values_is_not_black(tmp_path):
    values = NOISE[..., 0] % 4
    colours = np.array([[0, 0, 0], [10, 20, 30], [255, 0, 9], [7, 255, 1]])
    tags = {**SIZE_TAGS, 258: [8], 259: [1], 262: [3], 277: [1]}
    tags[320] = np.concatenate([colours, np.zeros((252, 3), int)]).T.ravel().tolist()
    (tmp_path / "file.tif").write_bytes(tiff_of(tags, [values.astype(np.uint8).tobytes()]))
    assert np.array_equal(_shown(tmp_path / "file.tif"), colours[values])


@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_grey_with_alpha_of_a_tiff(tmp_path, planes):
    for dtype in (np.uint8, np.uint16):
        values = NOISE[..., :2].astype(dtype)
        path = _tiff(
            tmp_path / "file.tif", values, planarconfig=planes, photometric="minisblack", extrasamples=[2]
        )
        grey = _eighth(values[..., 0]) if dtype == np.uint16 else values[..., 0]
        assert np.array_equal(_shown(path), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", [0, 2, 4, 6])
def test_16_bit_pngs_keep_both_bytes(tmp_path, kind):
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    (tmp_path / "file.png").write_bytes(png(NOISE[..., :channels], kind))
    picture = read_picture(tmp_path / "file.png")
    colours = NOISE[..., :3] if kind in {2, 6} else NOISE[..., 0]
    assert np.array_equal(picture.values, colours)
    if kind in {4, 6}:
        assert np.array_equal(picture.alpha, NOISE[..., channels - 1])
    wanted = _eighth(colours if colours.ndim == 3 else np.repeat(colours[..., None], 3, axis=2))
    assert np.array_equal(_shown(tmp_path / "file.png"), wanted)


@pytest.mark.parametrize("kind", [0, 2, 4, 6])
def test_a_label_in_the_low_byte_of_a_16_bit_png_is_foreground(tmp_path, kind):
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    values = np.zeros((HEIGHT, WIDTH, channels), np.uint16)
    values[3:9, 4:15] = 1
    if kind in {4, 6}:
        values[..., -1] = 65535
    (tmp_path / "file.png").write_bytes(png(values, kind))
    assert np.array_equal(read_mask(tmp_path / "file.png"), values[..., 0] == 1)


RAMP = np.tile(np.linspace(0, 4095, 256).astype(np.uint16), (4, 1))


def _grey(values, top):
    return np.repeat(np.rint(values / top * 255).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("bits", [9, 10, 12, 14])
@pytest.mark.parametrize("kind", [0, 2, 4, 6])
def test_a_png_says_in_sbit_how_many_bits_it_uses(tmp_path, bits, kind):
    values = np.tile(np.linspace(0, 2**bits - 1, 256).astype(np.uint16), (4, 1))
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    (tmp_path / "file.png").write_bytes(png(np.repeat(values[..., None], channels, 2), kind, 16, bits))
    assert np.array_equal(_shown(tmp_path / "file.png"), _grey(values, 2**bits - 1))
    assert read_image(tmp_path / "file.png").info[SAID_BITS] == bits


def test_a_png_that_is_scaled_up_as_its_standard_says_is_read_as_16_bits(tmp_path):
    (tmp_path / "file.png").write_bytes(png((RAMP << 4)[..., None], 0, 16, 12))
    assert np.array_equal(_shown(tmp_path / "file.png"), _grey(RAMP << 4, 65535))
    (tmp_path / "file.png").write_bytes(
        png((RAMP[:, :9] << 4)[..., None], 0, 16, 12)
    )  # dark: it may be either
    with pytest.raises(ValueError, match="does not say how many are used"):
        read_image(tmp_path / "file.png")


def test_a_tiff_says_in_max_sample_value_how_many_bits_it_uses(tmp_path):
    for order in "<>":
        for extra, photometric in (
            (((281, "H", 1, 4095),), "minisblack"),
            (((281, "H", 1, 4095),), "miniswhite"),
        ):
            tifffile.imwrite(
                tmp_path / "file.tif",
                RAMP,
                photometric=photometric,
                byteorder=order,
                extratags=[(*extra[0], True)],
            )
            wanted = _grey(RAMP, 4095)
            assert np.array_equal(
                _shown(tmp_path / "file.tif"), wanted if photometric == "minisblack" else 255 - wanted
            )


@pytest.mark.parametrize("highest", [3071, 65535])
def test_a_max_sample_value_that_names_no_depth_says_nothing(tmp_path, highest):
    tifffile.imwrite(tmp_path / "file.tif", RAMP, extratags=[(281, "H", 1, highest, True)])
    with pytest.raises(ValueError, match="does not say how many are used"):
        read_image(tmp_path / "file.tif")


@pytest.mark.parametrize("highest", [255, 1023, 4095, 16383, 32767])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_that_are_not_used_are_named_as_a_problem(tmp_path, highest, suffix):
    values = np.tile(np.linspace(0, highest, 256).astype(np.uint16), (4, 1))
    path = tmp_path / f"file.{suffix}"
    Image.fromarray(values).save(path)
    bits = highest.bit_length()
    with pytest.raises(
        ValueError, match=rf"file.{suffix} has 16 bits, but no value above {highest}, which {bits} bits hold"
    ):
        read_image(path)
    assert np.array_equal(_shown(path, bits=16), _grey(values, 65535))
    if bits > 8:
        assert np.array_equal(_shown(path, bits=bits), _grey(values, highest))
        with pytest.raises(ValueError, match=f"values below {2 ** (bits - 1)} for {bits - 1} bits, got"):
            read_image(path, bits=bits - 1)


def test_16_bits_that_are_all_0_or_reach_the_highest_bit_are_taken(tmp_path):
    for highest in (0, 32768, 65535):
        values = np.array([[0, highest]], np.uint16)
        Image.fromarray(values).save(tmp_path / "file.png")
        assert np.array_equal(_shown(tmp_path / "file.png"), _grey(values, 65535))


def test_12_packed_bits_are_scaled_by_4095(tmp_path):
    rows = b"".join(packed("".join(f"{value:012b}" for value in row)) for row in RAMP)
    tags = {256: [256], 257: [4], 278: [4], 258: [12], 259: [1], 262: [1], 277: [1]}
    (tmp_path / "file.tif").write_bytes(tiff_of(tags, [rows]))
    assert np.array_equal(_shown(tmp_path / "file.tif"), _grey(RAMP, 4095))


# How to turn the upright picture to what a file of this orientation stores.
STORED = {
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],
    3: lambda shown: shown[::-1, ::-1],
    4: lambda shown: shown[::-1],
    5: lambda shown: shown.swapaxes(0, 1),
    6: lambda shown: shown.swapaxes(0, 1)[::-1],
    7: lambda shown: shown.swapaxes(0, 1)[::-1, ::-1],
    8: lambda shown: shown.swapaxes(0, 1)[:, ::-1],
}
FLAG = np.zeros((HEIGHT, WIDTH), bool)
FLAG[2:9, 3:18] = True
FLAG[5:9, 3:12] = False


def _tagged(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def _write_turned(path, shown, orientation, road):
    stored = np.ascontiguousarray(STORED[orientation](shown))
    if road == "tifffile":  # 16 bits and signed ones, which Pillow does not read
        dtype = np.uint16 if stored.ndim == 3 else np.int16
        wide = stored.astype(dtype) * (257 if stored.ndim == 3 else 1)
        tifffile.imwrite(path, wide, extratags=[(274, "H", 1, orientation, True)])
    elif road == "png16":
        path.write_bytes(png(stored.astype(np.uint16) * 257, 2))
        with_exif = io.BytesIO()
        Image.new("L", (1, 1)).save(with_exif, "PNG", exif=_tagged(orientation))
        data, other = path.read_bytes(), with_exif.getvalue()
        place = other.index(b"eXIf") - 4
        chunk = other[place : place + 12 + int.from_bytes(other[place : place + 4], "big")]
        path.write_bytes(data[:33] + chunk + data[33:])
    elif path.suffix == ".tif":
        Image.fromarray(stored).save(path, tiffinfo={274: orientation}, compression=road)
    elif path.suffix == ".jpg":
        Image.fromarray(stored).save(path, exif=_tagged(orientation), quality=100, subsampling=0)
    else:
        Image.fromarray(stored).save(path, exif=_tagged(orientation), lossless=True)
    return path


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("suffix", "road"),
    [
        ("jpg", ""),
        ("webp", ""),
        ("png", ""),
        ("png", "png16"),
        ("tif", None),
        ("tif", "tiff_lzw"),
        ("tif", "tifffile"),
    ],
)
def test_images_and_masks_are_turned_as_their_tag_says(tmp_path, orientation, suffix, road):
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    shown = np.dstack([columns * 11, rows * 13, 0 * rows]).astype(np.uint8)
    path = _write_turned(tmp_path / f"file.{suffix}", shown, orientation, road)
    error = np.abs(_shown(path).astype(int) - shown)
    assert error.max() <= (8 if suffix == "jpg" else 0)
    if road != "png16":
        grey = FLAG.astype(np.uint8) * (1 if road == "tifffile" else 255)
        path = _write_turned(tmp_path / f"mask.{suffix}", grey, orientation, road)
        assert np.array_equal(read_mask(path), FLAG)
        assert suffix in {"jpg", "webp"} or np.array_equal(read_drawn_mask(path, "light"), FLAG)


def test_an_unknown_orientation_is_left_as_it_is(tmp_path):
    for road, number in (("tifffile", 9), (None, 0)):
        stored = FLAG.astype(np.int16 if road else np.uint8)
        tifffile.imwrite(tmp_path / "file.tif", stored, extratags=[(274, "H", 1, number, True)])
        assert np.array_equal(read_mask(tmp_path / "file.tif"), FLAG)


REFUSED = {
    "float": (lambda p: _tiff(p, np.ones((4, 5), np.float32)), "got mode F"),
    "half float": (lambda p: _tiff(p, np.ones((4, 5), np.float16)), "got mode F"),
    "float planes": (
        lambda p: _tiff(p, np.ones((4, 5, 3), np.float32), photometric="rgb", planarconfig="separate"),
        "got mode F",
    ),
    "32 bits": (lambda p: _tiff(p, np.ones((4, 5), np.uint32)), "got mode I"),
    "signed": (lambda p: _tiff(p, np.ones((4, 5), np.int16)), "got mode I"),
    "two channels": (
        lambda p: _tiff(p, NOISE[..., :2].copy(), photometric="minisblack", planarconfig="contig"),
        "at most an alpha channel, got 2 samples a pixel",
    ),
    "five channels": (
        lambda p: _tiff(p, np.ones((4, 5, 5), np.uint8), photometric="rgb", planarconfig="contig"),
        "at most an alpha channel, got 5 samples a pixel",
    ),
    "colours without a name": (
        lambda p: _tiff(p, np.ones((4, 5, 3), np.uint8), photometric="minisblack", planarconfig="contig"),
        "at most an alpha channel, got 3 samples a pixel",
    ),
    "premultiplied": (
        lambda p: _tiff(p, NOISE, photometric="rgb", extrasamples=["assocalpha"]),
        "multiplied by a partial alpha",
    ),
    "pages": (
        lambda p: _tiff(p, np.ones((3, 4, 5), np.uint16), photometric="minisblack"),
        "must contain one image, got 3",
    ),
    "a stack of ImageJ": (
        lambda p: tifffile.imwrite(p, np.ones((3, 4, 5), np.uint16), imagej=True),
        "must contain one image, got 3",
    ),
    "cut": (lambda p: p.write_bytes(_tiff(p, NOISE[..., 0]).read_bytes()[:-300]), "cannot be read"),
    "tags alone": (lambda p: p.write_bytes(b"II\x2a\0\x08\0\0\0"), "cannot be read"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_meaning_as_an_image_is_refused_by_name(tmp_path, kind):
    write, message = REFUSED[kind]
    write(tmp_path / "file.tif")
    with pytest.raises(ValueError, match=message) as raised:
        read_image(tmp_path / "file.tif")
    assert str(tmp_path / "file.tif") in str(raised.value)


def test_the_pixel_limit_holds_for_what_pillow_does_not_read(tmp_path, monkeypatch):
    path = _tiff(tmp_path / "file.tif", NOISE[..., :3], photometric="rgb", planarconfig="separate")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(ValueError, match=r"437 pixels\) exceeds limit of 436 .* FDKERNELS_MAX_IMAGE_PIXELS"):
        read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH)
    assert np.array_equal(_shown(path), _eighth(NOISE[..., :3]))


def test_a_strip_that_inflates_beyond_its_size_is_refused_before_it_is_inflated(tmp_path):
    tags = {**SIZE_TAGS, 258: [16], 259: [8], 262: [1], 277: [1]}
    bomb = zlib.compress(bytes(2**24))
    (tmp_path / "file.tif").write_bytes(tiff_of(tags, [bomb]))
    with pytest.raises(ValueError, match=r"file.tif cannot be read: .* a decompression bomb"):
        read_image(tmp_path / "file.tif")
