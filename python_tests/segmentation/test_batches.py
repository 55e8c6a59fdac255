from __future__ import annotations

from collections import Counter
from itertools import chain

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from fdkernels.segmentation.batches import (
    Batches,
    BatchKey,
    EvaluationBatches,
    Ranks,
    TrainingBatches,
    evaluation_loader,
    mixed_sizes,
    training_loader,
)
from fdkernels.segmentation.data import DATASETS, SegmentationDataset
from tiny_data import make_tiny

counts = st.integers(1, 60)
worlds = st.integers(1, 4)


def _epoch(domains, batch_size, world=1, seed=0, epoch=0, pairs=False):
    """The keys of each rank."""
    ranks = []
    for rank in range(world):
        batches = TrainingBatches(domains, batch_size, seed, Ranks(rank, world), pairs)
        batches.set_epoch(epoch)
        ranks.append(list(batches))
        assert len(ranks[-1]) == len(batches)
    return ranks


def _items(keys):
    return [key.items for key in keys]


@given(st.lists(counts, min_size=1, max_size=2), st.integers(1, 9), worlds, st.booleans())
def test_every_rank_gets_as_many_samples_and_no_sample_comes_twice(domains, batch_size, world, pairs):
    if sum(domains) < max(world, 2, 2 * pairs):
        return
    if pairs and batch_size * world < 2:
        return
    ranks = _epoch(domains, batch_size, world, pairs=pairs)
    sizes = [[len(items) for items in _items(keys)] for keys in ranks]
    assert all(own == sizes[0] for own in sizes)
    assert all(0 < size <= batch_size for size in sizes[0])
    used = list(chain.from_iterable(chain.from_iterable(map(_items, ranks))))
    assert len(used) == len(set(used))
    assert set(used) <= set(range(sum(domains)))
    left_out = sum(domains) - len(used)
    assert left_out < world or (pairs and left_out == 1)
    if pairs:
        assert min(sizes[0]) * world >= 2


@given(st.lists(counts, min_size=2, max_size=2), st.integers(2, 9), worlds)
def test_every_batch_holds_both_domains_where_there_are_enough_samples(domains, batch_size, world):
    if sum(domains) < world:
        return
    ranks = _epoch(domains, batch_size, world)
    batches = [list(chain.from_iterable(parts)) for parts in zip(*map(_items, ranks), strict=True)]
    held = [len({item < domains[0] for item in items}) == 2 for items in batches]
    assert held == [key.mixed for key in ranks[0]]
    possible = [len(items) > 1 for items in batches]
    if min(domains) >= len(batches):
        assert held == possible
    else:
        assert sum(held) == min(domains)


@pytest.mark.parametrize(
    ("sizes", "minority", "expected"),
    [
        ([4, 4, 4], 6, [2, 2, 2]),
        ([4, 4, 4], 3, [1, 1, 1]),
        ([4, 4, 4], 1, [0, 0, 1]),
        ([3, 3, 3, 2], 4, [1, 1, 1, 1]),
        ([4, 4, 1], 4, [1, 2, 1]),
    ],
)
def test_the_smaller_domain_is_spread_evenly(sizes, minority, expected):
    assert mixed_sizes(sizes, minority) == expected


@given(counts, st.integers(1, 5), st.integers(2, 4))
def test_ranks_together_have_the_batches_of_one_process(samples, batch_size, world):
    samples *= world
    ranks = _epoch([samples], batch_size, world)
    (alone,) = _epoch([samples], batch_size * world)
    joined = [list(chain.from_iterable(parts)) for parts in zip(*map(_items, ranks), strict=True)]
    assert joined == _items(alone)
    seeds = [list(chain.from_iterable(key.seeds for key in keys)) for keys in zip(*ranks, strict=True)]
    assert seeds == [key.seeds for key in alone]


def test_an_epoch_depends_on_seed_and_epoch_alone():
    assert _epoch([9], 2, seed=1, epoch=3) == _epoch([9], 2, seed=1, epoch=3)
    orders = [_items(_epoch([30], 30, seed=seed, epoch=epoch)[0]) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(map(str, orders))) == 4


