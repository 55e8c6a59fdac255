"""Evaluation loader, and the seeds and worker counts of all loaders."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from fdkernels.segmentation.data.dataset import SegmentationDataset
from fdkernels.segmentation.data.samples import SegmentationSample

# For runs with fewer images, starting worker processes costs more than it saves.
_TINY = 32
_MOST_WORKERS = 4


def derive_seed(*numbers: int) -> int:
    """Derive a 63-bit seed from `numbers` (each at least 0) and their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def default_workers(images: int) -> int:
    """Return the worker processes for a loader of that many images: 0 below 32, else one per core up to 4."""
    if images < _TINY:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _MOST_WORKERS)


def evaluation_loader(
    samples: Sequence[SegmentationSample], *, size: int | None, batch_size: int, workers: int
) -> DataLoader[dict[str, Tensor]]:
    """Return a loader of the samples in order, without augmentation.

    Its batches are {"image": float32 [N, 3, H, W] in [0, 1], "mask": float32 [N, 1, H, W] of 0 and 1}
    on the CPU.

    Args:
        samples: the samples to read, at least one.
        size: side in pixels of the square that images are resized to; None keeps the size of the file.
        batch_size: N, except that the last batch may be smaller.
        workers: number of worker processes.

    Raises:
        ValueError: `samples` is empty or `size` is below 1; while iterating, a file cannot be read.
    """
    dataset = SegmentationDataset(samples, size)
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers)


__all__ = ["default_workers", "derive_seed", "evaluation_loader"]
