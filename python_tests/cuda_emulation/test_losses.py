"""The CUDA kernels of losses and slopes, run on the CPU, against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import FEATURE_DTYPES
from cuda_emulation.build import Emulation
from cuda_emulation.calls import run_losses, run_sums
from cuda_emulation.pyramids import (
    LAYOUTS,
    MASK_DTYPES,
    UNIT,
    Inputs,
    assert_within,
    dtype_name,
    join,
    make_layer,
)
from fdkernels.conventions import EXCHANGES, KERNEL_NORMS, REGION_WEIGHTS, Options
from fdkernels.op import reference
from fdkernels.op.pyramid import Pyramid, Sums, describe

PLAIN = Options("valid", False, "vector", 1.0, 1e-12, "none", "mean")


def check(emulated: Emulation, inputs: Inputs, pairing: Tensor | None, options: Options) -> Sums:
    """Compares losses and slopes with what follows from the kernel's sums, and the ways to get them."""
    got = run_sums(emulated, inputs, options, pairing)
    check_values(got.losses, got.slopes, got.sums, got.masses, inputs.pyramid, options, pairing)

    bare = run_sums(emulated, inputs)
    assert torch.equal(bare.sums.nan_to_num(), got.sums.nan_to_num())
    assert torch.equal(bare.masses, got.masses)
    without_slopes = run_sums(emulated, inputs, options, pairing, with_slopes=False)
    losses, slopes = run_losses(emulated, got.sums, got.masses, inputs.pyramid, options, pairing)
    assert torch.equal(without_slopes.losses, got.losses)
    assert torch.equal(losses, got.losses)
    assert torch.equal(slopes, got.slopes)
    return got


def check_values(
    losses: Tensor,
    slopes: Tensor,
    sums: Tensor,
    masses: Tensor,
    pyramid: Pyramid,
    options: Options,
    pairing: Tensor | None,
) -> None:
    """The kernels compute in double, only their results are rounded."""
    wanted = reference.losses(sums.double(), masses.double(), pyramid, options, pairing)
    u = UNIT[sums.dtype]
    for name, value, truth in zip(("a loss", "a slope"), (losses, slopes), wanted, strict=True):
        assert value.shape == truth.shape
        largest = truth.abs().max().item() if truth.numel() else 0.0
        assert_within(value, truth, 1.05 * u * truth.abs() + 1e-10 * largest, name)


def make_inputs(batch: int = 5, wide: bool = False, has_bg: bool = True) -> Inputs:
    """A layer of several tiles, one along channels, a small one; with `has_bg` one sample does not count."""
    half = torch.float64 if wide else torch.bfloat16
    inputs = join(
        [
            make_layer((batch, 3, 34, 50), torch.float32, "contiguous", torch.float32, has_bg),
            make_layer((batch, 16, 24, 32), half, "channels_last", torch.float32, has_bg),
            make_layer((batch, 5, 3, 2), torch.float32, "contiguous", torch.uint8, has_bg),
        ]
    )
    if has_bg and batch > 1:
        fg, bg = inputs.weights
        for weight in (*fg, *bg):
            weight[1] = 0
        fg[2][2] = 0
    return inputs


def some_pairing(exchange: str) -> Tensor | None:
    """For five samples."""
    pairings = {"shuffle": [3, 0, 0, 4, 1], "pooled": [[0, 1], [2, 3], [-1, -1], [3, 3], [0, 4], [4, 2]]}
    return torch.tensor(pairings[exchange]) if exchange in pairings else None


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("norm", KERNEL_NORMS)
@pytest.mark.parametrize("weight", REGION_WEIGHTS)
def test_every_combination_of_options(emulated, weight, norm, exchange):
    for masked_background, reduction, wide in ((False, "mean", False), (True, "sum", True)):
        options = Options(weight, masked_background, norm, 0.5, 1e-6, exchange, reduction)
        check(emulated, make_inputs(wide=wide), some_pairing(exchange), options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FEATURE_DTYPES, ids=dtype_name)
def test_every_dtype_mask_and_layout(emulated, dtype, layout):
    for shape in ((2, 16, 8, 16), (3, 5, 7, 5)):
        for mask_dtype in MASK_DTYPES:
            for has_bg in (False, True):
                check(emulated, make_layer(shape, dtype, layout, mask_dtype, has_bg), None, PLAIN)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("norm", KERNEL_NORMS)
