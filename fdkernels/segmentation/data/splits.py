"""Training, test and validation parts that share no patient."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from fdkernels.segmentation.data.dataset import SegmentationSample

FRACTIONS = (0.7, 0.2, 0.1)


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of a data set; together they are the data set."""

    train: tuple[SegmentationSample, ...]
    test: tuple[SegmentationSample, ...]
    validation: tuple[SegmentationSample, ...]

    def as_json(self, root: str | Path) -> dict[str, list[dict[str, Any]]]:
        """The parts as lists of patient, image and masks, with paths relative to `root`."""

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


def _nearest(totals: Sequence[int], goal: float, first: int, last: int) -> int:
    """Index in first..last whose total is nearest to `goal`."""
    return min(range(first, last + 1), key=lambda index: abs(totals[index] - goal))


def split_by_patient(
    samples: Sequence[SegmentationSample],
    fractions: tuple[float, float, float] = FRACTIONS,
    seed: int = 0,
) -> Split:
    """Train, test and validation parts, near `fractions` of the images, patients kept whole.

    The patients are put in a random order, and the order is cut twice, each time where the number
    of images comes nearest to the fraction asked for; every part gets at least one patient. The
    result depends on the seed and on which samples there are, not on their order.

    Args:
        samples: of at least three patients.
        fractions: of training, test and validation images; they add up to 1.
        seed: of the order of the patients.

    Raises:
        ValueError: there are fewer than three patients, or the fractions are not three positive
            numbers that add up to 1.

    References:
        Section A.4: 70-20-10 train-test-validation.
    """
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions must be three positive numbers that add up to 1, got {fractions}")
    by_patient: dict[str, list[SegmentationSample]] = {}
    for sample in sorted(samples, key=lambda sample: (sample.patient, sample.image)):
        by_patient.setdefault(sample.patient, []).append(sample)
    patients = sorted(by_patient)
    if len(patients) < 3:
        named = f" ({', '.join(patients)})" if patients else ""
        raise ValueError(
            "samples must come from at least 3 patients to be split by patient into training, "
            f"test and validation, got {len(patients)}{named}"
        )
    random.Random(seed).shuffle(patients)
    counts = [len(by_patient[patient]) for patient in patients]
    totals = list(accumulate(counts, initial=0))  # [patients + 1], images before each cut
    train, test, _ = fractions
    first = _nearest(totals, train * totals[-1], 1, len(patients) - 2)
    second = _nearest(totals, (train + test) * totals[-1], first + 1, len(patients) - 1)

    def part(start: int, stop: int) -> tuple[SegmentationSample, ...]:
        return tuple(sample for patient in sorted(patients[start:stop]) for sample in by_patient[patient])

    return Split(part(0, first), part(first, second), part(second, len(patients)))


__all__ = ["FRACTIONS", "Split", "split_by_patient"]
