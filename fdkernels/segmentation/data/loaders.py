"""Reading a data set in batches, and what that is decided by: seeds and worker processes."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from fdkernels.segmentation.data.dataset import SegmentationDataset
from fdkernels.segmentation.data.samples import SegmentationSample

# Below this many images of a run, starting worker processes costs more than they save.
_TINY = 32
_MOST_WORKERS = 4


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed that depends on every one of `numbers` (0 or more) and on their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def default_workers(images: int) -> int:
    """Worker processes for a loader over that many images: none for few, else one a core, to 4."""
    if images < _TINY:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _MOST_WORKERS)


def evaluation_loader(
    samples: Sequence[SegmentationSample], *, size: int | None, batch_size: int, workers: int
) -> DataLoader[dict[str, Tensor]]:
    """Batches {"image": [N, 3, H, W], "mask": [N, 1, H, W]}, float32, in order and not augmented."""
    dataset = SegmentationDataset(samples, size)
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers)


__all__ = ["default_workers", "derive_seed", "evaluation_loader"]
