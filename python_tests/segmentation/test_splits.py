from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdkernels.segmentation.data import (
    DATASETS,
    SegmentationSample,
    Split,
    split_folds,
    split_samples,
)
from real_data import FOLDER, needs

SEEDS = st.integers(0, 2**32 - 1)
COUNTS = st.lists(st.integers(1, 9), min_size=3, max_size=25)
FOLD_COUNTS = st.lists(st.integers(1, 9), min_size=5, max_size=25)


def _samples(counts):
    return [
        SegmentationSample(Path(f"{patient}_{n}.png"), (Path(f"{patient}_{n}_m.png"),), f"{patient:02}")
        for patient, count in enumerate(counts)
        for n in range(count)
    ]


def _patients(part):
    return {sample.patient for sample in part}


def _parts(split):
    return (split.train, split.test, split.validation)


def _sorted(samples):
    return sorted(samples, key=str)


@given(COUNTS, SEEDS)
def test_parts_cover_the_samples_and_share_none(counts, seed):
    samples = _samples(counts)
    split = split_samples(samples, seed=seed)
    assert _sorted([*split.train, *split.test, *split.validation]) == _sorted(samples)


@given(COUNTS, SEEDS)
def test_no_patient_is_in_two_parts_and_no_part_is_empty(counts, seed):
    parts = [_patients(part) for part in _parts(split_samples(_samples(counts), seed=seed))]
    assert all(parts)
    assert sum(map(len, parts)) == len(counts)


@given(FOLD_COUNTS, SEEDS)
def test_a_split_depends_on_seed_and_samples_not_on_their_order(counts, seed):
    samples = _samples(counts)
    shuffled = random.Random(1).sample(samples, len(samples))
    assert split_samples(samples, seed=seed) == split_samples(shuffled, seed=seed)
    assert split_folds(samples, seed=seed) == split_folds(shuffled, seed=seed)


@given(st.integers(10, 60), SEEDS)
def test_single_images_are_split_within_one_image_of_the_fractions(patients, seed):
    split = split_samples(_samples([1] * patients), seed=seed)
    assert abs(len(split.train) - 0.7 * patients) <= 1
    assert abs(len(split.test) - 0.2 * patients) <= 1
    assert abs(len(split.validation) - 0.1 * patients) <= 1


@given(st.lists(st.integers(1, 9), min_size=20, max_size=60), SEEDS)
def test_patients_are_split_within_one_patient_of_the_fractions(counts, seed):
    """Each cut is off by at most half a patient, and a part has two cuts."""
    split = split_samples(_samples(counts), (0.5, 0.3, 0.2), seed)
    for part, fraction in zip(_parts(split), (0.5, 0.3, 0.2), strict=True):
        assert abs(len(part) - fraction * sum(counts)) <= max(counts)


def test_seeds_give_different_splits():
    samples = _samples([2] * 12)
    assert len({split_samples(samples, seed=seed).test for seed in range(20)}) > 10
    assert len({split_folds(samples, seed=seed)[0].test for seed in range(20)}) > 10


def test_the_split_of_a_seed_is_stable_across_versions():
    """A run resumed with a later version must get the split that it started with."""
    split = split_samples(_samples([1] * 10), seed=3)
    assert [sorted(_patients(part)) for part in _parts(split)] == [
        ["00", "01", "04", "05", "06", "07", "09"],
        ["02", "08"],
        ["03"],
    ]


def test_three_patients_are_enough():
    assert [len(_patients(part)) for part in _parts(split_samples(_samples([5, 1, 1])))] == [1] * 3


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_patients_are_rejected(count):
    with pytest.raises(ValueError, match=rf"at least 3 patients .* got {count}"):
        split_samples(_samples([4] * count))


@pytest.mark.parametrize("fractions", [(0.7, 0.3), (0.8, 0.2, 0.0), (0.7, 0.2, 0.2)])
def test_fractions_that_do_not_add_up_are_rejected(fractions):
    with pytest.raises(ValueError, match="fractions must be three positive numbers"):
        split_samples(_samples([1, 1, 1]), fractions)


@given(FOLD_COUNTS, SEEDS)
def test_every_image_is_tested_in_exactly_one_fold(counts, seed):
    samples = _samples(counts)
    folds = split_folds(samples, seed=seed)
    assert len(folds) == 5
    assert _sorted(sample for fold in folds for sample in fold.test) == _sorted(samples)


@given(FOLD_COUNTS, st.integers(3, 5), SEEDS)
def test_each_fold_is_a_split_by_patient_of_everything(counts, folds, seed):
    samples = _samples(counts)
    for fold in split_folds(samples, folds, seed):
        assert _sorted([*fold.train, *fold.test, *fold.validation]) == _sorted(samples)
        parts = [_patients(part) for part in _parts(fold)]
        assert all(parts)
        assert sum(map(len, parts)) == len(counts)


