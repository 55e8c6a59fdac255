"""The CUDA kernels of log_norm, run on the CPU, against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fdkernels.log_norm.impl import native, reference
from fdkernels.log_norm.options import EXCHANGES, NORMS, REDUCTIONS, REGION_WEIGHTS, Options

pytestmark = pytest.mark.usefixtures("nan_filled")


def run(
    emulated: ModuleType,
    sums: Tensor,
    masses: Tensor,
    pairing: Tensor | None,
    channels: Sequence[int],
    pixels: Sequence[int],
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, the gradients of sums and masses, and the gradient of the loss from which these are."""
    words = native.arguments(sums, pairing, channels, pixels, options)
    loss = native.empty_loss(sums, len(channels), options)
    emulated.cuda_log_norm_forward(words, sums.data_ptr(), masses.data_ptr(), loss.data_ptr(), 0, 0)
    grad_loss = torch.randn(loss.shape, dtype=loss.dtype)
    grad_sums, grad_masses = torch.empty_like(sums), torch.empty_like(masses)
    tensors = (grad_loss, sums, masses, grad_sums, grad_masses)
    emulated.cuda_log_norm_backward(words, *(tensor.data_ptr() for tensor in tensors), 0, 0)
    return loss, grad_sums, grad_masses, grad_loss


def check(
    emulated: ModuleType,
    sums: Tensor,
    masses: Tensor,
    pairing: Tensor | None,
    channels: Sequence[int],
    pixels: Sequence[int],
    options: Options,
) -> list[Tensor]:
    """Compares loss and gradients; the kernels compute in double, only their results are rounded."""
    *got, grad_loss = run(emulated, sums, masses, pairing, channels, pixels, options)
    wide = (sums.double(), masses.double(), pairing, channels, pixels, options)
    wanted = (reference.forward(*wide), *reference.backward(grad_loss.double(), *wide))
    unit = torch.finfo(sums.dtype).eps / 2
    # Of what is added up: the gradients of masses are sums of those of sums, and may cancel.
    terms = (wanted[0], wanted[1], (wanted[1] * sums).abs().sum(-1))
    for name, value, truth, added in zip(
        ("loss", "grad_sums", "grad_masses"), got, wanted, terms, strict=True
    ):
        assert value.shape == truth.shape
        assert value.dtype == sums.dtype
        largest = max((x.abs().max().item() for x in (truth, added) if x.numel()), default=0.0)
        error = (value.double() - truth).abs()
        assert (error <= 1.05 * unit * truth.abs() + 1e-10 * largest).all(), (
            f"{name}: {value}, wanted {truth}"
        )
    return got


