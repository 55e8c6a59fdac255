"""Registry of the data sets: how to find their samples, and the paper's settings.

`README.md` in this folder describes the source and the folder layout of each data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from fdkernels.segmentation.data import ad, busi, dsb2018, folder, monuseg, tnbc, udiat, us_tnbc
from fdkernels.segmentation.data.augment import random_symmetry
from fdkernels.segmentation.data.dataset import SegmentationDataset
from fdkernels.segmentation.data.loaders import (
    cores,
    default_workers,
    derive_seed,
)
from fdkernels.segmentation.data.samples import FoundSamples, ReadingRules, SegmentationSample
from fdkernels.segmentation.data.splits import Split, split_folds, split_samples


class Find(Protocol):
    """Function that finds the samples in a folder."""

    def __call__(self, root: str | Path, on_problem: str = "refuse") -> FoundSamples:
        """Find the samples and read each one once.

        Args:
            root: the folder of the data set as its owners publish it, or one of the forms in which
                copies of it go round; `README.md` names them.
            on_problem: handling of unusable files: "refuse" raises one ValueError that names them
                all; "skip" drops the affected images and returns one sentence per problem in
                `FoundSamples.skipped`, for the caller to show and to record. What a user should know
                without it being a problem is in `FoundSamples.notes`.

        Raises:
            ValueError: the folder has another layout, no file in it is usable, or there are
                problems and `on_problem` is "refuse".
        """
        ...


@dataclass(frozen=True)
class DatasetPreset:
    """Settings of a data set, the paper's where it uses the data set.

    Attributes:
        title: display name.
        find: function that finds the samples in the folder of the download.
        size: side in pixels of the square that images are resized to (section A.4).
        lr: Adam's learning rate (section 3.1).
        worst_off: number of test samples with the lowest Dice that are scored separately (Table 1);
            None if the paper does not use the data set.
        all_samples: number of samples that these are taken from (Table 1).
    """

    title: str
    find: Find
    size: int
    lr: float
    worst_off: int | None = None
    all_samples: int | None = None

    def samples(
        self, root: str | Path, on_problem: str = "refuse", rules: ReadingRules | None = None
    ) -> FoundSamples:
        """Find the samples as `find` does, to be read by the rules."""
        with (rules or ReadingRules()).applied():
            return self.find(root, on_problem)


# The paper does not use busi, dsb2018 and folder; their size and learning rate are this package's choice.
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
    "folder": DatasetPreset("own images", folder.find, size=256, lr=1e-4),
}

__all__ = [
    "DATASETS",
    "DatasetPreset",
    "FoundSamples",
    "ReadingRules",
    "SegmentationDataset",
    "SegmentationSample",
    "Split",
    "cores",
    "default_workers",
    "derive_seed",
    "random_symmetry",
    "split_folds",
    "split_samples",
]
