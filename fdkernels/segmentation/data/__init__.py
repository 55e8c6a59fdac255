"""Data sets by name: how their samples are found, and what the paper sets for them.

`README.md` in this folder says, data set by data set, where to get it and how it must lie on the disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from fdkernels.segmentation.data import ad, busi, dsb2018, monuseg, tnbc, udiat, us_tnbc
from fdkernels.segmentation.data.augment import random_symmetry
from fdkernels.segmentation.data.dataset import SegmentationDataset
from fdkernels.segmentation.data.loaders import (
    default_workers,
    derive_seed,
    evaluation_loader,
)
from fdkernels.segmentation.data.samples import FoundSamples, SegmentationSample
from fdkernels.segmentation.data.splits import Split, split_by_patient, split_folds, split_samples


class Find(Protocol):
    """From a folder to the samples in it."""

    def __call__(self, root: str | Path, on_problem: str = "refuse") -> FoundSamples:
        """The samples, each read once.

        Args:
            root: the folder of the data set as its owners publish it.
            on_problem: what to do about files that cannot be used: "refuse" raises one ValueError
                that names them all; "skip" leaves the affected images out and returns a sentence
                on each in `FoundSamples.skipped`, for the caller to show and to record.

        Raises:
            ValueError: the folder has another layout, nothing in it can be used, or there are
                problems and they are refused.
        """
        ...


@dataclass(frozen=True)
class DatasetPreset:
    """What is set for a data set, by the paper where it uses it.

    Attributes:
        title: its name in prose.
        find: from the folder of the download to its samples.
        size: side in pixels that images are resized to (section A.4).
        lr: Adam's learning rate (section 3.1).
        worst_off: how many test samples with the lowest Dice are looked at apart (Table 1); None
            where the paper does not use the data set.
        all_samples: of how many that is (Table 1).
    """

    title: str
    find: Find
    size: int
    lr: float
    worst_off: int | None = None
    all_samples: int | None = None


# Size and rate of busi and dsb2018, which the paper does not use, are this package's choice.
DATASETS: dict[str, DatasetPreset] = {
    "tnbc": DatasetPreset("TNBC", tnbc.find, size=512, lr=1e-4, worst_off=10, all_samples=50),
    "monuseg": DatasetPreset("MoNuSeg", monuseg.find, size=512, lr=1e-4, worst_off=25, all_samples=44),
    "udiat": DatasetPreset("UDIAT", udiat.find, size=256, lr=1e-4, worst_off=35, all_samples=163),
    "ad-256": DatasetPreset(
        "AD 256x256", partial(ad.find, side=256), size=256, lr=1e-3, worst_off=500, all_samples=10_000
    ),
    "ad-128": DatasetPreset(
        "AD 128x128", partial(ad.find, side=128), size=128, lr=1e-3, worst_off=500, all_samples=10_000
    ),
    "us-tnbc": DatasetPreset("US-TNBC", us_tnbc.find, size=512, lr=1e-3, worst_off=10, all_samples=15),
    "busi": DatasetPreset("BUSI", busi.find, size=256, lr=1e-4),
    "dsb2018": DatasetPreset("DSB2018", dsb2018.find, size=256, lr=1e-4),
}

__all__ = [
    "DATASETS",
    "DatasetPreset",
    "FoundSamples",
    "SegmentationDataset",
    "SegmentationSample",
    "Split",
    "default_workers",
    "derive_seed",
    "evaluation_loader",
    "random_symmetry",
    "split_by_patient",
    "split_folds",
    "split_samples",
]
