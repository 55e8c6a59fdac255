from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fdkernels.segmentation.data.reading import load_pair

pytest.importorskip("skimage", reason="the extra demo is not installed")
from skimage import data, draw

from fdkernels.segmentation.demo_data import PATCH, stain_mask, write_patches


def test_the_mask_contains_brown_but_not_blue():
    slide = np.full((96, 96, 3), 240, np.uint8)
    brown = draw.disk((30, 30), 15)
    slide[brown] = (120, 70, 30)
    slide[draw.disk((70, 70), 15)] = (110, 120, 190)
    slide[draw.disk((80, 10), 2)] = (120, 70, 30)
    mask = stain_mask(slide)
    truth = np.zeros_like(mask)
    truth[brown] = True
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.9
    assert not mask[60:].any()


def test_patches_are_cut_from_the_slide_and_do_not_overlap(tmp_path):
    slide = data.immunohistochemistry()
    split = write_patches(tmp_path)
    places = []
    for part in (split.train, split.validation, split.test):
        for sample in part:
            row, column = map(int, sample.image.stem.split("_"))
            places.append((row, column))
            image, mask = load_pair(sample)
            window = slide[row * PATCH :, column * PATCH :][:PATCH, :PATCH]
            assert np.array_equal(np.array(image), window)
            assert mask.size == (PATCH, PATCH)
            assert np.array(Image.open(sample.masks[0])).mean() >= 0.02 * 255
    assert len(set(places)) == len(places)
    assert min(len(split.train), 5 * len(split.validation), 3 * len(split.test)) >= 30


def test_rows_of_the_slide_belong_to_one_part(tmp_path):
    split = write_patches(tmp_path)
    rows = [{sample.image.stem[0] for sample in part} for part in (split.train, split.validation, split.test)]
    assert len(set.union(*rows)) == sum(map(len, rows))
