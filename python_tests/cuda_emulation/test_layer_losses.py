"""The CUDA kernels of layer_losses, run on the CPU, against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import FEATURE_DTYPES
from cuda_emulation.pyramids import (
    LAYOUTS,
    MASK_DTYPES,
    UNIT,
    Outside,
    Pyramid,
    assert_within,
    dtype_name,
    join,
    lay_out,
    make_layer,
    unwritten,
)
from fdkernels import native
from fdkernels.layer_losses.impl import reference as layer_losses
from fdkernels.log_norm.impl import native as log_norm_native
from fdkernels.log_norm.impl import reference as log_norm
from fdkernels.log_norm.options import EXCHANGES, NORMS, REGION_WEIGHTS, Options
from fdkernels.region_sums.geometry import DTYPE_CODES, Geometry
from fdkernels.region_sums.impl import reference as region_sums

PLAIN = Options("valid", False, "vector", 1.0, 1e-12, "none", "mean")


class Forward(NamedTuple):
    """What forward makes."""

    loss: Tensor
    sums: Tensor
    masses: Tensor
    slopes: Tensor


def run_forward(
    emulated: ModuleType,
    pyramid: Pyramid,
    pairing: Tensor | None,
    options: Options,
    with_slopes: bool = True,
) -> Forward:
    """Everything that is written was NaN before and has NaN around it."""
    dtype, batch, layers = pyramid.accumulate, pyramid.batch, len(pyramid.features)
    code = DTYPE_CODES[dtype]
    loss = unwritten((layers,), dtype)
    sums, slopes = (unwritten((2, batch, sum(pyramid.channels)), dtype) for _ in range(2))
    masses = unwritten((2, batch, layers), dtype)
    workspace: list[Outside] = []

    def allocate(size: int) -> int:
        assert size % 4 == 0
        workspace.append(unwritten((size // 4,), torch.float32))
        return workspace[0].tensor.data_ptr()

    pixels = [layer.shape[2:].numel() for layer in pyramid.features]
    emulated.cuda_layer_losses_forward(
        native.forward_words(*pyramid),
        batch,
        code,
        log_norm_native.arguments(sums.tensor, pairing, pyramid.channels, pixels, options),
        *(output.tensor.data_ptr() for output in (sums, masses, loss)),
        slopes.tensor.data_ptr() if with_slopes else 0,
        allocate,
        0,
        0,
    )
    for output in (loss, sums, masses, slopes, *workspace):
        output.assert_untouched()
    return Forward(loss.tensor, sums.tensor, masses.tensor, slopes.tensor)


def run_backward(
    emulated: ModuleType,
    grad_loss: Tensor,
    slopes: Tensor,
    pyramid: Pyramid,
    upstream: Sequence[Tensor | None] = (),
) -> list[Tensor]:
    """The gradients of the features, contiguous."""
    outputs = [unwritten(layer.shape, layer.dtype) for layer in pyramid.features]
    grads = [output.tensor for output in outputs]
    emulated.cuda_layer_losses_backward(
        native.backward_words(grads, pyramid.fg, pyramid.bg, upstream),
        pyramid.batch,
        DTYPE_CODES[slopes.dtype],
        grad_loss.data_ptr(),
        grad_loss.stride(0),
        slopes.data_ptr(),
        0,
        0,
    )
    for output in outputs:
        output.assert_untouched()
    return grads


def check_forward(
    emulated: ModuleType,
    pyramid: Pyramid,
    pairing: Tensor | None,
    options: Options,
) -> Forward:
    """Compares the sums with those of the features, and the rest with what follows from the kernel's sums."""
    features, fg, bg = pyramid.wide()
    got = run_forward(emulated, pyramid, pairing, options)
    u = UNIT[pyramid.accumulate]
    wanted = region_sums.forward(features, fg, bg)
    band = region_sums.forward([layer.abs() for layer in features], fg, bg)
    assert_within(got.sums, wanted[0], 8 * u * band[0], "a sum")
    assert_within(got.masses, wanted[1], 8 * u * band[1], "a mass")

    pixels = [layer.shape[2:].numel() for layer in features]
    wide = (got.sums.double(), got.masses.double(), pairing, pyramid.channels, pixels, options)
    loss = log_norm.forward(*wide)
    slopes, _ = log_norm.backward(torch.ones_like(loss), *wide)
    for name, value, truth in (("a loss", got.loss, loss), ("a slope", got.slopes, slopes)):
        largest = truth.abs().max().item() if truth.numel() else 0.0
        assert_within(value, truth, 1.05 * u * truth.abs() + 1e-10 * largest, name)

    bare = run_forward(emulated, pyramid, pairing, options, with_slopes=False)
    assert torch.equal(bare.loss, got.loss)
    assert torch.equal(bare.sums, got.sums)
    assert bare.slopes.isnan().all()
    return got


