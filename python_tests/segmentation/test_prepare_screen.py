"""Detection of the ultrasound region on a screen, and of burned-in text and marks."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from fdkernels.segmentation.data.prepare.screen import annotation, content_box
from made_dicom import REGION, screen, tissue

CHECKOUT = Path(__file__).resolve().parents[2]
BUSI = Path(os.environ.get("FDKERNELS_TEST_DATA", CHECKOUT.parent / "shared" / "data")) / "busi"


def test_the_box_is_the_picture_without_the_letters():
    assert content_box(screen()) == REGION


@given(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(20, 60), st.integers(20, 60)))
def test_the_box_is_exact_to_within_half_a_block(place):
    x0, y0, width, height = place
    picture = np.zeros((97, 101), np.uint8)
    picture[y0 : y0 + height, x0 : x0 + width] = 100
    picture = picture[:91, :91]
    found = content_box(picture)
    assert found is not None
    assert np.abs(np.array(found) - (x0, y0, min(x0 + width, 91), min(y0 + height, 91))).max() <= 4


def test_the_larger_of_two_parts_is_used_also_in_colour():
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[8:24, 8:24, 0] = 50
    picture[16:56, 64:112, 2] = 50
    assert content_box(picture) == (64, 16, 112, 56)


def test_parts_that_touch_by_a_corner_are_two():
    picture = np.zeros((64, 64), np.uint8)
    picture[:32, :32] = picture[32:, 32:56] = 90
    assert content_box(picture) == (0, 0, 32, 32)


def test_a_ring_is_one_part():
    picture = np.full((64, 64), 90, np.uint8)
    picture[16:48, 16:48] = 0
    assert content_box(picture) == (0, 0, 64, 64)


@pytest.mark.parametrize("value", [0, 10])
def test_a_black_screen_has_no_box(value):
    assert content_box(np.full((20, 20), value, np.uint8)) is None


def test_soft_tissue_is_not_annotation():
    assert annotation(tissue(200, 300)) is None


def test_five_pixels_of_colour_are_annotation_and_four_are_not():
    picture = np.repeat(tissue(40, 60)[..., None], 3, 2)
    picture[7, 10:14] = (160, 112, 160)  # 48 apart
    assert annotation(picture) is None
    picture[7, 14] = (160, 112, 160)
    assert annotation(picture) == "5 coloured pixels"
    picture[7, 10:15] = (160, 113, 160)
    assert annotation(picture) is None


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_bright_line_of_up_to_3_pixels_is_annotation_at_any_turn(width):
    picture = np.full((40, 40), 60, np.uint8)
    picture[10:30, 15 : 15 + width] = 156  # 96 more
    seen = annotation(picture)
    assert seen is not None
    assert seen.endswith("pixels of thin bright strokes")
    assert annotation(picture.T) == seen


def test_a_bright_area_and_a_line_that_rises_less_are_not_annotation():
    picture = np.full((40, 40), 60, np.uint8)
    picture[10:30, 15:19] = 255
    assert annotation(picture) is None
    picture = wedge()
    picture[10:30, 15:17] = picture[10:30, 15:17] + 90
    assert annotation(picture) is None


def wedge(height=40, width=120):
    """Return a soft wedge from 0 to 238, so that no stretching is needed; no two neighbours are equal."""
    return np.tile(np.arange(0, 2 * width, 2, dtype=np.uint8), (height, 1))


def written(ground, ink):
    """Write a name in one grey value, without soft edges, on uint8 [H, W]."""
    picture = Image.fromarray(ground.copy())
    pen = ImageDraw.Draw(picture)
    pen.fontmode = "1"
    pen.text((10, 12), "DOE JANE 1960", fill=ink)
    return np.asarray(picture)


SPECKLE = np.random.default_rng(0)
HIDDEN = {
    "the values 0 and 1 only": (np.zeros((40, 120), np.uint8), 1),
    "two levels above grey": (np.full((40, 120), 7, np.uint8), 9),
    "three levels below grey": (np.full((40, 120), 200, np.uint8), 197),
    "five levels above noise of four": (SPECKLE.integers(0, 4, (40, 120)).astype(np.uint8), 8),
    "a dark picture": (tissue(40, 120) // 8, 40),
    "dark letters": (tissue(40, 120), 0),
    "faint letters beside the beam": (np.hstack([np.zeros((40, 120), np.uint8), wedge()]), 20),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_text_that_only_stretching_or_inverting_shows_is_annotation(case):
    ground, ink = HIDDEN[case]
    assert annotation(ground) is None
    picture = written(ground, ink)
    seen = annotation(picture)
    assert seen is not None
    assert "strokes" in seen
    white = picture.copy()
    white[35, 100] = 255  # a single pixel does not stop the stretching
    assert annotation(white) is not None


def test_dark_noise_and_tissue_are_not_annotation():
    generator = np.random.default_rng(0)
    for ground in (
        generator.integers(20, 110, (240, 320)),
        generator.normal(60, 8, (240, 320)).round(),
        tissue(200, 300) // 2,
    ):
        assert annotation(ground.astype(np.uint8)) is None


def test_dark_colours_are_annotation():
    picture = np.repeat((tissue(40, 60) // 8)[..., None], 3, 2)
    assert annotation(picture) is None
    picture[7, 10:16] = (20, 2, 2)
    assert annotation(picture) == "6 coloured pixels"


def test_letters_and_calipers_are_annotation():
    for draw in (
        lambda d: d.text((30, 40), "LT 3-4", fill=225, font=ImageFont.load_default(14)),
        lambda d: (d.line((40, 35, 40, 45), fill=255), d.line((35, 40, 45, 40), fill=255)),
        lambda d: d.point([(x, 50) for x in range(20, 60, 5)], fill=255),
    ):
        picture = Image.fromarray(tissue(80, 120))
        draw(ImageDraw.Draw(picture))
        assert annotation(np.array(picture)) is not None


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (50, 4)])
def test_small_pictures_raise_no_error(shape):
    assert annotation(np.full(shape, 9, np.uint8)) is None
    assert content_box(np.full(shape, 90, np.uint8)) == (0, 0, shape[1], shape[0])


# The images of the subset with annotation, labelled by eye; the probe's mark in the corner is ignored.
ANNOTATED = {
    "benign (1)", "benign (195)", "benign (223)", "benign (225)", "benign (245)", "benign (257)",
    "benign (362)", "benign (4)", "benign (409)", "malignant (113)", "malignant (118)", "malignant (132)",
    "malignant (53)", "malignant (70)", "malignant (76)",
}  # fmt: skip


@pytest.mark.skipif(not BUSI.is_dir(), reason=f"no BUSI pictures in {BUSI}")
def test_no_unannotated_real_image_is_flagged_and_one_grey_caliper_is_missed():
    seen = {}
    for file in BUSI.glob("*/*).png"):
        seen[file.stem] = annotation(np.array(Image.open(file).convert("RGB"))[16:, 40:]) is not None
    called = {name for name, annotated in seen.items() if annotated}
    assert called <= ANNOTATED
    assert (ANNOTATED & seen.keys()) - called <= {"malignant (118)"}


@pytest.mark.skipif(not BUSI.is_dir(), reason=f"no BUSI pictures in {BUSI}")
def test_a_real_image_at_a_quarter_of_its_brightness_is_judged_alike():
    for file in sorted(BUSI.glob("*/*).png"))[::4]:
        picture = np.array(Image.open(file).convert("L"))[16:, 40:]
        if file.stem not in {"benign (341)", "malignant (118)"}:  # near the limit
            assert (annotation(picture // 4) is None) == (annotation(picture) is None), file.stem


@pytest.mark.skipif(not BUSI.is_dir(), reason=f"no BUSI pictures in {BUSI}")
def test_the_box_of_a_cropped_real_image_is_nearly_the_whole_image():
    for file in BUSI.glob("*/*).png"):
        picture = np.array(Image.open(file).convert("L"))
        box = content_box(picture)
        assert box is not None
        assert box.area >= 0.8 * picture.size, file.name
