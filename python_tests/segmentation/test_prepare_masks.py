"""Drawn masks in all supported file formats, and masks that are rejected."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from PIL import Image

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
