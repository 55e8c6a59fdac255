"""Data sets by name: how their samples are found, and the size and rate the paper gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fdkernels.segmentation.data import tnbc
from fdkernels.segmentation.data.augment import random_symmetry
from fdkernels.segmentation.data.dataset import SegmentationDataset, SegmentationSample
from fdkernels.segmentation.data.loaders import (
    default_workers,
    derive_seed,
    evaluation_loader,
    train_loader,
)
from fdkernels.segmentation.data.splits import Split, split_by_patient


@dataclass(frozen=True)
class DatasetPreset:
    """What the paper sets for a data set.

    Attributes:
        find_samples: from the folder of the download to its samples.
        size: side in pixels that images are resized to (section A.4).
        lr: Adam's learning rate (section 3.1).
    """

    find_samples: Callable[[str | Path], list[SegmentationSample]]
    size: int
    lr: float


DATASETS: dict[str, DatasetPreset] = {
    "tnbc": DatasetPreset(tnbc.find_samples, size=512, lr=1e-4),
}

__all__ = [
    "DATASETS",
    "DatasetPreset",
    "SegmentationDataset",
    "SegmentationSample",
    "Split",
    "default_workers",
    "derive_seed",
    "evaluation_loader",
    "random_symmetry",
    "split_by_patient",
    "train_loader",
]