def test_the_samples_that_sit_out_differ_from_epoch_to_epoch():
    absent = Counter()
    for epoch in range(20):
        ranks = _epoch([7], 2, world=2, epoch=epoch)
        used = set(chain.from_iterable(chain.from_iterable(map(_items, ranks))))
        absent.update(set(range(7)) - used)
    assert sum(absent.values()) == 20
    assert len(absent) > 3


def test_a_single_sample_is_not_paired():
    with pytest.raises(ValueError, match="only one training image"):
        TrainingBatches([1], 4, 0, pairs=True)
    assert [len(items) for items in _items(_epoch([5], 2, pairs=True)[0])] == [2, 2]


def test_more_ranks_than_samples_are_refused():
    with pytest.raises(ValueError, match="each of the 4 devices must get at least one training image, got 3"):
        TrainingBatches([3], 2, 0, Ranks(0, 4))


@given(counts, st.integers(1, 9), worlds)
def test_evaluation_counts_every_sample_once_on_one_rank(samples, batch_size, world):
    ranks = [list(EvaluationBatches(samples, batch_size, Ranks(rank, world))) for rank in range(world)]
    assert len({tuple(map(len, _items(keys))) for keys in ranks}) == 1
    assert all(len(keys) == len(EvaluationBatches(samples, batch_size, Ranks(0, world))) for keys in ranks)
    counted = [
        item
        for key in chain.from_iterable(ranks)
        for item, counts in zip(key.items, key.counted, strict=True)
        if counts
    ]
    assert sorted(counted) == list(range(samples))


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return DATASETS["tnbc"].find(make_tiny("tnbc", tmp_path_factory.mktemp("tnbc"))).samples


def _load(samples, novel=(), workers=0, epoch=0):
    loader = training_loader(
        samples,
        novel,
        size=32,
        batch_size=3,
        workers=workers,
        seed=5,
        ranks=Ranks(),
        pairs=False,
    )
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_batches_are_the_same_with_and_without_workers(samples):
    torch.manual_seed(1)
    alone = _load(samples)
    torch.manual_seed(2)
    for batch, other in zip(alone, _load(samples, workers=2), strict=True):
        assert torch.equal(batch["image"], other["image"])
        assert torch.equal(batch["mask"], other["mask"])


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_in_order_and_does_not_augment(samples, workers):
    batches = list(evaluation_loader(samples, size=None, batch_size=2, workers=workers))
    plain = SegmentationDataset(samples)
    for name in ("image", "mask"):
        expected = torch.stack([plain[index][name] for index in range(len(samples))])
        assert torch.equal(torch.cat([batch[name] for batch in batches]), expected)
    assert all(batch["counted"].all() for batch in batches)


def test_a_loader_may_begin_at_a_later_epoch(samples):
    options = {"size": 32, "batch_size": 3, "workers": 0, "seed": 5}
    for batch, other in zip(
        training_loader(samples, epoch=4, **options), _load(samples, epoch=4), strict=True
    ):
        assert torch.equal(batch["image"], other["image"])


def test_augmentation_leaves_the_global_generator_alone(samples):
    data = Batches(SegmentationDataset(samples, 32, augment=True))
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    data[BatchKey([0, 1], [7, 8], [True, True], False)]
    assert torch.equal(torch.rand(1), expected)


def test_augmentation_depends_on_the_seed_of_the_item(samples):
    data = Batches(SegmentationDataset(samples, 32, augment=True))
    seen = {data[BatchKey([0], [seed], [True], False)]["image"].numpy().tobytes() for seed in range(40)}
    assert len(seen) == 8


def test_pooled_batches_say_whose_each_sample_is(samples):
    base, novel = samples[:6], samples[6:]
    batches = _load(base, novel)
    domains = torch.cat([batch["domain"] for batch in batches])
    assert domains.dtype == torch.int64
    assert domains.bincount().tolist() == [len(base), len(novel)]
    assert all(batch["mixed"] == (len(set(batch["domain"].tolist())) == 2) for batch in batches)
