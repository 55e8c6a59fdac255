"""Drawn masks in all supported file formats, and masks that are rejected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw

from fdkernels.segmentation.data.prepare.outlines import without_outlines
from made_dicom import LESION, REGION, drawn_mask, region, screen

X0, Y0, X1, Y1 = REGION
CUT_LESION = np.zeros((Y1 - Y0, X1 - X0), np.uint8)
CUT_LESION[LESION[1] - Y0 : LESION[3] - Y0, LESION[0] - X0 : LESION[2] - X0] = 255


def palette_mask(path):
    """8-bit TIFF with Fiji's inverting lookup table: 255 is displayed black."""
    image = Image.fromarray(255 - drawn_mask())
    image.putpalette([255 - value for value in range(256) for _ in range(3)])
    image.save(path)


def alpha_mask(path):
    grey = drawn_mask()
    Image.fromarray(np.stack([grey, grey, grey, np.full_like(grey, 255)], 2)).save(path)


WRITERS = {
    "black on white": ("png", lambda path: Image.fromarray(drawn_mask()).save(path)),
    "white on black": ("png", lambda path: Image.fromarray(drawn_mask(light=True)).save(path)),
    "one on zero": ("png", lambda path: Image.fromarray(drawn_mask(light=True) // 255).save(path)),
    "one bit": ("png", lambda path: Image.fromarray(drawn_mask()).convert("1").save(path)),
    "inverting palette": ("png", palette_mask),
    "alpha": ("png", alpha_mask),
    "TIFF": ("tif", lambda path: tifffile.imwrite(path, drawn_mask())),
    "TIFF, white is zero": (
        "tiff",
        lambda path: tifffile.imwrite(path, drawn_mask(light=True), photometric="miniswhite"),
    ),
    "TIFF of 16 bits": ("tif", lambda path: tifffile.imwrite(path, drawn_mask().astype(np.uint16) * 257)),
    "TIFF of ImageJ": ("tif", lambda path: tifffile.imwrite(path, drawn_mask(), imagej=True)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_mask_drawn_either_way_in_any_form_becomes_white_on_black(study, kind):
    suffix, write = WRITERS[kind]
    study.add(mask=None)
    write(study.masks / f"US1.{suffix}")
    study.prepare()
    assert np.array_equal(study.read()[1], CUT_LESION)


def test_the_polarity_can_be_set(study):
    study.add(mask=255 - CUT_LESION, pixels=screen()[Y0:Y1, X0:X1], regions=None)
    study.prepare(mask_polarity="light")
    assert np.array_equal(study.read()[1], 255 - CUT_LESION)


def test_an_ambiguous_border_asks_for_the_polarity(study):
    mask = np.zeros((80, 120), np.uint8)
    mask[:, :60] = 255
    study.add(mask=mask, regions=[region((0, 0, 120, 80))])
    with pytest.raises(ValueError, match=r"on 50% of the border pixels.*set the mask polarity"):
        study.prepare()
    study.prepare(mask_polarity="dark", annotations="none")
    assert np.array_equal(study.read()[1], 255 - mask)


def many_pages(path):
    tifffile.imwrite(path, np.stack([drawn_mask()] * 3), photometric="minisblack")


BAD_MASKS = {
    "three values": (
        lambda p: Image.fromarray(drawn_mask() // 2 + np.eye(80, 120, dtype=np.uint8)).save(p),
        "4 between",
    ),
    "empty": (lambda path: Image.new("L", (120, 80), 255).save(path), "US1.tif is empty: every pixel is 255"),
    "smaller": (
        lambda path: Image.fromarray(drawn_mask(70, 100)).save(path),
        "frame in US1.dcm, 120x80, got 100x70",
    ),
    "pages": (many_pages, "must contain one image, got 3"),
    "cut off": (lambda path: path.write_bytes(b"no picture"), "US1.tif cannot be read"),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_a_mask_that_cannot_be_used_is_named(study, kind):
    write, said = BAD_MASKS[kind]
    study.add(mask=None)
    write(study.masks / "US1.tif")
    with pytest.raises(ValueError, match="nothing was written, 1 problem:") as caught:
        study.prepare()
    assert said in str(caught.value)
    assert not study.output.exists()


def outlined(width, gap=0, others=()):
    """Draw a square of 30 pixels, 15 to 44 and 30 to 59, as a line that goes inward, open by `gap` pixels."""
    mask = np.zeros((80, 120), np.uint8)
    mask[15:45, 30:60] = 255
    mask[15 + width : 45 - width, 30 + width : 60 - width] = 0
    mask[29 : 29 + gap, 30 : 30 + width] = 0
    for box in others:
        mask[box] = 255
    return mask


@pytest.mark.parametrize(("width", "gap"), [(1, 0), (3, 0), (1, 3), (2, 4), (1, 12)])
def test_an_outline_is_refused_by_its_name(study, width, gap):
    study.add(mask=outlined(width, gap), regions=[region((0, 0, 120, 80))])
    with pytest.raises(
        ValueError, match=r"US1\.png must (be filled, got an outline|contain regions, got a line)"
    ):
        study.prepare(annotations="none")
    study.prepare(annotations="none", outlines="keep")
    assert np.array_equal(study.read()[1], outlined(width, gap))


@pytest.mark.parametrize(("width", "gap"), [(1, 0), (3, 0), (1, 3), (2, 4)])
def test_an_outline_is_filled_where_asked_for(study, width, gap):
    study.add(mask=outlined(width, gap), regions=[region((0, 0, 120, 80))])
    report = study.prepare(annotations="none", outlines="fill")
    assert report.notes == ["Filled 1 outline"]
    difference = study.read()[1] != outlined(15)
    assert difference.sum() <= 2 * width * gap  # at the gap alone
    assert not difference[:, :30].any()
    assert not difference[:, 30 + width + gap :].any()


def test_an_outline_beside_a_filled_lesion_is_filled_alone(study):
    beside = np.s_[50:60, 80:100]
    study.add(mask=outlined(1, others=[beside]), regions=[region((0, 0, 120, 80))])
    study.prepare(annotations="none", outlines="fill")
    assert np.array_equal(study.read()[1], outlined(15, others=[beside]))


def test_a_line_with_a_wide_gap_encloses_nothing_also_where_outlines_are_filled(study):
    study.add(mask=outlined(1, 12), regions=[region((0, 0, 120, 80))])
    with pytest.raises(ValueError, match="got a line of 104 pixels, 1 wide, that encloses nothing"):
        study.prepare(annotations="none", outlines="fill")


def test_a_lesion_with_a_small_hole_or_a_bay_is_no_outline(study):
    mask = outlined(15)
    mask[28:32, 43:47] = 0  # 16 of 900
    mask[15:25, 33:36] = 0
    study.add(mask=mask, regions=[region((0, 0, 120, 80))])
    assert study.prepare(annotations="none").notes == []
    assert np.array_equal(study.read()[1], mask)


def test_a_slanted_outline_one_pixel_wide_is_closed():
    drawn, filled = Image.new("L", (64, 64)), Image.new("L", (64, 64))
    corners = [(10, 30), (35, 8), (55, 40), (20, 50)]
    ImageDraw.Draw(drawn).line([*corners, corners[0]], fill=255)
    ImageDraw.Draw(filled).polygon(corners, fill=255)
    found, count = without_outlines(Path("x.png"), np.array(drawn) > 0, "fill")
    assert count == 1
    missed = (np.array(filled) > 0) & ~found
    added = found & (np.array(filled) == 0) & (np.array(drawn) == 0)
    assert missed.sum() == added.sum() == 0
