from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fdkernels.segmentation.data.dsb2018 import find
from fdkernels.segmentation.data.reading import load_pair
from real_data import FOLDER, needs
from tiny_data import make_tiny

REAL = FOLDER / "dsb2018"


def _sum_of_masks(sample):
    """Count the nuclei that cover each pixel, [H, W]."""
    total = 0
    for path in sample.masks:
        with Image.open(path) as mask:
            total = total + (np.array(mask) > 0).astype(int)
    return total


@pytest.fixture
def root(tmp_path):
    return make_tiny("dsb2018", tmp_path / "dsb2018")


def test_an_image_has_all_masks_of_its_folder_and_is_its_own_patient(root):
    for sample in find(root).samples:
        folder = root / "stage1_train" / sample.patient
        assert sample.image == folder / "images" / f"{sample.patient}.png"
        assert sorted(sample.masks) == sorted((folder / "masks").iterdir())


def test_the_folder_of_the_ids_is_accepted(root):
    assert find(root / "stage1_train") == find(root)


def test_the_union_contains_each_nucleus(root):
    for sample in find(root).samples:
        assert np.array_equal(np.array(load_pair(sample)[1]) > 0, _sum_of_masks(sample) > 0)


def test_an_id_without_masks_or_with_two_images_is_named(root):
    first, second = find(root).samples[:2]
    for mask in first.masks:
        mask.unlink()
    Image.new("RGB", (9, 9)).save(second.image.with_name("other.png"))
    with pytest.raises(ValueError, match="2 problems") as raised:
        find(root)
    assert f"{first.image} has no mask" in str(raised.value)
    assert f"{second.image.parent} must contain one image, got 2" in str(raised.value)


@pytest.fixture(scope="module")
def real():
    return find(REAL).samples


@needs("dsb2018")
def test_the_real_images_are_found_with_all_their_masks(real):
    assert len(real) == len(list(REAL.glob("stage1_train/*/images/*.png")))
    assert sum(len(s.masks) for s in real) == len(list(REAL.glob("stage1_train/*/masks/*.png")))


@needs("dsb2018")
def test_the_real_nuclei_do_not_overlap_and_add_up_to_the_union(real):
    for sample in real:
        total = _sum_of_masks(sample)
        union = np.array(load_pair(sample)[1]) > 0
        assert total.max() == 1
        assert total.sum() == union.sum()
        assert np.array_equal(union, total > 0)
        assert 0.01 < union.mean() < 0.45
