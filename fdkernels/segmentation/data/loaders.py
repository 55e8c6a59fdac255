"""DataLoaders whose order and augmentation depend on seed and epoch alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Sampler

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


class EpochSampler(Sampler[int]):
    """A random order of `length` indices for each epoch, drawn from the seed and the epoch.

    A run that is resumed at an epoch meets the same order there as an unbroken one, and so do two
    runs of which only one draws further random numbers. The loader takes its worker seeds from
    `generator`, which is set anew with the epoch for the same reason. Lightning calls `set_epoch`.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.generator = torch.Generator()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.generator.manual_seed(derive_seed(self.seed, epoch, 1))

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch, 0))
        yield from torch.randperm(self.length, generator=order).tolist()


def dataset_loader(
    dataset: SegmentationDataset | ConcatDataset[dict[str, Tensor]],
    *,
    batch_size: int,
    workers: int,
    seed: int,
    drop_last: bool = False,
) -> DataLoader[dict[str, Tensor]]:
    """Batches of a data set, or of several that were pooled, in an order drawn anew each epoch.

    Where the data sets have a domain, batches also hold "domain", int64 [N].
    """
    sampler = EpochSampler(len(dataset), seed)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        drop_last=drop_last,
        generator=sampler.generator,
    )


def train_loader(
    samples: Sequence[SegmentationSample],
    *,
    size: int | None,
    batch_size: int,
    workers: int,
    seed: int,
    drop_last: bool = False,
) -> DataLoader[dict[str, Tensor]]:
    """Shuffled and augmented batches {"image": [N, 3, H, W], "mask": [N, 1, H, W]}, float32."""
    return dataset_loader(
        SegmentationDataset(samples, size, augment=True),
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        drop_last=drop_last,
    )


def evaluation_loader(
    samples: Sequence[SegmentationSample], *, size: int | None, batch_size: int, workers: int
) -> DataLoader[dict[str, Tensor]]:
    """Batches as from `train_loader`, in order, whole and not augmented."""
    dataset = SegmentationDataset(samples, size)
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers)


__all__ = [
    "EpochSampler",
    "dataset_loader",
    "default_workers",
    "derive_seed",
    "evaluation_loader",
    "train_loader",
]
