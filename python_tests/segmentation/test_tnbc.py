from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fdkernels.segmentation.data import SegmentationDataset
from fdkernels.segmentation.data.tnbc import find
from real_data import FOLDER, needs
from tiny_data import IMAGES, SIZE, write_tiny_tnbc

REAL = FOLDER / "tnbc"


@pytest.fixture
def root(tmp_path):
    return write_tiny_tnbc(tmp_path / "tnbc")


def test_finds_every_pair_in_the_order_of_the_numbers(root):
    samples = find(root).samples
    found = [(sample.patient, sample.image.name) for sample in samples]
    assert found == [
        (patient, f"{patient}_{number}.png")
        for patient, numbers in IMAGES.items()
        for number in sorted(numbers)
    ]
    for sample in samples:
        assert sample.masks == (root / f"GT_{sample.patient}" / sample.image.name,)


def test_the_parent_of_the_download_folder_is_accepted(tmp_path):
    inner = write_tiny_tnbc(tmp_path / "TNBC_NucleiSegmentation")
    assert find(tmp_path) == find(inner)


def test_files_that_are_not_images_of_the_data_set_are_ignored(root):
    before = find(root)
    (root / "Slide_01" / "Thumbs.db").write_bytes(b"x")
    (root / "Slide_01" / "._01_1.png").write_bytes(b"x")
    (root / "notes").mkdir()
    assert find(root) == before


def test_images_in_rgb_and_rgba_read_alike(root):
    dataset = SegmentationDataset(find(root).samples)
    width, height = SIZE
    for item in dataset:
        assert item["image"].shape == (3, height, width)
        assert item["mask"].shape == (1, height, width)
        assert item["image"].dtype == item["mask"].dtype == torch.float32
        assert item["image"].min() >= 0
        assert item["image"].max() <= 1
        assert item["mask"].unique().tolist() == [0, 1]
        assert item["image"][:, item["mask"][0] == 1].min() > item["image"].mean()


def test_every_problem_is_named_in_one_error(root):
    (root / "GT_01" / "01_2.png").unlink()
    (root / "Slide_02" / "02_3.png").unlink()
    (root / "Slide_04" / "04_2.png").write_bytes(b"no picture")
    Image.new("L", (8, 8)).save(root / "GT_07" / "07_1.png")
    whole = (root / "Slide_11" / "11_1.png").read_bytes()
    (root / "Slide_11" / "11_1.png").write_bytes(whole[: len(whole) // 2])
    (root / "Slide_12").mkdir()
    with pytest.raises(ValueError, match="cannot be used, 6 problems") as raised:
        find(root)
    message = str(raised.value)
    for name in ("01_2.png", "02_3.png", "04_2.png", "07_1.png", "11_1.png", "Slide_12"):
        assert name in message
    assert "8x8" in message


def test_a_mask_with_shades_of_grey_is_rejected(root):
    shades = np.linspace(0, 255, SIZE[0] * SIZE[1]).reshape(SIZE[::-1]).astype(np.uint8)
    Image.fromarray(shades).save(root / "GT_01" / "01_1.png")
    with pytest.raises(ValueError, match=r"one other value for foreground, .* got 256 grey values"):
        find(root)


def test_an_image_above_the_limit_of_pillow_is_rejected(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE[0] * SIZE[1] - 1)
    with pytest.raises(ValueError, match="decompression bomb"):
        find(root)


def test_many_problems_are_all_named(tmp_path):
    root = write_tiny_tnbc(tmp_path, {"01": list(range(1, 31))})
    for mask in (root / "GT_01").iterdir():
        mask.unlink()
    with pytest.raises(ValueError, match="30 problems") as raised:
        find(root)
    for number in range(1, 31):
        assert f"01_{number}.png has no mask" in str(raised.value)


@needs("tnbc")
def test_the_real_images_are_found_and_read():
    samples = find(REAL).samples
    assert len(samples) == len(list(REAL.glob("GT_*/*.png")))
    assert len({sample.patient for sample in samples}) == len(list(REAL.glob("Slide_*")))
    shares = [item["mask"].mean().item() for item in SegmentationDataset(samples)]
    assert 0.007 < min(shares) < max(shares) < 0.33
    assert 0.10 < sum(shares) / len(shares) < 0.16
