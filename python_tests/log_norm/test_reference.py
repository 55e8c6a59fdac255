"""The reference of log_norm, the specification: numbers by hand, and backward as derivative of forward."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

from cases import Sums, sums
from fdkernels import CONVENTIONS
from fdkernels.log_norm import Options
from fdkernels.log_norm.impl import reference

# One layer of two channels and two samples. S_fg = (3, 1), (2, 2); S_bg = (1, 0), (0, 1).
SUMS = torch.tensor([[[3.0, 1.0], [2.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
MASSES = torch.tensor([[[1.0], [2.0]], [[3.0], [2.0]]], dtype=torch.float64)
PLAIN = Options("none", False, "vector", 1.0, 0.0, "none", "none")


def loss(options: Options, pairing: torch.Tensor | None = None) -> list[float]:
    return reference.forward(SUMS, MASSES, pairing, [2], [8], options).flatten().tolist()


@pytest.mark.parametrize(
    ("weight", "wanted"),
    [
        # f - b = (2, 1) and (2, 1)
        ("none", [5, 5]),
        # divided by V = 4 and 4
        ("valid", [5 / 16, 5 / 16]),
        # (3, 1) - (1/3, 0) and (1, 1) - (0, ½)
        ("region", [64 / 9 + 1, 1.25]),
        # divided by P = 8
        ("pixels", [5 / 64, 5 / 64]),
    ],
)
def test_region_weights_by_hand(weight, wanted):
    got = loss(PLAIN._replace(region_weight=weight))
    assert got == pytest.approx([-math.log(D) for D in wanted])


@pytest.mark.parametrize(
    ("norm", "wanted"),
    [
        ("vector", [5, 5]),
        # Φ - Β = 4 - 1 and 4 - 1
        ("channel_sum", [9, 9]),
        ("relative", [9 / 25, 9 / 25]),
        # for each channel 2² + 2² and 1² + 1²
        ("batch", [8, 2]),
    ],
)
def test_norms_by_hand(norm, wanted):
    assert loss(PLAIN._replace(norm=norm)) == pytest.approx([-math.log(D) for D in wanted])


def test_masked_background_by_hand():
    # S_bg is replaced by M_fg - S_fg = (-2, 0) and (0, 0): f - b = (5, 1) and (2, 2)
    got = loss(PLAIN._replace(masked_background=True))
    assert got == pytest.approx([-math.log(26), -math.log(8)])


def test_epsilon_and_scale_by_hand():
    assert loss(PLAIN._replace(eps=3.0, log_scale=0.5)) == pytest.approx([-math.log(8) / 2] * 2)
    # with the relative norm ε stands in the denominator as well: 9 / (25 + 2) + 2
    got = loss(PLAIN._replace(norm="relative", eps=2.0))
    assert got == pytest.approx([-math.log(9 / 27 + 2)] * 2)


def test_a_sample_may_be_its_own_partner():
    own = loss(PLAIN)
    got = loss(PLAIN._replace(exchange="shuffle"), torch.tensor([0, 1]))
    assert got == pytest.approx([2 * entry for entry in own])


def test_pairs_with_a_negative_sample_do_not_count():
    # f[0] - b[1] = (3, 0) and f[1] - b[0] = (1, 2): 9 + 5
    pairs = torch.tensor([[-1, -1], [0, 1], [-1, 1]])
    got = loss(PLAIN._replace(exchange="pooled"), pairs)
    assert got == pytest.approx([-math.log(5) - math.log(14)] * 2)


@given(sums(dtypes=(torch.float64,)))
def test_backward_is_the_derivative_of_forward(case: Sums):
    convention = CONVENTIONS[case.convention]
    options = Options(
        convention.region_weight,
        convention.masked_background,
        convention.norm,
        convention.log_scale,
        case.eps,
        case.exchange,
        case.reduction,
    )
    S, M = case.tensors()
    arguments = (case.pairing, case.channels, case.pixels, options)
    value = reference.forward(S, M, *arguments)
    upstream = torch.randn_like(value)
    wanted = torch.autograd.grad(value, (S, M), upstream, allow_unused=True, materialize_grads=True)
    for got, truth in zip(reference.backward(upstream, S, M, *arguments), wanted, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-12)