@pytest.mark.parametrize(
    ("batch", "channels"),
    [(0, [2, 3]), (1, [1]), (20, [4]), (2, [2100, 3]), (2, [1 + i % 3 for i in range(19)])],
    ids=["no sample", "one number", "many samples", "many channels", "more layers than a launch takes"],
)
def test_every_size_and_its_launches(emulated, launches, batch, channels, norm, exchange):
    pairing = None
    if exchange == "shuffle":
        pairing = torch.randperm(batch)
    elif exchange == "pooled":
        pairing = torch.randint(0, max(batch, 1), (3 if batch else 0, 2))
    options = PLAIN._replace(norm=norm, exchange=exchange, eps=1e-3)
    inputs = join(
        [make_layer((batch, C, 3, 4), torch.float32, "contiguous", torch.float32, True) for C in channels]
    )
    of_layers = 0 if batch == 0 else math.ceil(len(channels) / 16)
    got = check(emulated, inputs, pairing, options)
    launches.count()
    run_sums(emulated, inputs, options, pairing)
    assert launches.count() == 2 * of_layers
    run_losses(emulated, got.sums, got.masses, inputs.pyramid, options, pairing)
    assert launches.count() == of_layers


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("norm", ["vector", "batch"])
def test_the_same_bits_in_any_order_of_blocks(emulated, launches, norm, exchange):
    options = PLAIN._replace(norm=norm, exchange=exchange)
    inputs, pairing = make_inputs(), some_pairing(exchange)
    results = []
    for order in (0, 0, -1, 1, 2):
        launches.order(order)
        got = run_sums(emulated, inputs, options, pairing)
        alone = run_losses(emulated, got.sums, got.masses, inputs.pyramid, options, pairing)
        results.append([*got[:4], *alone])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("norm", KERNEL_NORMS)
@pytest.mark.parametrize(
    ("exchange", "pairing"),
    [
        ("shuffle", [1, 0, 7, 2, 3]),
        ("shuffle", [1, 0, -1, 2, 3]),
        ("pooled", [[0, 2], [2, 9], [-1, 3]]),
        ("pooled", [[8, 9]]),
    ],
    ids=["shuffle beyond", "shuffle negative", "pooled beyond", "pooled both beyond"],
)
def test_pairs_out_of_range_give_nan(emulated, exchange, pairing, norm):
    options = PLAIN._replace(norm=norm, exchange=exchange)
    got = run_sums(emulated, make_inputs(), options, torch.tensor(pairing))
    assert got.losses.isnan().all()
    if pairing[0] != [8, 9]:
        assert got.slopes[1, 2].isnan().all()


def test_a_nan_in_the_features_reaches_the_loss_of_its_layer_alone(emulated):
    inputs = make_inputs(has_bg=False)
    inputs.features[1][3, 4, 5, 6] = math.nan
    got = run_sums(emulated, inputs, PLAIN)
    assert got.losses.isnan().tolist() == [False, True, False]
    assert got.sums.isnan().nonzero().tolist() == [[0, 3, 3 + 4], [1, 3, 3 + 4]]


def test_a_shuffle_without_a_partner_for_each_sample_is_refused(emulated):
    options = PLAIN._replace(exchange="shuffle")
    for pairing in (None, torch.tensor([1, 0])):
        with pytest.raises(ValueError, match="one sample for each sample"):
            run_sums(emulated, make_inputs(), options, pairing)


def make_sums(
    batch: int, channels: Sequence[int], dtype: torch.dtype, empty: Sequence[tuple[int, int, str]] = ()
) -> tuple[Tensor, Tensor]:
    """Sums [2, N, ΣC] and masses [2, N, L]; `empty` lists samples, layers and which region is empty."""
    sums = torch.randn(2, batch, sum(channels), dtype=torch.float64) + 0.3
    masses = torch.rand(2, batch, len(channels), dtype=torch.float64) * 10 + 0.1
    for n, layer, region in empty:
        start = sum(channels[:layer])
        for k, name in enumerate(("fg", "bg")):
            if region in (name, "both"):
                masses[k, n, layer] = 0
                sums[k, n, start : start + channels[layer]] = 0
    return sums.to(dtype), masses.to(dtype)


def make_pyramid(channels: Sequence[int], pixels: Sequence[int]) -> Pyramid:
    """Of one sample: sums may come from more of them."""
    return describe([torch.empty(1, C, P, device="meta") for C, P in zip(channels, pixels, strict=True)])


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("norm", KERNEL_NORMS)
@pytest.mark.parametrize("weight", REGION_WEIGHTS)
def test_empty_regions_under_every_combination_of_options(emulated, weight, norm, exchange):
    pairing, pyramid = some_pairing(exchange), make_pyramid((7, 33), (49, 1))
    for masked_background, reduction, dtype in (
        (False, "mean", torch.float32),
        (True, "sum", torch.float64),
        (False, "sum", torch.float64),
    ):
        S, M = make_sums(5, (7, 33), dtype, [(1, 0, "both"), (2, 0, "fg"), (3, 1, "bg")])
        options = Options(weight, masked_background, norm, 0.5, 1e-6, exchange, reduction)
        losses, slopes = run_losses(emulated, S, M, pyramid, options, pairing)
        check_values(losses, slopes, S, M, pyramid, options, pairing)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("norm", KERNEL_NORMS)
