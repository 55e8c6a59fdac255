"""A mask is resized so that it lies on its image."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fdkernels.segmentation.data import SegmentationDataset, SegmentationSample
from fdkernels.segmentation.data.resizing import resize_mask


def _mask(*rows):
    return np.array([[pixel == "#" for pixel in row] for row in rows])


def _resized(mask, side):
    return ["".join(".#"[pixel] for pixel in row) for row in resize_mask(mask, side).tolist()]


def test_a_pixel_is_foreground_where_more_than_half_of_it_is():
    mask = _mask("##.#", "#...", "##..", "##..")  # 3, 1, 4 and 0 of 4 pixels
    assert _resized(mask, 2) == ["#.", "#."]


def test_half_a_pixel_goes_by_the_bilinear_average():
    # Columns 1 to 4 of 8: two pixels are half covered. Their averages weigh four columns 1/8, 3/8, 3/8, 1/8:
    # 3/8 + 1/8 is one half.
    assert _resized(np.tile(_mask(".####..."), (8, 1)), 4) == ["###."] * 4
    # A single column has 3/8 of it.
    assert _resized(np.tile(_mask("...#...."), (8, 1)), 4) == ["...."] * 4
    # Half a pixel at the corner of a square has 3/8 * (3/8 + 1/8) * 2 at most.
    corner = np.zeros((8, 8), bool)
    corner[2, 2] = corner[3, 3] = True
    assert _resized(corner, 4) == ["...."] * 4


def test_enlarged_pixels_stay_where_they_are():
    assert _resized(_mask("#.", ".."), 6) == ["###...", "###...", "###...", "......", "......", "......"]
    # Of three thirds of a row, the middle one is halved by the border of two pixels.
    assert _resized(np.tile(_mask("#."), (2, 1)), 3)[0] in {"#..", "##."}


def test_an_oblong_mask_becomes_a_square():
    assert _resized(np.tile(_mask("######......"), (4, 1)), 4) == ["##.."] * 4


def _area(mask, side):
    """Return the covered part of each new pixel in exact arithmetic."""
    height, width = mask.shape

    def parts(old):
        for new in range(side):
            start, stop = Fraction(new * old, side), Fraction((new + 1) * old, side)
            yield [max(min(stop, Fraction(i + 1)) - max(start, Fraction(i)), Fraction(0)) for i in range(old)]

    rows, columns = list(parts(height)), list(parts(width))
    size = Fraction(height * width, side * side)
    return [
        [sum(r[i] * c[j] for i in range(height) for j in range(width) if mask[i, j]) / size for c in columns]
        for r in rows
    ]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 7), st.randoms(use_true_random=False))
def test_areas_agree_with_exact_arithmetic(height, width, side, random):
    mask = np.array([[random.random() < 0.5 for _ in range(width)] for _ in range(height)])
    resized = resize_mask(mask, side)
    for row, areas in enumerate(_area(mask, side)):
        for column, area in enumerate(areas):
            assert area == Fraction(1, 2) or resized[row, column] == (area > Fraction(1, 2))


def _discs(side, size):
    draw, unit = np.random.default_rng(0), side / size
    rows, columns = (np.mgrid[:size, :size] + 0.5) * unit
    found = np.zeros((size, size), bool)
    for _ in range(60):
        x, y, radius = draw.uniform(20, side - 20), draw.uniform(20, side - 20), draw.uniform(7, 13)
        found |= (columns - x) ** 2 + (rows - y) ** 2 < radius**2
    return found


@pytest.mark.parametrize(("side", "size", "least"), [(512, 256, 0.985), (512, 384, 0.98), (500, 250, 0.985)])
def test_the_mask_lies_on_its_image(tmp_path, side, size, least):
    full = _discs(side, side)
    Image.fromarray(np.where(full, 220, 30).astype(np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(full.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    sample = SegmentationSample(tmp_path / "image.png", (tmp_path / "mask.png",), "a")
    item = SegmentationDataset([sample], size)[0]
    image, mask = item["image"][0].numpy(), item["mask"][0].numpy()
    level = (image - 30 / 255) / (190 / 255)
    slopes = np.stack([slope.ravel() for slope in np.gradient(level)], 1)
    shift = -np.linalg.lstsq(slopes, (mask - level).ravel(), rcond=None)[0]
    assert np.abs(shift).max() < 0.05
    true = _discs(side, size)
    assert 2 * (mask * true).sum() / (mask.sum() + true.sum()) > least
    assert set(np.unique(mask)) == {0, 1}
    assert item["mask"].dtype == torch.float32
