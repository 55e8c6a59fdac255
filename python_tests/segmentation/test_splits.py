from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdkernels.segmentation.data import SegmentationSample, split_by_patient

SEEDS = st.integers(0, 2**32 - 1)
COUNTS = st.lists(st.integers(1, 9), min_size=3, max_size=25)


def _samples(counts):
    return [
        SegmentationSample(Path(f"{patient}_{n}.png"), (Path(f"{patient}_{n}_m.png"),), f"{patient:02}")
        for patient, count in enumerate(counts)
        for n in range(count)
    ]


def _patients(part):
    return {sample.patient for sample in part}


@given(COUNTS, SEEDS)
def test_parts_cover_the_samples_and_share_none(counts, seed):
    samples = _samples(counts)
    split = split_by_patient(samples, seed=seed)
    together = [*split.train, *split.test, *split.validation]
    assert sorted(together, key=str) == sorted(samples, key=str)


@given(COUNTS, SEEDS)
def test_no_patient_is_in_two_parts_and_no_part_is_empty(counts, seed):
    split = split_by_patient(_samples(counts), seed=seed)
    parts = [_patients(part) for part in (split.train, split.test, split.validation)]
    assert all(parts)
    assert sum(map(len, parts)) == len(counts)


@given(COUNTS, SEEDS)
def test_the_split_depends_on_seed_and_samples_not_on_their_order(counts, seed):
    samples = _samples(counts)
    shuffled = random.Random(1).sample(samples, len(samples))
    assert split_by_patient(samples, seed=seed) == split_by_patient(shuffled, seed=seed)


@given(st.integers(10, 60), SEEDS)
def test_single_images_are_split_within_one_image_of_the_fractions(patients, seed):
    split = split_by_patient(_samples([1] * patients), seed=seed)
    assert abs(len(split.train) - 0.7 * patients) <= 1
    assert abs(len(split.test) - 0.2 * patients) <= 1
    assert abs(len(split.validation) - 0.1 * patients) <= 1


def test_seeds_give_different_splits():
    samples = _samples([2] * 12)
    assert len({split_by_patient(samples, seed=seed).test for seed in range(20)}) > 10


def test_three_patients_are_enough():
    split = split_by_patient(_samples([5, 1, 1]))
    assert [len(_patients(part)) for part in (split.train, split.test, split.validation)] == [1] * 3


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_patients_are_refused(count):
    with pytest.raises(ValueError, match=rf"at least 3 patients .* got {count}"):
        split_by_patient(_samples([4] * count))


@pytest.mark.parametrize("fractions", [(0.7, 0.3), (0.8, 0.2, 0.0), (0.7, 0.2, 0.2)])
def test_fractions_that_do_not_add_up_are_refused(fractions):
    with pytest.raises(ValueError, match="fractions must be three positive numbers"):
        split_by_patient(_samples([1, 1, 1]), fractions)


def test_as_json_names_files_relative_to_the_data(tmp_path):
    samples = [
        SegmentationSample(tmp_path / f"Slide_{p}" / "1.png", (tmp_path / f"GT_{p}" / "1.png",), p)
        for p in ("01", "02", "03")
    ]
    described = split_by_patient(samples).as_json(tmp_path)
    entries = sorted((entry for part in described.values() for entry in part), key=str)
    assert list(described) == ["train", "test", "validation"]
    assert entries[0] == {"patient": "01", "image": "Slide_01/1.png", "masks": ["GT_01/1.png"]}