def test_samples_that_do_not_count_have_neither_loss_nor_slopes(emulated, norm, exchange):
    pairings = {"shuffle": [1, 2, 0], "pooled": [[0, 1], [1, 2]]}
    pairing = torch.tensor(pairings[exchange]) if exchange in pairings else None
    options, pyramid = PLAIN._replace(norm=norm, exchange=exchange), make_pyramid([5], [4])
    for empty in ([(1, 0, "both")], [(n, 0, "both") for n in range(3)]):
        S, M = make_sums(3, [5], torch.float64, empty)
        losses, slopes = run_losses(emulated, S, M, pyramid, options, pairing)
        check_values(losses, slopes, S, M, pyramid, options, pairing)
        for n, _, _ in empty:
            assert (slopes[:, n] == 0).all()
        assert len(empty) < 3 or losses.tolist() == [0]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("norm", KERNEL_NORMS)
@pytest.mark.parametrize(
    ("batch", "channels"),
    [(0, [2, 3]), (1, [1]), (20, [4]), (2, [2100, 3]), (2, [1 + i % 3 for i in range(66)])],
    ids=["no sample", "one number", "many samples", "many channels", "more layers than a launch takes"],
)
def test_given_sums_of_every_size(emulated, batch, channels, norm, exchange):
    pairing = None
    if exchange == "shuffle":
        pairing = torch.randperm(batch)
    elif exchange == "pooled":
        pairing = torch.randint(0, max(batch, 1), (3 if batch else 0, 2))
    S, M = make_sums(batch, channels, torch.float32)
    options, pyramid = (
        PLAIN._replace(norm=norm, exchange=exchange),
        make_pyramid(channels, [9] * len(channels)),
    )
    losses, slopes = run_losses(emulated, S, M, pyramid, options, pairing)
    check_values(losses, slopes, S, M, pyramid, options, pairing)


@pytest.mark.parametrize("exchange", ["none", "shuffle"])
@pytest.mark.parametrize("norm", KERNEL_NORMS)
def test_a_nan_in_the_sums_reaches_loss_and_slopes(emulated, norm, exchange):
    S, M = make_sums(3, [4], torch.float32)
    S[:, 1, 2] = math.nan
    options, pyramid = PLAIN._replace(norm=norm, exchange=exchange), make_pyramid([4], [9])
    pairing = torch.tensor([2, 1, 0]) if exchange == "shuffle" else None
    losses, slopes = run_losses(emulated, S, M, pyramid, options, pairing)
    assert losses.isnan().all()
    assert slopes[:, 1, 2].isnan().all()
    assert slopes[:, 0].isfinite().sum() == (6 if norm == "batch" else 8)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Inputs, Tensor | None, Options]:
    """Layers, pairs and options."""
    N, has_bg = draw(st.integers(1, 4)), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        spatial = draw(st.lists(st.integers(1, 12) | st.sampled_from((16, 40)), min_size=1, max_size=3))
        shape = (N, draw(st.integers(1, 40)), *spatial)
        dtype, layout = draw(st.sampled_from(FEATURE_DTYPES)), draw(st.sampled_from(LAYOUTS))
        layers.append(make_layer(shape, dtype, layout, draw(st.sampled_from(MASK_DTYPES)), has_bg))
    exchange, samples = draw(st.sampled_from(EXCHANGES)), st.integers(0, N - 1)
    pairing = None
    if exchange == "shuffle":
        pairing = torch.tensor(draw(st.lists(samples, min_size=N, max_size=N)))
    elif exchange == "pooled":
        ends = st.tuples(st.integers(-1, N - 1), st.integers(-1, N - 1))
        pairing = torch.tensor(draw(st.lists(ends, max_size=5)), dtype=torch.int64).reshape(-1, 2)
    options = Options(
        region_weight=draw(st.sampled_from(REGION_WEIGHTS)),
        masked_background=draw(st.booleans()),
        norm=draw(st.sampled_from(KERNEL_NORMS)),
        log_scale=draw(st.sampled_from((0.5, 1.0))),
        eps=draw(st.sampled_from((1e-12, 1e-6, 1e-2))),
        exchange=exchange,
        reduction=draw(st.sampled_from(("mean", "sum"))),
    )
    return join(layers), pairing, options


@settings(max_examples=40, derandomize=True, deadline=None)
@given(call=calls())
def test_any_pyramid_options_and_pairs(emulated, call):
    check(emulated, *call)
