"""Split samples into training, test and validation parts that share no patient."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from fdkernels.segmentation.data.names import is_utf8, printable
from fdkernels.segmentation.data.samples import SegmentationSample

FRACTIONS = (0.7, 0.2, 0.1)


@dataclass(frozen=True)
class Split:
    """Three disjoint parts that together make up a data set."""

    train: tuple[SegmentationSample, ...]
    test: tuple[SegmentationSample, ...]
    validation: tuple[SegmentationSample, ...]

    def as_json(self, root: str | Path) -> dict[str, list[dict[str, Any]]]:
        """Return the parts as lists of patient, image and masks, with paths relative to `root`."""

        def relative(path: Path) -> str:
            return Path(os.path.relpath(path, root)).as_posix()

        return {
            name: [
                {
                    "patient": sample.patient,
                    "image": relative(sample.image),
                    "masks": [relative(mask) for mask in sample.masks],
                }
                for sample in part
            ]
            for name, part in (
                ("train", self.train),
                ("test", self.test),
                ("validation", self.validation),
            )
        }

    @classmethod
    def from_json(cls, described: Mapping[str, Any], root: str | Path) -> Split:
        """Rebuild a split from the result of `as_json`; other keys are ignored.

        Args:
            described: result of `as_json`.
            root: the folder that its paths are relative to.

        Raises:
            ValueError: a part or one of its fields is missing or has the wrong type, or UTF-8 cannot hold
                a name.
        """

        def sample(part: str, number: int, entry: Any) -> SegmentationSample:
            try:
                patient, image, masks = entry["patient"], entry["image"], entry["masks"]
                if isinstance(masks, list) and all(
                    isinstance(text, str) for text in (patient, image, *masks)
                ):
                    if not all(map(is_utf8, (patient, image, *masks))):
                        raise ValueError(
                            printable(f"{part} must have names that UTF-8 can hold, got {image}; rename it")
                        )
                    return SegmentationSample(located(image), tuple(map(located, masks)), patient)
            except (KeyError, TypeError):
                pass
            raise ValueError(
                f"{part} must contain objects with patient, image and a list of masks, "
                f"got {entry!r} at index {number}"
            )

        def located(text: str) -> Path:
            return Path(os.path.normpath(Path(root, text)))

        parts = {}
        for part in ("train", "test", "validation"):
            entries = described.get(part)
            if not isinstance(entries, list):
                raise ValueError(f"a split must have a list {part!r}, got {entries!r}")  # noqa: TRY004
            parts[part] = tuple(sample(part, number, entry) for number, entry in enumerate(entries))
        return cls(**parts)


class _Patients:
    """Samples grouped by patient; the order of the patients depends only on the seed."""

    def __init__(self, samples: Sequence[SegmentationSample], seed: int, least: int, purpose: str) -> None:
        self._samples: dict[str, list[SegmentationSample]] = {}
        for sample in sorted(samples, key=lambda sample: (sample.patient, sample.image)):
            self._samples.setdefault(sample.patient, []).append(sample)
        self.order = sorted(self._samples)
        if len(self.order) < least:
            named = f" ({', '.join(self.order)})" if self.order else ""
            raise ValueError(
                f"samples must come from at least {least} patients to be split by patient into "
                f"{purpose}, got {len(self.order)}{named}"
            )
        random.Random(seed).shuffle(self.order)

    def cut(self, order: Sequence[str], goals: Sequence[float]) -> list[list[str]]:
        """Cut the patients into non-empty parts whose image counts are closest to `goals`.

        Args:
            order: patients, at least one more than there are goals.
            goals: desired number of images before each cut, ascending.
        """
        counts = [len(self._samples[patient]) for patient in order]
        totals = list(accumulate(counts, initial=0))  # [patients + 1], images before each position
        cuts = [0]
        for number, goal in enumerate(goals):
            last = len(order) - (len(goals) - number)  # leaves one patient for each remaining part
            places = range(cuts[-1] + 1, last + 1)
            cuts.append(min(places, key=lambda place: abs(totals[place] - goal)))
        return [list(order[start:stop]) for start, stop in pairwise([*cuts, len(order)])]

    def part(self, patients: Sequence[str]) -> tuple[SegmentationSample, ...]:
        """Return the samples of these patients, sorted by patient."""
        return tuple(sample for patient in sorted(patients) for sample in self._samples[patient])


def split_samples(
    samples: Sequence[SegmentationSample],
    fractions: tuple[float, float, float] = FRACTIONS,
    seed: int = 0,
) -> Split:
    """Split samples into train, test and validation parts, keeping each patient in one part.

    Shuffles the patients and cuts their order twice, each time where the number of images is closest
    to the requested fraction; every part gets at least one patient. The result depends on the seed
    and on the set of samples, not on their order.

    Args:
        samples: samples of at least three patients.
        fractions: fractions of training, test and validation images; they add up to 1.
        seed: seed of the shuffle.

    Raises:
        ValueError: there are fewer than three patients, or the fractions are not three positive
            numbers that add up to 1.

    References:
        Section A.4: 70-20-10 train-test-validation.
    """
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions must be three positive numbers that add up to 1, got {fractions}")
    patients = _Patients(samples, seed, 3, "training, test and validation")
    train, test, _ = fractions
    goals = (train * len(samples), (train + test) * len(samples))
    return Split(*map(patients.part, patients.cut(patients.order, goals)))


def split_folds(samples: Sequence[SegmentationSample], folds: int = 5, seed: int = 0) -> list[Split]:
    """Return one split for each fold of a cross-validation, keeping each patient in one part.

    Shuffles the patients and cuts their order into `folds` test parts with nearly equal numbers of
    images. In each fold, the patients after the test part become validation until it has about 10 %
    of all images, and the rest become training, so five folds are 70-20-10 each. Every image is in
    the test part of exactly one fold. The result depends on the seed and on the set of samples, not
    on their order.

    Args:
        samples: samples of at least as many patients as there are folds.
        folds: number of folds, at least 3.
        seed: seed of the shuffle.

    Raises:
        ValueError: there are fewer than 3 folds or fewer patients than folds.

    References:
        Section A.4: 5-fold cross-validation.
    """
    if folds < 3:
        raise ValueError(f"folds must be at least 3, got {folds}")
    patients = _Patients(samples, seed, folds, f"{folds} folds")
    goals = [len(samples) * fold / folds for fold in range(1, folds)]
    tests = patients.cut(patients.order, goals)
    splits = []
    for fold, test in enumerate(tests):
        others = [patient for part in (*tests[fold + 1 :], *tests[:fold]) for patient in part]
        validation, train = patients.cut(others, [FRACTIONS[2] * len(samples)])
        splits.append(Split(*map(patients.part, (train, test, validation))))
    return splits


__all__ = ["FRACTIONS", "Split", "split_folds", "split_samples"]
