from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fdkernels.segmentation.data import SegmentationDataset
from fdkernels.segmentation.data.us_tnbc import find
from tiny_data import make_tiny


@pytest.fixture
def root(tmp_path):
    return make_tiny("us-tnbc", tmp_path / "us_tnbc")


def test_image_and_mask_have_the_same_name_and_each_image_is_its_own_patient(root):
    samples = find(root).samples
    assert [sample.patient for sample in samples] == [f"case_{number}" for number in range(1, 11)]
    for sample in samples:
        assert sample.image == root / "images" / f"{sample.patient}.png"
        assert sample.masks == (root / "masks" / f"{sample.patient}.png",)


def test_the_white_lesion_is_the_foreground(root):
    for sample, item in zip(find(root).samples, SegmentationDataset(find(root).samples), strict=True):
        with Image.open(sample.masks[0]) as mask:
            assert np.array_equal(item["mask"][0].numpy() == 1, np.array(mask) == 255)
        assert 0 < item["mask"].mean() < 0.5


def test_a_mask_in_another_format_belongs_to_its_image_too(root):
    sample = find(root).samples[0]
    with Image.open(sample.masks[0]) as mask:
        mask.save(sample.masks[0].with_suffix(".tif"))
    sample.masks[0].unlink()
    assert find(root).samples[0].masks == (sample.masks[0].with_suffix(".tif"),)
