from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fdkernels.segmentation.data import SegmentationDataset, split_folds
from fdkernels.segmentation.data.us_tnbc import find, patient_of
from tiny_data import make_tiny


@pytest.fixture
def root(tmp_path):
    return make_tiny("us-tnbc", tmp_path / "us_tnbc")


def test_image_and_mask_have_the_same_name(root):
    samples = find(root).samples
    assert len(samples) == 10
    for sample in samples:
        assert sample.image.parent == root / "images"
        assert sample.masks == (root / "masks" / sample.image.name,)


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("patient001_1", "patient001"),
        ("patient001_12", "patient001"),
        ("patient3fa0_9c_2", "patient3fa0"),
        ("patient007", "patient007"),
        ("patient_7", "patient_7"),
        ("case_7", "case_7"),
    ],
)
def test_the_patient_is_in_a_prepared_name_and_else_the_name(name, patient):
    assert patient_of(name) == patient


def test_images_of_one_patient_stay_together(root):
    samples = find(root).samples
    patients = [sample.patient for sample in samples]
    assert patients.count("patient001") == patients.count("patient002") == 2
    assert len(set(patients)) == 8
    for fold in split_folds(samples):
        parts = [{sample.patient for sample in part} for part in (fold.train, fold.test, fold.validation)]
        assert sum(map(len, parts)) == 8


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
