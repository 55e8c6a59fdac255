from __future__ import annotations

import os

import pytest
import torch

from fdkernels.segmentation.data import (
    DATASETS,
    default_workers,
    derive_seed,
    evaluation_loader,
    train_loader,
)
from fdkernels.segmentation.data.loaders import EpochSampler
from fdkernels.segmentation.data.tnbc import find
from tiny_data import make_tiny, write_tiny_tnbc


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return find(write_tiny_tnbc(tmp_path_factory.mktemp("tnbc"))).samples


def test_an_epoch_holds_every_index_once():
    assert sorted(EpochSampler(17, seed=0)) == list(range(17))


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        torch.rand(7)
        sampler = EpochSampler(17, seed)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    assert order(0, 3) == order(0, 3)
    assert len({order(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


def test_derived_seeds_differ_and_are_seeds_of_torch():
    seeds = {derive_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    for seed in seeds:
        torch.Generator().manual_seed(seed)


def test_few_images_are_read_without_workers():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert default_workers(10) == 0
    assert default_workers(10_000) == min(cores, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_seeded_epoch_repeats(samples, workers):
    def epoch():
        torch.manual_seed(5)
        loader = train_loader(samples, size=32, batch_size=4, workers=workers, seed=1)
        return list(loader)

    first, second = epoch(), epoch()
    assert [len(batch["image"]) for batch in first] == [4, 4, 1]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["mask"], other["mask"])


def test_workers_read_polygons_as_this_process_does(tmp_path):
    found = DATASETS["monuseg"].find(make_tiny("monuseg", tmp_path))
    batches = [
        list(evaluation_loader(found.samples, size=None, batch_size=5, workers=workers)) for workers in (0, 2)
    ]
    for here, there in zip(*batches, strict=True):
        assert torch.equal(here["mask"], there["mask"])
        assert 0 < here["mask"].mean() < 1


def test_batches_are_float_and_the_last_one_can_be_dropped(samples):
    loader = train_loader(samples, size=32, batch_size=4, workers=0, seed=1, drop_last=True)
    assert len(loader) == 2
    for batch in loader:
        assert batch["image"].shape == (4, 3, 32, 32)
        assert batch["mask"].shape == (4, 1, 32, 32)
        assert batch["image"].dtype == batch["mask"].dtype == torch.float32


def test_evaluation_reads_in_order_and_does_not_augment(samples):
    loader = evaluation_loader(samples, size=None, batch_size=2, workers=0)
    images = torch.cat([batch["image"] for batch in loader])
    assert torch.equal(images, torch.stack([loader.dataset[i]["image"] for i in range(9)]))
