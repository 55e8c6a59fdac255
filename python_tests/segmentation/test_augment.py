from __future__ import annotations

import pytest
import torch

from fdkernels.segmentation.data import random_symmetry

SYMMETRIES = [(flipped, turns) for flipped in (False, True) for turns in range(4)]


def _move(image, flipped, turns):
    return (image.flip(-1) if flipped else image).rot90(turns, (-2, -1))


def _drawn(image, mask, count=400):
    generator = torch.Generator().manual_seed(0)
    return [random_symmetry(image, mask, generator) for _ in range(count)]


def test_gives_the_eight_symmetries_of_the_square_equally_often():
    image = torch.rand(3, 5, 5)
    counts = dict.fromkeys(SYMMETRIES, 0)
    for moved, _ in _drawn(image, image[:1]):
        (name,) = [key for key in SYMMETRIES if torch.equal(moved, _move(image, *key))]
        counts[name] += 1
    assert min(counts.values()) > 25
    assert max(counts.values()) < 80


def test_image_and_mask_move_together():
    image = torch.rand(3, 6, 6)
    for moved, mask in _drawn(image, image[:1], 50):
        assert torch.equal(moved[:1], mask)


def test_an_oblong_image_keeps_its_shape():
    image = torch.rand(3, 4, 6)
    drawn = _drawn(image, image[:1], 60)
    assert {tuple(moved.shape) for moved, _ in drawn} == {(3, 4, 6)}
    assert len({moved.contiguous().numpy().tobytes() for moved, _ in drawn}) == 4


def test_the_same_seed_gives_the_same_symmetry():
    image = torch.rand(1, 5, 5)
    torch.manual_seed(3)
    first = [random_symmetry(image, image)[0] for _ in range(10)]
    torch.manual_seed(3)
    second = [random_symmetry(image, image)[0] for _ in range(10)]
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_a_mask_of_another_size_is_rejected():
    with pytest.raises(ValueError, match=r"mask must have the height and width of image, \(4, 4\)"):
        random_symmetry(torch.zeros(3, 4, 4), torch.zeros(1, 4, 5))