def check_backward(
    emulated: ModuleType,
    pyramid: Pyramid,
    slopes: Tensor,
    grad_loss: Tensor,
    upstream: Sequence[Tensor | None],
) -> None:
    grads = run_backward(emulated, grad_loss, slopes, pyramid, upstream)
    _, fg, bg = pyramid.wide()
    geometry = [
        Geometry(layer.shape, layer.contiguous().stride(), torch.float64) for layer in pyramid.features
    ]
    wide = [None if added is None else added.double() for added in upstream]
    size = [None if added is None else added.abs() for added in wide]
    wanted = layer_losses.backward(grad_loss.double(), slopes.double(), fg, bg, wide, geometry)
    band = layer_losses.backward(grad_loss.double().abs(), slopes.double().abs(), fg, bg, size, geometry)
    u = UNIT[pyramid.accumulate]
    for grad, value, terms in zip(grads, wanted, band, strict=True):
        rounding = 1.05 * UNIT[grad.dtype] * value.abs() + torch.finfo(grad.dtype).smallest_normal * 1e-3
        assert_within(grad, value, 5 * u * terms + rounding, "a gradient")


def make_pyramid(batch: int = 5, wide: bool = False, has_bg: bool = True) -> Pyramid:
    """A layer of several tiles, one along channels, a small one; where some can be, a sample is left out."""
    half = torch.float64 if wide else torch.bfloat16
    pyramid = join(
        [
            make_layer((batch, 3, 34, 50), torch.float32, "contiguous", torch.float32, has_bg),
            make_layer((batch, 16, 24, 32), half, "channels_last", torch.float32, has_bg),
            make_layer((batch, 5, 3, 2), torch.float32, "contiguous", torch.uint8, has_bg),
        ]
    )
    if has_bg and batch > 1:
        for weight in (*pyramid.fg, *pyramid.bg):
            weight[1] = 0
        pyramid.fg[2][2] = 0
    return pyramid


def some_pairing(exchange: str) -> Tensor | None:
    """For five samples."""
    pairings = {"shuffle": [3, 0, 0, 4, 1], "pooled": [[0, 1], [2, 3], [-1, -1], [3, 3], [0, 4], [4, 2]]}
    return torch.tensor(pairings[exchange]) if exchange in pairings else None


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("weight", REGION_WEIGHTS)
def test_every_combination_of_options(emulated, weight, norm, exchange):
    for masked_background, reduction, wide in ((False, "mean", False), (True, "sum", True)):
        options = Options(weight, masked_background, norm, 0.5, 1e-6, exchange, reduction)
        check_forward(emulated, make_pyramid(wide=wide), some_pairing(exchange), options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FEATURE_DTYPES, ids=dtype_name)
def test_every_dtype_mask_and_layout(emulated, dtype, layout):
    for shape in ((2, 16, 8, 16), (3, 5, 7, 5)):
        for mask_dtype in MASK_DTYPES:
            for has_bg in (False, True):
                pyramid = make_layer(shape, dtype, layout, mask_dtype, has_bg)
                forward = check_forward(emulated, pyramid, None, PLAIN)
                upstream = [lay_out(torch.randn(shape).to(dtype), layout)]
                grad_loss = torch.randn(1, dtype=forward.loss.dtype)
                check_backward(emulated, pyramid, forward.slopes, grad_loss, upstream)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("batch", "channels"),
    [(0, [2, 3]), (1, [1]), (20, [4]), (2, [2100, 3]), (2, [1 + i % 3 for i in range(19)])],
    ids=["no sample", "one number", "many samples", "many channels", "more layers than a launch takes"],
)
def test_every_size(emulated, launches, batch, channels, norm, exchange):
    pairing = None
    if exchange == "shuffle":
        pairing = torch.randperm(batch)
    elif exchange == "pooled":
        pairing = torch.randint(0, max(batch, 1), (3 if batch else 0, 2))
    pyramid = join(
        [make_layer((batch, C, 3, 4), torch.float32, "contiguous", torch.float32, True) for C in channels]
    )
    launches.count()
    check_forward(emulated, pyramid, pairing, PLAIN._replace(norm=norm, exchange=exchange, eps=1e-3))
    assert launches.count() == 2 * (0 if batch == 0 else 2 * math.ceil(len(channels) / 16))


