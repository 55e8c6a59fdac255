from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fdkernels.segmentation.data import SegmentationDataset
from fdkernels.segmentation.data.busi import CLASSES, find
from fdkernels.segmentation.data.reading import load_pair, read_mask
from real_data import FOLDER, needs
from tiny_data import make_tiny

REAL = FOLDER / "busi"


@pytest.fixture
def root(tmp_path):
    return make_tiny("busi", tmp_path / "busi")


def test_normal_images_are_left_out_unless_asked_for(root):
    assert {sample.image.parent.name for sample in find(root).samples} == {"benign", "malignant"}
    everything = find(root, classes=CLASSES).samples
    assert [s.image.parent.name for s in everything] == ["benign"] * 5 + ["malignant"] * 5 + ["normal"] * 2
    assert all(load_pair(sample)[1].getbbox() is None for sample in everything[-2:])
    assert len(find(root, classes=["normal"]).samples) == 2


def test_all_masks_of_an_image_are_united(root):
    several = [sample for sample in find(root).samples if len(sample.masks) > 1]
    assert [sample.patient for sample in several] == ["benign (1)", "benign (3)", "benign (5)"]
    for sample in several:
        names = [mask.name for mask in sample.masks]
        assert names == [f"{sample.patient}_mask.png", f"{sample.patient}_mask_1.png"]
        union = np.logical_or(*map(read_mask, sample.masks))
        assert np.array_equal(np.array(load_pair(sample)[1]) > 0, union)
        assert union.sum() > read_mask(sample.masks[0]).sum()


def test_images_are_in_the_order_of_their_numbers(tmp_path):
    root = make_tiny("busi", tmp_path / "busi", images=24)
    numbers = [s.patient for s in find(root, classes=["benign"]).samples]
    assert numbers == [f"benign ({number})" for number in range(1, 13)]


def test_the_parent_of_the_download_folder_is_accepted(tmp_path):
    inner = make_tiny("busi", tmp_path / "Dataset_BUSI_with_GT")
    assert find(tmp_path) == find(inner)


def test_duplicate_images_of_two_classes_are_named_together(root):
    benign, malignant = root / "benign" / "benign (2).png", root / "malignant" / "malignant (3).png"
    for ending in ("", "_mask"):
        source = benign.with_stem(benign.stem + ending)
        malignant.with_stem(malignant.stem + ending).write_bytes(source.read_bytes())
    with pytest.raises(ValueError, match="1 problem") as raised:
        find(root)
    assert f"{malignant} has the same pixels as {benign}" in str(raised.value)
    left = [sample.image for sample in find(root, "skip").samples]
    assert benign in left
    assert malignant not in left


def test_an_image_with_only_a_numbered_mask_is_used(root):
    sample = next(sample for sample in find(root).samples if len(sample.masks) == 2)
    sample.masks[0].unlink()
    (found,) = (s for s in find(root).samples if s.image == sample.image)
    assert found.masks == sample.masks[1:]


@pytest.mark.parametrize("classes", [[], ["cyst"], ["benign", "cyst"]])
def test_unknown_classes_are_rejected(root, classes):
    with pytest.raises(ValueError, match="classes must be some of benign, malignant, normal, got"):
        find(root, classes=classes)


@pytest.fixture(scope="module")
def real():
    return find(REAL, classes=CLASSES).samples


@needs("busi")
def test_the_real_images_are_found_with_all_their_masks(real):
    masks = list(REAL.glob("*/*_mask*.png"))
    assert len(real) == len(list(REAL.glob("*/*.png"))) - len(masks)
    assert sorted(mask for sample in real for mask in sample.masks) == sorted(masks)


@needs("busi")
@pytest.mark.parametrize(
    ("patient", "count"),
    [
        ("benign (4)", 2),
        ("benign (25)", 2),
        ("benign (54)", 2),
        ("benign (100)", 2),
        ("benign (195)", 3),
        ("malignant (53)", 2),
    ],
)
def test_the_real_images_with_several_lesions_have_their_union(real, patient, count):
    for sample in [s for s in real if s.patient == patient] or pytest.skip(f"{patient} is not there"):
        assert len(sample.masks) == count
        parts = []
        for path in sample.masks:
            with Image.open(path) as mask:
                parts.append(np.array(mask.convert("RGB")).max(axis=2) > 0)
        union = np.array(load_pair(sample)[1]) > 0
        assert np.array_equal(union, np.any(parts, axis=0))
        assert all(0 < part.sum() < union.sum() for part in parts)


@needs("busi")
def test_the_real_lesions_are_of_plausible_size_and_normal_images_have_none(real):
    shares = {sample: np.array(load_pair(sample)[1]).mean() / 255 for sample in real}
    lesions = [share for sample, share in shares.items() if sample.image.parent.name != "normal"]
    assert 0.002 < min(lesions) < max(lesions) < 0.4
    assert 0.05 < np.mean(lesions) < 0.15
    assert all(share == 0 for sample, share in shares.items() if sample.image.parent.name == "normal")


@needs("busi")
def test_real_images_of_many_sizes_become_squares(real):
    assert len({load_pair(sample)[0].size for sample in real[:10]}) > 3
    for item in SegmentationDataset(real[:4], size=64):
        assert item["image"].shape == (3, 64, 64)
