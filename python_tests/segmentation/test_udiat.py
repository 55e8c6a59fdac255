from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fdkernels.segmentation.data import SegmentationDataset
from fdkernels.segmentation.data.udiat import find
from tiny_data import make_tiny


@pytest.fixture
def root(tmp_path):
    return make_tiny("udiat", tmp_path / "udiat")


def test_image_and_mask_have_the_same_name_and_each_image_is_its_own_patient(root):
    samples = find(root).samples
    assert [sample.patient for sample in samples] == [f"{number:06}" for number in range(1, 11)]
    for sample in samples:
        assert sample.image == root / "original" / f"{sample.patient}.png"
        assert sample.masks == (root / "GT" / f"{sample.patient}.png",)


def test_the_parent_of_the_download_folder_is_accepted(tmp_path):
    inner = make_tiny("udiat", tmp_path / "BUS")
    assert find(tmp_path) == find(inner)


def test_grey_images_are_repeated_over_three_channels(root):
    for item in SegmentationDataset(find(root).samples):
        assert item["image"].shape[0] == 3
        assert torch.equal(item["image"][0], item["image"][1])
        assert torch.equal(item["image"][0], item["image"][2])


def test_a_list_of_the_classes_beside_the_folders_is_ignored(root):
    before = find(root)
    (root / "DatasetB.xlsx").write_bytes(b"x")
    assert find(root) == before


def test_masks_of_the_other_polarity_stay_as_they_are(root):
    """White is always the lesion; the file does not say which polarity is meant."""
    sample = find(root).samples[0]
    with Image.open(sample.masks[0]) as mask:
        inverted = 255 - np.array(mask)
    Image.fromarray(inverted).save(sample.masks[0])
    assert SegmentationDataset([sample])[0]["mask"].mean() > 0.5
