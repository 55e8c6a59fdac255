"""Which images make a batch, and on which rank: decided by seed, epoch and position alone.

The number of worker processes and earlier random draws change nothing, so a resumed run, one with other
workers, and one on several ranks all see the batches of the unbroken run in one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, default_collate

from fdkernels.segmentation.data import SegmentationDataset, SegmentationSample, derive_seed


class Ranks(NamedTuple):
    """The rank of this process among those that share each batch, and their number."""

    rank: int = 0
    world: int = 1


class BatchKey(NamedTuple):
    """The samples of one batch on one rank.

    Attributes:
        items: indices of the samples.
        seeds: the seed of each sample's augmentation.
        counted: whether each sample counts; the others only fill up a rank.
        mixed: whether the batch, over all ranks, has samples of both domains.
    """

    items: list[int]
    seeds: list[int]
    counted: list[bool]
    mixed: bool


class Batches(Dataset[dict[str, Any]]):
    """Whole batches of a data set by `BatchKey`, each item augmented from a seed of its own.

    To what the items hold a batch adds "counted", bool [N], and "mixed", a bool.
    """

    def __init__(self, items: Dataset[dict[str, Tensor]]) -> None:
        self.items = items

    def __getitem__(self, key: BatchKey) -> dict[str, Any]:
        batch: dict[str, Any] = default_collate(
            [self._item(index, seed) for index, seed in zip(key.items, key.seeds, strict=True)]
        )
        return {**batch, "counted": torch.tensor(key.counted, device="cpu"), "mixed": key.mixed}

    def _item(self, index: int, seed: int) -> dict[str, Tensor]:
        # Augmentation draws from torch's global generator, which goes on afterwards as it was.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.items[index]


def mixed_sizes(sizes: Sequence[int], minority: int) -> list[int]:
    """Spread the samples of the smaller domain evenly over batches of these sizes; return their numbers.

    Each batch gets its proportional share, rounded; then batches of two and more that got none take
    one from those that can spare it. So every batch holds both domains unless the smaller one has
    fewer samples than there are batches.

    Args:
        sizes: of the batches, over all ranks.
        minority: samples of the smaller domain, at most half of all.
    """
    total, before, counts = sum(sizes), 0, []
    for size in sizes:
        counts.append(minority * (before + size) // total - minority * before // total)
        before += size
    for place, size in enumerate(sizes):
        # A batch of one cannot hold both domains: what it has it can spare.
        spare = [count - (other > 1) for count, other in zip(counts, sizes, strict=True)]
        richest = max(range(len(counts)), key=spare.__getitem__)
        if size > 1 and counts[place] == 0 and spare[richest] > 0:
            counts[place] += 1
            counts[richest] -= 1
    return counts


class TrainingBatches(Sampler[BatchKey]):
    """The batches of an epoch: random, the same number of samples on each rank, domains mixed.

    Over all ranks a batch has `batch_size` samples a rank; the samples of rank r are the r-th part of
    it. The last batch has what is left, as far as it divides among the ranks: up to `world - 1` samples
    sit out the epoch, other ones each time. Of two domains every batch holds both, wherever that is
    possible (`mixed_sizes`). Lightning calls `set_epoch`. (Lightning's own DistributedSampler repeats samples
    to fill up ranks, knows no domains, and gives R ranks other batches than one process.)

    Args:
        domains: samples of each domain, one number or two; indices count through the first domain,
            then the second.
        batch_size: samples a rank.
        seed: with the epoch, decides on everything.
        ranks: this rank, and their number.
        pairs: samples are paired within a batch, so a last batch of one sample is left out.

    Raises:
        ValueError: there are fewer samples than ranks, or one sample alone where `pairs`.
    """

    def __init__(
        self,
        domains: Sequence[int],
        batch_size: int,
        seed: int,
        ranks: Ranks = Ranks(),  # noqa: B008 - immutable
        pairs: bool = False,
    ) -> None:
        total, whole = sum(domains), batch_size * ranks.world
        if total < ranks.world:
            raise ValueError(
                f"each of the {ranks.world} devices must get at least one training image, got {total}"
            )
        if pairs and total < 2:
            raise ValueError("exchange pairs the samples of a batch, and there is only one training image")
        rest = total % whole // ranks.world * ranks.world
        self.sizes = [whole] * (total // whole) + [rest] * (rest > int(pairs))
        if not self.sizes:
            raise ValueError(f"batches of {whole} with pairs must have 2 samples or more, got {total}")
        self.domains = tuple(domains)
        self.seed = seed
        self.ranks = ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[BatchKey]:
        rank, world = self.ranks
        boundary = self.domains[0]
        for items in self._batches():
            own = items[len(items) // world * rank : len(items) // world * (rank + 1)]
            seeds = [derive_seed(self.seed, self.epoch, 1, item) for item in own]
            mixed = 0 < sum(item < boundary for item in items) < len(items)
            yield BatchKey(own, seeds, [True] * len(own), mixed)

    def _batches(self) -> Iterator[list[int]]:
        """Yield the indices of each batch over all ranks."""
        draw = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch, 0))
        if len(self.domains) == 1:
            order = torch.randperm(self.domains[0], generator=draw, device="cpu").tolist()
            for size in self.sizes:
                yield order[:size]
                del order[:size]
            return
        first, second = self.domains
        orders = [
            torch.randperm(first, generator=draw, device="cpu").tolist(),
            (first + torch.randperm(second, generator=draw, device="cpu")).tolist(),
        ]
        small, large = sorted(orders, key=len)
        # The samples that sit out are of the larger domain.
        for size, count in zip(self.sizes, mixed_sizes(self.sizes, len(small)), strict=True):
            items = small[:count] + large[: size - count]
            del small[:count], large[: size - count]
            # Ranks take slices: without another shuffle one of them would get all of the small domain.
            yield [items[place] for place in torch.randperm(size, generator=draw, device="cpu")]


class EvaluationBatches(Sampler[BatchKey]):
    """All samples once, dealt in turn to the ranks, each with the same number of batches.

    A rank with fewer samples is filled up with samples that do not count.
    """

    def __init__(self, samples: int, batch_size: int, ranks: Ranks = Ranks()) -> None:  # noqa: B008
        self.samples = samples
        self.batch_size = batch_size
        self.ranks = ranks
        self.each = math.ceil(samples / ranks.world)

    def __len__(self) -> int:
        return math.ceil(self.each / self.batch_size)

    def __iter__(self) -> Iterator[BatchKey]:
        places = [self.ranks.rank + turn * self.ranks.world for turn in range(self.each)]
        for start in range(0, self.each, self.batch_size):
            batch = places[start : start + self.batch_size]
            items = [min(place, self.samples - 1) for place in batch]
            yield BatchKey(items, [0] * len(batch), [place < self.samples for place in batch], False)


def training_loader(
    samples: Sequence[SegmentationSample],
    novel: Sequence[SegmentationSample] = (),
    *,
    size: int | None,
    batch_size: int,
    workers: int,
    seed: int,
    ranks: Ranks = Ranks(),  # noqa: B008 - immutable
    pairs: bool = False,
    epoch: int = 0,
) -> DataLoader[Any]:
    """Load augmented batches {"image": [N, 3, H, W], "mask": [N, 1, H, W]}, chosen by `TrainingBatches`.

    With novel samples they also hold "domain", int64 [N] of 0 (base) and 1 (novel).

    Args:
        samples: of the data set.
        novel: of a second data set.
        size: side in pixels that images are resized to; None keeps the size of the file.
        batch_size: N, samples a rank.
        workers: processes that read images.
        seed, ranks, pairs: as for `TrainingBatches`.
        epoch: the first one.

    Raises:
        ValueError: as `TrainingBatches`.
    """
    items: Dataset[dict[str, Tensor]]
    if novel:
        parts = [
            SegmentationDataset(part, size, augment=True, domain=domain)
            for domain, part in enumerate((samples, novel))
        ]
        items, domains = ConcatDataset(parts), [len(part) for part in parts]
    else:
        items, domains = SegmentationDataset(samples, size, augment=True), [len(samples)]
    batches = TrainingBatches(domains, batch_size, seed, ranks, pairs)
    batches.set_epoch(epoch)
    return DataLoader(
        Batches(items),
        sampler=batches,
        batch_size=None,  # an item of this data set is a batch
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def evaluation_loader(
    samples: Sequence[SegmentationSample],
    *,
    size: int | None,
    batch_size: int,
    workers: int,
    ranks: Ranks = Ranks(),  # noqa: B008 - immutable
) -> DataLoader[Any]:
    """Load batches as `training_loader` does, in order, not augmented, chosen by `EvaluationBatches`.

    Args:
        samples, size, batch_size, workers, ranks: as for `training_loader`.
    """
    return DataLoader(
        Batches(SegmentationDataset(samples, size)),
        sampler=EvaluationBatches(len(samples), batch_size, ranks),
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


__all__ = [
    "BatchKey",
    "Batches",
    "EvaluationBatches",
    "Ranks",
    "TrainingBatches",
    "evaluation_loader",
    "mixed_sizes",
    "training_loader",
]