def make(
    batch: int, channels: Sequence[int], dtype: torch.dtype, left_out: Sequence[tuple[int, int, str]] = ()
) -> tuple[Tensor, Tensor]:
    """Sums [2, N, ΣC] and masses [2, N, L]; `left_out` lists samples, layers and which region is empty."""
    sums = torch.randn(2, batch, sum(channels), dtype=torch.float64) + 0.3
    masses = torch.rand(2, batch, len(channels), dtype=torch.float64) * 10 + 0.1
    for n, layer, region in left_out:
        start = sum(channels[:layer])
        for k, name in enumerate(("fg", "bg")):
            if region in (name, "both"):
                masses[k, n, layer] = 0
                sums[k, n, start : start + channels[layer]] = 0
    return sums.to(dtype), masses.to(dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("weight", REGION_WEIGHTS)
def test_every_combination_of_options(emulated, weight, norm, exchange, reduction):
    pairings = {"shuffle": [3, 0, 0, 4, 1], "pooled": [[0, 1], [2, 3], [-1, -1], [3, 3], [0, 4]]}
    pairing = torch.tensor(pairings[exchange]) if exchange in pairings else None
    left_out = [(1, 0, "both"), (2, 0, "fg"), (3, 1, "bg")]
    channels, pixels = (7, 33), (49, 1)
    for masked_background, dtype in ((False, torch.float32), (True, torch.float64)):
        S, M = make(5, channels, dtype, left_out)
        options = Options(weight, masked_background, norm, 0.5, 1e-6, exchange, reduction)
        check(emulated, S, M, pairing, channels, pixels, options)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("norm", NORMS)
def test_samples_that_are_left_out_have_neither_loss_nor_gradient(emulated, norm, exchange):
    pairings = {"shuffle": [1, 2, 0], "pooled": [[0, 1], [1, 2]]}
    pairing = torch.tensor(pairings[exchange]) if exchange in pairings else None
    for left_out in ([(1, 0, "both")], [(n, 0, "both") for n in range(3)]):
        S, M = make(3, [5], torch.float64, left_out)
        options = Options("valid", False, norm, 1.0, 1e-12, exchange, "none")
        loss, grad_sums, grad_masses = check(emulated, S, M, pairing, [5], [4], options)
        for n, _, _ in left_out:
            assert (grad_sums[:, n] == 0).all()
            assert (grad_masses[:, n] == 0).all()
            assert norm == "batch" or loss[n].item() == 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("exchange", "pairing"),
    [("shuffle", [1, 0, 7, 2]), ("shuffle", [1, 0, -1, 2]), ("pooled", [[0, 1], [2, 9], [-1, 3]])],
    ids=["shuffle beyond", "shuffle negative", "pooled beyond"],
)
def test_pairs_out_of_range_give_nan(emulated, exchange, pairing, norm):
    S, M = make(4, [5], torch.float32)
    options = Options("valid", False, norm, 1.0, 1e-12, exchange, "none")
    loss, grad_sums, _, _ = run(emulated, S, M, torch.tensor(pairing), [5], [9], options)
    if norm == "batch" or exchange == "pooled":  # which share the logarithm or the mean
        assert loss.isnan().all()
    else:
        assert loss[:, 0].isnan().tolist() == [False, False, True, False]
    assert grad_sums[1, 2].isnan().all()


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("batch", "channels"),
    [(0, [2, 3]), (1, [1]), (20, [4]), (2, [2100, 3]), (2, [1 + i % 3 for i in range(66)])],
    ids=[
        "no sample",
        "one number",
        "more samples than warps",
        "many channels",
        "more layers than a launch takes",
    ],
)
def test_every_size(emulated, batch, channels, norm, exchange):
    pairing = None
    if exchange == "shuffle":
        pairing = torch.randperm(batch)
    elif exchange == "pooled":
        pairing = torch.randint(0, max(batch, 1), (3 if batch else 0, 2))
    S, M = make(batch, channels, torch.float32)
    for reduction in ("none", "mean"):
        options = Options("valid", False, norm, 1.0, 1e-3, exchange, reduction)
        check(emulated, S, M, pairing, channels, [9] * len(channels), options)


def test_the_same_bits_twice(emulated):
    S, M = make(7, [300, 5], torch.float32)
    pairing = torch.tensor([[0, 1], [2, 3], [0, 4], [5, 6], [5, 6]])
    options = Options("valid", False, "vector", 1.0, 1e-12, "pooled", "mean")
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(run(emulated, S, M, pairing, [300, 5], [64, 16], options))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("exchange", ["none", "shuffle"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_nan_in_the_sums_reaches_the_loss(emulated, norm, exchange):
    S, M = make(3, [4], torch.float32)
    S[:, 1, 2] = math.nan
    options = Options("valid", False, norm, 1.0, 1e-12, exchange, "none")
    pairing = torch.tensor([2, 1, 0]) if exchange == "shuffle" else None
    loss, grad_sums, _, _ = run(emulated, S, M, pairing, [4], [9], options)
    wanted = [False, False, True, False] if norm == "batch" else [[False], [True], [False]]
    assert loss.isnan().tolist() == wanted
    assert grad_sums[:, 1, 2].isnan().all()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, list[int], list[int], Options]:
    """The arguments of both directions."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch = draw(st.integers(1, 6))
    channels = draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    regions = st.sampled_from(("fg", "bg", "both"))
    samples, layers = st.integers(0, batch - 1), st.integers(0, len(channels) - 1)
    left_out = draw(st.lists(st.tuples(samples, layers, regions), max_size=batch))
    exchange = draw(st.sampled_from(EXCHANGES))
    pairing = None
    if exchange == "shuffle":
        pairing = torch.tensor(draw(st.lists(samples, min_size=batch, max_size=batch)))
    elif exchange == "pooled":
        ends = st.integers(-1, batch - 1)
        pairs = draw(st.lists(st.tuples(ends, ends), max_size=5))
        pairing = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    options = Options(
        region_weight=draw(st.sampled_from(REGION_WEIGHTS)),
        masked_background=draw(st.booleans()),
        norm=draw(st.sampled_from(NORMS)),
        log_scale=draw(st.sampled_from((0.5, 1.0))),
        eps=draw(st.sampled_from((1e-12, 1e-6, 1e-2))),
        exchange=exchange,
        reduction=draw(st.sampled_from(REDUCTIONS)),
    )
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    pixels = [draw(st.integers(1, 99)) for _ in channels]
    return *make(batch, channels, dtype, left_out), pairing, channels, pixels, options


@settings(max_examples=60, derandomize=True, deadline=None)
@given(arguments=cases())
def test_any_options_pairs_and_sizes(emulated, arguments):
    check(emulated, *arguments)
