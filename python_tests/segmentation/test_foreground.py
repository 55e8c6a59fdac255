"""Which pixels of a mask are foreground: in every mode and depth, or refused."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw

from fdkernels.segmentation.data.foreground import parse_mask_values
from fdkernels.segmentation.data.reading import read_mask

TRUTH = np.zeros((40, 50), bool)
TRUTH[8:28, 12:40] = True
RIM = TRUTH.copy()  # two pixels wide
RIM[10:26, 14:38] = False
LABEL = TRUTH.astype(np.uint8)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "file.png"


def _save(path, values, **options):
    Image.fromarray(np.asarray(values)).save(path, **options)
    return path


def _palette(path, indices, colours, **options):
    image = Image.fromarray(np.asarray(indices, np.uint8))
    image.putpalette([level for colour in colours for level in colour])
    image.save(path, **options)
    return path


def _colours(*colour, dtype=np.uint8):
    pixels = np.zeros((*TRUTH.shape, len(colour)), dtype)
    pixels[TRUTH] = colour
    return pixels


@pytest.mark.parametrize("channel", [0, 1, 2])
@pytest.mark.parametrize("value", [1, 2, 4, 128, 255])
def test_a_label_in_one_channel_is_foreground(file, channel, value):
    colour = [0, 0, 0]
    colour[channel] = value
    assert np.array_equal(read_mask(_save(file, _colours(*colour))), TRUTH)
    assert np.array_equal(read_mask(_save(file, _colours(*colour, 255))), TRUTH)  # where not 0, transparent


@pytest.mark.parametrize("colour", [(0, 0, 1), (1, 0, 0), (128, 0, 0), (1, 1, 1)])
def test_the_dark_colour_of_a_palette_is_foreground(tmp_path, colour):
    for suffix in ("png", "tif", "bmp"):
        path = _palette(tmp_path / f"file.{suffix}", LABEL, [(0, 0, 0), colour])
        assert np.array_equal(read_mask(path), TRUTH)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_label_of_any_integer_type_is_foreground(tmp_path, dtype, order, compression):
    path = tmp_path / "file.tif"
    tifffile.imwrite(path, LABEL.astype(dtype), byteorder=order, compression=compression)
    assert np.array_equal(read_mask(path), TRUTH)


@pytest.mark.parametrize("kind", ["contig", "separate"])
def test_16_bit_colours_of_a_tiff_are_foreground_where_not_0(tmp_path, kind):
    pixels = _colours(0, 0, 1, dtype=np.uint16)
    values = pixels if kind == "contig" else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    tifffile.imwrite(tmp_path / "file.tif", values, photometric="rgb", planarconfig=kind)
    assert np.array_equal(read_mask(tmp_path / "file.tif"), TRUTH)


def test_a_bilevel_tiff_is_foreground_where_it_is_shown_white(tmp_path):
    for photometric, stored in (("minisblack", TRUTH), ("miniswhite", ~TRUTH)):
        tifffile.imwrite(tmp_path / "file.tif", stored, photometric=photometric)
        assert np.array_equal(read_mask(tmp_path / "file.tif"), TRUTH)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_stored_as_0_may_mean_either_and_is_refused(tmp_path, dtype):
    path = tmp_path / "file.tif"
    tifffile.imwrite(path, LABEL.astype(dtype) * np.iinfo(dtype).max, photometric="miniswhite")
    with pytest.raises(ValueError, match=r"file.tif stores white as 0 .* with --mask-values"):
        read_mask(path)
    assert np.array_equal(read_mask(path, values=str(np.iinfo(dtype).max)), TRUTH)
    assert np.array_equal(read_mask(path, values="0"), ~TRUTH)


AMBIGUOUS = {
    "rim of 255": np.where(RIM, 255, LABEL),
    "rim of 254": np.where(RIM, 254, LABEL),
    "margin of 255": np.where(np.arange(50) < 5, 255, LABEL),
    "60 with a rim": np.where(RIM, 255, LABEL * 60),
    "200 with a rim": np.where(RIM, 255, LABEL * 200),
    "three labels": np.where(RIM, 255, LABEL + (np.arange(50) > 20) + (np.arange(50) > 30)),
    "all label, margin": np.where(np.arange(50) < 5, 255, 1 + 0 * LABEL),
    "label in most": np.where(np.arange(50) < 2, 0, np.where(RIM, 255, 1)),
    "two labels": LABEL + RIM,
    "no background": LABEL * 4 + 3,
    "foreground alone light": LABEL * 154 + 100,
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_labels_of_several_values_are_refused_with_their_values_and_the_option(file, kind):
    values = AMBIGUOUS[kind].astype(np.uint8)
    listed = np.unique(values)
    said = f"{', '.join(map(str, listed[:-1]))} and {listed[-1]}"
    for picture in (values, np.repeat(values[..., None], 3, axis=2)):
        with pytest.raises(ValueError, match=f"{said}; say which values are foreground with --mask-values"):
            read_mask(_save(file, picture))


def test_one_stray_pixel_of_255_is_refused(file):
    stray = LABEL.copy()
    stray[0, 0] = 255
    with pytest.raises(ValueError, match="0, 1 and 255; say which"):
        read_mask(_save(file, stray))


def test_a_small_label_beside_a_large_margin_is_refused(file):
    values = np.zeros((300, 300), np.uint8)
    values[:, :150] = 255
    values[200:204, 200:204] = 1
    with pytest.raises(ValueError, match="0, 1 and 255; say which"):
        read_mask(_save(file, values))


def test_thin_labels_beside_a_margin_are_refused(file):
    image = Image.new("L", (80, 60))
    draw = ImageDraw.Draw(image)
    draw.line([(5, 50), (40, 10), (75, 40)], fill=1)
    draw.rectangle((0, 0, 79, 4), fill=255)
    image.save(file)
    with pytest.raises(ValueError, match="0, 1 and 255; say which"):
        read_mask(file)


def test_many_labels_with_rims_are_refused(file):
    values = np.zeros((120, 120), np.uint8)
    for number in range(36):
        top, left = divmod(number, 6)
        values[top * 20 + 2 : top * 20 + 14, left * 20 + 2 : left * 20 + 14] = 255
        values[top * 20 + 4 : top * 20 + 12, left * 20 + 4 : left * 20 + 12] = number + 1
    with pytest.raises(ValueError, match=r"got 38 grey values: 0, 1, 2, 3, 4, 5, 6 \.\.\. 255; say which"):
        read_mask(_save(file, values))
    assert read_mask(file, values="1-36").sum() == 36 * 8 * 8


def test_a_label_larger_than_its_background_is_refused_beside_smooth_white(file):
    fine = Image.fromarray(np.kron(_disc(), np.ones((4, 4), bool)).astype(np.uint8) * 255)
    values = np.array(fine.resize((90, 90), Image.Resampling.BILINEAR))
    assert np.unique(values).size > 8
    values[:60] = np.maximum(values[:60], 1)
    with pytest.raises(ValueError, match="255; say which"):
        read_mask(_save(file, values))


def test_several_colours_are_refused(file):
    pixels = _colours(255, 255, 0)
    pixels[RIM] = 0, 0, 255
    with pytest.raises(ValueError, match=r"got 3 colours: \(0, 0, 0\), \(0, 0, 255\) and \(255, 255, 0\)"):
        read_mask(_save(file, pixels))


def test_a_palette_of_several_colours_is_refused_with_its_values(file):
    colours = np.zeros((256, 3), int)
    colours[1], colours[255] = (128, 0, 0), (224, 224, 192)
    _palette(file, np.where(RIM, 255, LABEL), colours)
    with pytest.raises(ValueError, match=r"got 3 colours: .* as a palette it stores 0, 1 and 255; say which"):
        read_mask(file)
    assert np.array_equal(read_mask(file, values="1"), TRUTH & ~RIM)
    assert np.array_equal(read_mask(file, values="1,255"), TRUTH)


@pytest.mark.parametrize(
    "colours",
    [[(0, 0, 0), (0, 0, 0)], [(9, 9, 9), (9, 9, 9)], [(0, 0, 0), (255, 0, 0), (255, 0, 0)]],
    ids=["both black", "both grey", "two red"],
)
def test_a_palette_that_shows_values_alike_is_refused(file, colours):
    _palette(file, LABEL + RIM if len(colours) == 3 else LABEL, colours)
    with pytest.raises(ValueError, match=r"several of its values in the same colour: 0(, 1)? and [12];"):
        read_mask(file)


def test_a_palette_whose_colours_say_the_opposite_of_its_values_is_refused(file):
    _palette(file, LABEL, [(255, 255, 255), (0, 0, 0)])
    with pytest.raises(ValueError, match=r"palette that shows 0 light: .* say which values"):
        read_mask(file)
    assert np.array_equal(read_mask(file, values="1"), TRUTH)


def test_a_palette_ordered_by_chance_is_read_by_its_colours(file):
    greys = [(255, 255, 255), (0, 0, 0), (64, 64, 64), (191, 191, 191)]
    fine = np.kron(_disc(), np.ones((2, 2), bool))
    smooth = np.array(Image.fromarray(fine[1:, 1:]).convert("L").resize((95, 95), Image.Resampling.BOX))
    order = np.searchsorted([0, 64, 128, 191, 255], smooth)
    _palette(file, np.array([1, 2, 3, 3, 0])[order], greys)
    assert np.array_equal(read_mask(file), np.array([0, 64, 191, 191, 255])[order] > 127)


def _disc(radius=15, side=96):
    rows, columns = np.mgrid[:side, :side]
    return (columns - 50.3) ** 2 + (rows - 44.7) ** 2 < radius**2


@pytest.mark.parametrize("side", [48, 64, 72, 90, 128, 144, 192, 200])
@pytest.mark.parametrize("filtered", ["BOX", "BILINEAR", "BICUBIC", "LANCZOS"])
def test_smooth_edges_are_cut_at_half_of_white(file, side, filtered):
    fine = Image.fromarray(np.kron(_disc(), np.ones((4, 4), bool)).astype(np.uint8) * 255)
    smooth = np.array(fine.resize((side, side), Image.Resampling[filtered]))
    assert np.array_equal(read_mask(_save(file, smooth)), smooth > 127.5)
    assert np.array_equal(read_mask(_save(file, smooth.astype(np.uint16) * 257)), smooth > 127.5)


@pytest.mark.parametrize("quality", [30, 40, 60, 70, 75, 90, 95, 98, 100])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("radius", [4, 15, 40])
def test_a_compressed_mask_is_cut_at_half_of_white(tmp_path, quality, mode, radius):
    disc = _disc(radius)
    Image.fromarray(disc.astype(np.uint8) * 255).convert(mode).save(tmp_path / "file.jpg", quality=quality)
    assert np.array_equal(read_mask(tmp_path / "file.jpg"), disc)


@pytest.mark.parametrize("quality", [60, 75, 90])
def test_a_compressed_mask_may_be_saved_again_without_loss(tmp_path, quality):
    _save(tmp_path / "file.jpg", _disc().astype(np.uint8) * 255, quality=quality)
    with Image.open(tmp_path / "file.jpg") as image:
        image.save(tmp_path / "file.png")
    assert np.array_equal(read_mask(tmp_path / "file.png"), _disc())


@pytest.mark.parametrize("colour", [0, 255, 7])
@pytest.mark.parametrize("mode", ["LA", "RGBA", "LA of 16 bits"])
def test_a_shape_in_alpha_alone_is_refused(tmp_path, colour, mode):
    alpha = LABEL * 255
    grey = np.full_like(alpha, colour)
    path = tmp_path / ("file.tif" if "16" in mode else "file.png")
    if "16" in mode:
        both = np.stack([grey, alpha], axis=2).astype(np.uint16)
        tifffile.imwrite(path, both, extrasamples=["unassalpha"], planarconfig="contig")
    else:
        Image.merge(mode, [Image.fromarray(band) for band in [grey] * (len(mode) - 1) + [alpha]]).save(path)
    with pytest.raises(ValueError, match=r"has its shape in the alpha channel alone"):
        read_mask(path)


def test_a_palette_with_the_shape_in_its_transparency_is_refused(file):
    _palette(file, LABEL, [(0, 0, 0), (0, 0, 0)], transparency=b"\x00\xff")
    with pytest.raises(ValueError, match="in the same colour"):
        read_mask(file)


def test_alpha_that_hides_foreground_is_refused_and_alpha_around_it_is_not(file):
    pixels = _colours(255, 0, 0, 255)
    assert np.array_equal(read_mask(_save(file, pixels)), TRUTH)
    pixels[..., 3] = 255
    pixels[:5, :, 3] = 0
    assert np.array_equal(read_mask(_save(file, pixels)), TRUTH)
    pixels[:10, :, 3] = 0
    with pytest.raises(ValueError, match="has 56 foreground pixels that its alpha channel makes transparent"):
        read_mask(_save(file, pixels))


def test_named_values_are_foreground_and_all_others_are_not(file):
    values = np.where(RIM, 255, LABEL).astype(np.uint8)
    _save(file, values)
    for named, wanted in (("1", values == 1), ("1,255", values > 0), ("2-255", RIM), ("0", values == 0)):
        assert np.array_equal(read_mask(file, values=named), wanted)
    assert not read_mask(file, values="7").any()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_named_values_are_those_of_the_file_below_8_bits_too(file, bits):
    image = Image.fromarray(LABEL)
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(file, bits=bits)
    assert np.array_equal(read_mask(file, values="1"), TRUTH)
    tifffile.imwrite(file.with_suffix(".tif"), TRUTH)
    assert np.array_equal(read_mask(file.with_suffix(".tif"), values="1"), TRUTH)


def test_named_values_of_a_mask_that_has_colours_are_refused(file):
    with pytest.raises(
        ValueError, match=r"grey values or a palette for mask_values 1, got colours: \(0, 0, 0\)"
    ):
        read_mask(_save(file, _colours(9, 0, 0)), values="1")


def test_lists_of_values_are_parsed_or_refused():
    assert parse_mask_values("1, 3-5,128 - 255") == [(1, 1), (3, 5), (128, 255)]
    for text in ("", "a", "1,,2", "5-3", "-1", "1-", "1.5", "1,2,"):
        with pytest.raises(ValueError, match=f'numbers and ranges such as .* got "{text}"'):
            parse_mask_values(text)