@given(st.integers(10, 60), SEEDS)
def test_folds_of_single_images_are_70_20_10_within_half_an_image_a_cut(patients, seed):
    for fold in split_folds(_samples([1] * patients), seed=seed):
        assert abs(len(fold.test) - 0.2 * patients) <= 1
        assert abs(len(fold.validation) - 0.1 * patients) <= 0.5 + 1e-9
        assert abs(len(fold.train) - 0.7 * patients) <= 1.5 + 1e-9


@given(st.lists(st.integers(1, 9), min_size=20, max_size=60), SEEDS)
def test_folds_of_patients_are_70_20_10_within_two_patients(counts, seed):
    images, most = sum(counts), max(counts)
    for fold in split_folds(_samples(counts), seed=seed):
        assert abs(len(fold.test) - 0.2 * images) <= most
        assert abs(len(fold.validation) - 0.1 * images) <= most
        assert abs(len(fold.train) - 0.7 * images) <= 2 * most


def test_five_patients_are_enough_for_five_folds():
    folds = split_folds(_samples([6, 1, 1, 2, 3]))
    assert [len(_patients(part)) for fold in folds for part in _parts(fold)] == [3, 1, 1] * 5


def test_validation_parts_differ_between_folds():
    folds = split_folds(_samples([1] * 20))
    assert len({fold.validation for fold in folds}) == 5


@pytest.mark.parametrize("count", [0, 4])
def test_fewer_patients_than_folds_are_rejected(count):
    with pytest.raises(
        ValueError, match=rf"at least 5 patients to be split by patient into 5 folds, got {count}"
    ):
        split_folds(_samples([9] * count))


@pytest.mark.parametrize("folds", [-1, 1, 2])
def test_fewer_than_three_folds_are_rejected(folds):
    with pytest.raises(ValueError, match=f"folds must be at least 3, got {folds}"):
        split_folds(_samples([1] * 20), folds)


def _split(root):
    return split_samples(
        [
            SegmentationSample(
                root / f"Slide_{p}" / "1.png",
                tuple(root / f"GT_{p}" / f"{mask}.png" for mask in range(int(p))),
                p,
            )
            for p in ("01", "02", "03")
        ]
    )


def test_as_json_names_files_relative_to_the_data(tmp_path):
    described = _split(tmp_path).as_json(tmp_path)
    entries = sorted((entry for part in described.values() for entry in part), key=str)
    assert list(described) == ["train", "test", "validation"]
    assert entries[0] == {"patient": "01", "image": "Slide_01/1.png", "masks": ["GT_01/0.png"]}


def test_from_json_gives_the_split_again(tmp_path):
    split = _split(tmp_path)
    described = json.loads(json.dumps({"seed": 7, **split.as_json(tmp_path)}))
    assert Split.from_json(described, tmp_path) == split
    assert Split.from_json(described, str(tmp_path)) == split
    moved = Split.from_json(described, tmp_path / "elsewhere")
    assert moved == _split(tmp_path / "elsewhere")


def test_from_json_finds_files_beside_the_root(tmp_path):
    split = _split(tmp_path / "one")
    described = split.as_json(tmp_path / "two")
    assert described["train"][0]["image"].startswith("../one/")
    assert Split.from_json(described, tmp_path / "two") == split


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": None}, "a split must have a list 'train', got None"),
        ({"test": {}}, r"a split must have a list 'test', got {}"),
        ({"validation": ["x"]}, "validation must contain objects with patient, image and a list of masks"),
        ({"validation": [{"patient": "1", "image": "a.png"}]}, "validation must contain objects"),
        ({"validation": [{"patient": 1, "image": "a.png", "masks": []}]}, "validation must contain objects"),
        ({"validation": [{"patient": "1", "image": "a.png", "masks": "b.png"}]}, "validation must contain"),
    ],
)
def test_from_json_rejects_an_invalid_split(tmp_path, change, message):
    described = {**_split(tmp_path).as_json(tmp_path), **change}
    with pytest.raises(ValueError, match=message):
        Split.from_json(described, tmp_path)


@needs("tnbc")
def test_folds_of_the_real_patients_share_none():
    samples = DATASETS["tnbc"].find(FOLDER / "tnbc").samples
    for fold in split_folds(samples):
        train, test, validation = map(_patients, _parts(fold))
        assert not train & test | train & validation | test & validation
        assert Split.from_json(fold.as_json(FOLDER / "tnbc"), FOLDER / "tnbc") == fold
