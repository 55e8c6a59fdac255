"""The fuzzer of the op: its bands enclose what rounding may do, and a wrong value leaves them."""

from __future__ import annotations

import math

import pytest
import torch

import fdkernels as fdk
import oracles
from bands import Interval, widest
from fuzz import op


def interval(low: float, high: float) -> Interval:
    return Interval(torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64))


def test_intervals_worked_by_hand():
    assert interval(-1, 2).square() == interval(0, 4)
    assert interval(-3, -2).square() == interval(4, 9)
    assert interval(-1, 2) * interval(3, 5) == interval(-5, 10)
    assert interval(-1, 2) * -2.0 == interval(-4, 2)
    assert interval(-1, 2) - interval(3, 5) == interval(-6, -1)
    assert interval(2, 6) / interval(2, 4) == interval(0.5, 3)
    assert interval(-9, 4).within(5.0) == interval(-5, 4)
    assert interval(1, 4).farthest(torch.tensor(2.0, dtype=torch.float64)) == 2


def upstream(loss):
    return torch.randn(loss.shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_the_box_encloses_random_moves_of_the_sums(seed):
    case, layout, options = op.draw(seed)
    features, mask = case.features(), op.lay_out_mask(case.mask(), layout)
    exact = oracles.truth(features, mask, upstream, moves=0, **options)
    moved = oracles.truth(features, mask, upstream, **options)
    bare = exact._replace(
        loss_band=torch.zeros_like(exact.loss_band), bands=[torch.zeros_like(band) for band in exact.bands]
    )
    box = widest(bare, features, mask, upstream, **options)
    assert (moved.loss_band <= torch.maximum(box.loss_band, exact.loss_band) * 1.001).all()
    for inner, outer, base in zip(moved.bands, box.bands, exact.bands, strict=True):
        reach = torch.maximum(oracles._row_max(outer), base)
        assert (inner <= reach * 1.001 + 1e-300).all()


def test_channel_sums_that_cancel_may_lose_every_digit():
    """f - b sums to 0 over the channels: rounding alone decides definition4's loss, up to -log eps."""
    features = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], requires_grad=True)  # [1, 2, 2]
    mask = torch.tensor([[1.0, 0.0]])
    options = {
        "convention": "definition4", "exchange": "none", "pairing": None, "layer_weights": None,
        "mask_resize": None, "ignore_index": None, "eps": 1e-12, "reduction": "mean",
    }  # fmt: skip
    truth = oracles.truth([features], mask, upstream, **options)
    box = widest(truth, [features], mask, upstream, **options)
    # Each sum may move by 2u of its own 1 and 2u of both regions' 1, there are four of them, two of size 0.
    farthest = (2 * 4 + 2 * 2) * 1e-6
    assert truth.loss.item() == pytest.approx(-math.log(1e-12))
    assert box.loss_band.item() == pytest.approx(math.log1p(farthest**2 / 1e-12), rel=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_seeds_are_within_their_bands(backend):
    wrong = {seed: op.check(seed, [backend]).get(backend, "moved") for seed in range(40)}
    assert {seed: words for seed, words in wrong.items() if words not in ("moved", "boxed")} == {}


def test_a_wrong_factor_is_found(monkeypatch):
    right = fdk.feature_discrepancy_loss
    monkeypatch.setattr(fdk, "feature_discrepancy_loss", lambda *a, **k: right(*a, **k) * (1 + 1e-4))
    found = [words for seed in range(30) for words in op.check(seed, ["reference"]).values()]
    assert sum(words not in ("moved", "boxed") for words in found) > 15
