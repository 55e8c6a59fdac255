from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fdkernels.segmentation.data import SegmentationDataset, SegmentationSample
from fdkernels.segmentation.data.decoded import DecodedPairs
from fdkernels.segmentation.data.reading import load_pair
from fdkernels.segmentation.data.samples import ReadingRules


def _save(path, values):
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return path


@pytest.fixture
def sample(tmp_path):
    pixels = np.arange(4 * 6 * 3).reshape(4, 6, 3)
    left, right = np.zeros((4, 6)), np.zeros((4, 6))
    left[:, 0], right[:, 5] = 255, 1
    masks = (_save(tmp_path / "left.png", left), _save(tmp_path / "right.png", right))
    return SegmentationSample(_save(tmp_path / "image.png", pixels), masks, "p")


def test_several_masks_are_united(sample):
    item = SegmentationDataset([sample])[0]
    expected = torch.zeros(1, 4, 6)
    expected[..., [0, 5]] = 1
    assert torch.equal(item["mask"], expected)


def test_pixels_are_scaled_to_one(sample):
    item = SegmentationDataset([sample])[0]
    expected = torch.arange(72.0).reshape(4, 6, 3).permute(2, 0, 1) / 255
    assert torch.equal(item["image"], expected)


def test_resizing_gives_the_size_and_keeps_the_mask_binary(sample):
    item = SegmentationDataset([sample], size=9)[0]
    assert item["image"].shape == (3, 9, 9)
    assert item["mask"].shape == (1, 9, 9)
    assert item["mask"].unique().tolist() == [0, 1]


def test_an_image_is_interpolated_and_a_mask_is_not(tmp_path):
    ramp = np.zeros((2, 2, 3))
    ramp[:, 1] = 200
    image = _save(tmp_path / "image.png", ramp)
    mask = _save(tmp_path / "mask.png", ramp[..., 0])
    item = SegmentationDataset([SegmentationSample(image, (mask,), "p")], size=8)[0]
    assert item["image"].unique().numel() > 2
    assert torch.equal(item["mask"][0, 0], torch.tensor([0.0] * 4 + [1.0] * 4))


def test_a_mask_of_another_size_is_named(sample, tmp_path):
    other = _save(tmp_path / "other.png", np.zeros((5, 6)))
    with pytest.raises(ValueError, match=r"other.png must have the size .* 6x4, got 6x5"):
        load_pair(SegmentationSample(sample.image, (other,), "p"))


def test_no_samples_and_no_size_are_rejected(sample):
    with pytest.raises(ValueError, match="samples must contain at least one"):
        SegmentationDataset([])
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        SegmentationDataset([sample], size=0)


def test_only_augmentation_moves_pixels(sample):
    plain, augmented = SegmentationDataset([sample]), SegmentationDataset([sample], augment=True)
    torch.manual_seed(0)
    assert all(torch.equal(plain[0]["image"], plain[0]["image"]) for _ in range(20))
    assert len({augmented[0]["image"].numpy().tobytes() for _ in range(40)}) == 4


def test_an_oblong_image_is_resized_to_a_square_as_a_whole(tmp_path):
    halves = np.zeros((4, 40, 3))
    halves[:, 20:] = 255
    image = _save(tmp_path / "image.png", halves)
    mask = _save(tmp_path / "mask.png", halves[..., 0])
    item = SegmentationDataset([SegmentationSample(image, (mask,), "p")], size=8)[0]
    assert torch.equal(item["mask"], torch.tensor([0.0] * 4 + [1.0] * 4).expand(1, 8, 8))
    assert item["image"][:, :, :3].max() == 0
    assert item["image"][:, :, 5:].min() == 1


def test_items_have_a_domain_only_if_one_is_given(sample):
    assert set(SegmentationDataset([sample])[0]) == {"image", "mask"}
    for domain in (0, 1):
        item = SegmentationDataset([sample], domain=domain)[0]
        assert set(item) == {"image", "mask", "domain"}
        assert item["domain"].dtype == torch.int64
        assert item["domain"].shape == ()
        assert item["domain"].item() == domain


def test_construction_reads_no_file(tmp_path):
    absent = SegmentationSample(tmp_path / "gone.png", (tmp_path / "gone_mask.png",), "p")
    data = SegmentationDataset([absent], size=8)
    assert len(data) == 1
    with pytest.raises(ValueError, match=r"gone.png cannot be read"):
        data[0]


@pytest.fixture
def reads(monkeypatch):
    """The images that are read, in order."""
    found = []

    def counted(sample):
        found.append(sample.image.name)
        return load_pair(sample)

    monkeypatch.setattr("fdkernels.segmentation.data.decoded.load_pair", counted)
    return found


def test_a_pair_is_read_once(sample, reads):
    pairs = DecodedPairs()
    first, again = pairs.pair(sample, 8), pairs.pair(sample, 8)
    assert reads == ["image.png"]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert pairs.pair(sample, 9)[0].shape == (3, 9, 9)
    assert pairs.pair(dataclasses.replace(sample, rules=ReadingRules(mask_values="1")), 8)[1].sum() < 64
    assert len(reads) == 3


@pytest.mark.parametrize("changed", ["image.png", "left.png"])
def test_a_changed_file_is_read_again(sample, reads, tmp_path, changed):
    pairs = DecodedPairs()
    pairs.pair(sample, None)
    shape = (4, 6, 3) if changed == "image.png" else (4, 6)
    _save(tmp_path / changed, np.full(shape, 255))
    os.utime(tmp_path / changed, ns=(0, 0))
    image, mask = pairs.pair(sample, None)
    assert (image if changed == "image.png" else mask).min() == (255 if changed == "image.png" else 1)
    used = pairs.used
    pairs.pair(sample, None)
    assert pairs.used == used == 4 * 6 * 4
    assert len(reads) == 2


def test_pairs_beyond_the_limit_are_read_anew(sample, reads):
    pairs = DecodedPairs(limit=8 * 8 * 4 + 1)
    for _ in range(2):
        pairs.pair(sample, 8)
        pairs.pair(sample, 4)
    assert reads == ["image.png"] * 3
    assert pairs.used == 8 * 8 * 4


def test_augmentation_leaves_the_kept_pair_as_it_is(sample):
    plain = SegmentationDataset([sample])[0]
    for seed in range(8):
        torch.manual_seed(seed)
        SegmentationDataset([sample], augment=True)[0]["image"].zero_()
    SegmentationDataset([sample])[0]["mask"].zero_()
    again = SegmentationDataset([sample])[0]
    assert all(torch.equal(plain[key], again[key]) for key in plain)


def test_a_missing_file_is_named_after_it_was_kept(sample):
    data = SegmentationDataset([sample])
    data[0]
    sample.image.unlink()
    with pytest.raises(ValueError, match=r"image\.png"):
        data[0]
