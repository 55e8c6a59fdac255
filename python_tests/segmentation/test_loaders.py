from __future__ import annotations

import os

import torch

from fdkernels.segmentation.batches import evaluation_loader
from fdkernels.segmentation.data import (
    DATASETS,
    default_workers,
    derive_seed,
)
from tiny_data import make_tiny


def test_derived_seeds_differ_and_are_seeds_of_torch():
    seeds = {derive_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    for seed in seeds:
        torch.Generator().manual_seed(seed)


def test_few_images_are_read_without_workers():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert default_workers(10) == 0
    assert default_workers(10_000) == min(cores, 4)


def test_workers_read_polygons_as_this_process_does(tmp_path):
    found = DATASETS["monuseg"].find(make_tiny("monuseg", tmp_path))
    batches = [
        list(evaluation_loader(found.samples, size=None, batch_size=5, workers=workers)) for workers in (0, 2)
    ]
    for here, there in zip(*batches, strict=True):
        assert torch.equal(here["mask"], there["mask"])
        assert 0 < here["mask"].mean() < 1