def test_the_gradient_of_one_number_is_not_copied_for_its_layers(emulated):
    pyramid = make_pyramid()
    slopes = run_forward(emulated, pyramid, None, PLAIN).slopes
    upstream = [None, torch.randn(5, 16, 24, 32).bfloat16(), None]
    check_backward(emulated, pyramid, slopes, torch.tensor(0.7).expand(3), upstream)
    check_backward(emulated, pyramid, slopes, torch.randn(6)[::2], upstream)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("norm", ["vector", "batch"])
def test_the_same_bits_in_any_order_of_blocks(emulated, launches, norm, exchange):
    options = PLAIN._replace(norm=norm, exchange=exchange)
    pyramid, pairing = make_pyramid(), some_pairing(exchange)
    results = []
    for order in (0, -1, 1, 2):
        launches.order(order)
        forward = run_forward(emulated, pyramid, pairing, options)
        results.append([*forward, *run_backward(emulated, torch.ones(3), forward.slopes, pyramid)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("norm", NORMS)
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
    loss = run_forward(emulated, make_pyramid(), torch.tensor(pairing), options).loss
    assert loss.isnan().all()


def test_a_nan_in_the_features_reaches_the_loss_of_its_layer_alone(emulated):
    pyramid = make_pyramid(has_bg=False)
    pyramid.features[1][3, 4, 5, 6] = math.nan
    forward = run_forward(emulated, pyramid, None, PLAIN)
    assert forward.loss.isnan().tolist() == [False, True, False]
    assert forward.sums.isnan().nonzero().tolist() == [[0, 3, 3 + 4], [1, 3, 3 + 4]]


def test_losses_without_reduction_are_refused(emulated):
    with pytest.raises(ValueError, match="reduced to one"):
        run_forward(emulated, make_pyramid(), None, PLAIN._replace(reduction="none"))


@st.composite
def calls(draw: st.DrawFn) -> tuple[Pyramid, Tensor | None, Options, list[Tensor | None]]:
    """The arguments of both directions."""
    N, has_bg = draw(st.integers(1, 4)), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layers, upstream = [], []
    for _ in range(draw(st.integers(1, 4))):
        spatial = draw(st.lists(st.integers(1, 12) | st.sampled_from((16, 40)), min_size=1, max_size=3))
        shape = (N, draw(st.integers(1, 40)), *spatial)
        dtype = draw(st.sampled_from(FEATURE_DTYPES))
        layout, mask = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(MASK_DTYPES))
        layers.append(make_layer(shape, dtype, layout, mask, has_bg))
        upstream.append(torch.randn(shape).to(dtype) if draw(st.booleans()) else None)
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
        norm=draw(st.sampled_from(NORMS)),
        log_scale=draw(st.sampled_from((0.5, 1.0))),
        eps=draw(st.sampled_from((1e-12, 1e-6, 1e-2))),
        exchange=exchange,
        reduction=draw(st.sampled_from(("mean", "sum"))),
    )
    return join(layers), pairing, options, upstream


@settings(max_examples=40, derandomize=True, deadline=None)
@given(call=calls())
def test_any_pyramid_options_and_pairs(emulated, call):
    pyramid, pairing, options, upstream = call
    forward = check_forward(emulated, pyramid, pairing, options)
    # Small next to what is added, as slopes of nearly equal regions can be beyond half precision.
    slopes = forward.slopes / forward.slopes.abs().max().clamp(min=1)
    check_backward(emulated, pyramid, slopes, torch.randn_like(forward.loss), upstream)
