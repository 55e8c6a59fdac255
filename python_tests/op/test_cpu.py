"""The C++ CPU kernels where their own structure decides: tiles, vector tails, threads, values of masks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fdkernels as fdk
from cases import FEATURE_DTYPES, lay_out
from fdkernels.op.kernels import kernels_of
from fdkernels.op.pyramid import Regions, Weights, describe
from oracles import unit

pytestmark = [
    pytest.mark.skipif(fdk.backends()["cpu"] is not None, reason=f"backend 'cpu': {fdk.backends()['cpu']}"),
    pytest.mark.usefixtures("nan_filled"),
]

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check(features: Tensor, mask: Tensor, upstream: bool = False) -> None:
    """Sums and gradients against float64, for a mask of the features' size."""
    features = features.detach().requires_grad_()
    F = features.detach().double().flatten(2)
    w = mask.double().flatten(1).unsqueeze(1)
    u = unit(features.dtype)
    accumulate = torch.float64 if features.dtype == torch.float64 else torch.float32

    sums = fdk.region_sums(features, mask, backend="cpu")
    for got, weight in ((sums.fg, w), (sums.bg, 1 - w)):
        error = (got.detach().double() - (weight * F).sum(-1)).abs()
        assert (error <= u * (weight * F).abs().sum(-1)).all()
    g = torch.randn(2, *sums.fg.shape, dtype=accumulate)
    (grad,) = torch.autograd.grad((sums.fg, sums.bg), features, (g[0], g[1]))
    wanted = g[0].double().unsqueeze(-1) * w + g[1].double().unsqueeze(-1) * (1 - w)
    kind = torch.finfo(features.dtype)
    assert (grad.flatten(2).double() - wanted).abs().max() <= (4 * u + kind.eps / 2) * wanted.abs().max()
    assert grad.dtype == features.dtype


# Each side of the limits at which the kernels start a new tile, run or vector: 64 pixels, 256 elements of a
# run, 65536 elements of a tile, 1024 channels of a tile.
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 65537),
        (2, 3, 257, 255),
        (1, 5, 1, 16385),
        (1, 1025, 65),
        (1, 2049, 3, 3),
        (3, 17, 31, 33),
        (1, 4, 128, 129),
        (2, 1, 1, 1),
        (1, 6, 11, 13, 17),
    ],
    ids=lambda shape: "x".join(map(str, shape)),
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_sizes_around_tiles_and_vectors(shape, layout):
    features = lay_out(torch.randn(shape), layout)
    check(features, torch.rand(shape[0], *shape[2:]) > 0.3)


@pytest.mark.parametrize("dtype", FEATURE_DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_every_dtype_over_several_tiles(dtype, layout, soft):
    features = lay_out(torch.randn(2, 37, 61, 67).to(dtype), layout)
    mask = torch.rand(2, 61, 67)
    check(features, mask if soft else mask > 0.5)


@given(
    st.integers(1, 70),
    st.integers(1, 300),
    st.sampled_from(("contiguous", "channels_last")),
    st.sampled_from(FEATURE_DTYPES),
    st.integers(0, 3),
)
def test_any_number_of_channels_and_pixels_at_any_address(C, P, layout, dtype, offset):
    values = lay_out(torch.randn(2, C, P).to(dtype), layout)
    room = torch.empty(values.numel() + offset, dtype=dtype)[offset:]
    features = room.as_strided(values.shape, values.stride(), offset).copy_(values)
    check(features, torch.rand(2, P))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_the_number_of_threads_does_not_change_a_bit(layout):
    layers = [lay_out(torch.randn(2, c, s, s), layout) for c, s in ((8, 130), (300, 17), (3, 5))]
    layers = [layer.detach().requires_grad_() for layer in layers]
    mask = torch.rand(2, 130, 130, requires_grad=True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            sums = fdk.region_sums(layers, mask, mask_resize="nearest", backend="cpu")
            loss = sum((part.fg * part.bg).sum() for part in sums)
            values = [value for part in sums for value in part]
            results.append([*values, *torch.autograd.grad(loss, (*layers, mask))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("count", [3, 40])
def test_the_number_of_threads_does_not_change_a_bit_of_several_regions(layout, count):
    layers = [lay_out(torch.randn(2, c, s, s), layout) for c, s in ((8, 130), (300, 17), (3, 5))]
    pyramid, kernels = describe(layers), kernels_of("cpu")
    weights = [torch.rand(2, count, layer.shape[2:].numel()) for layer in layers]
    regions = Regions(weights, False, torch.randn(count, 2, pyramid.total_channels))
    g = torch.randn(2 * count, 2, pyramid.total_channels)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(
                [
                    *kernels.region_sums(layers, regions, pyramid),
                    *kernels.region_gradient(g, regions, layers, [], pyramid),
                    *kernels.region_weight_gradient(g, regions, layers),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


WEIGHTS = {
    "binary": torch.tensor([0.0, 1.0]),
    "soft": torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]),
    "soft with NaN": torch.tensor([0.0, 0.5, 1.0, math.nan]),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("ignore", [False, True], ids=["implied", "ignore"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(2, 3, 4113), (2, 64, 37), (1, 19, 300), (1, 16, 5)], ids=str)
def test_gradients_of_16_bits_are_rounded_to_nearest_even(shape, dtype, layout, ignore, kind):
    """Bit for bit: g and the weights are such that g_fg w + g_bg u is exact in float32, ties among them."""
    N, C, P = shape
    values = WEIGHTS[kind]
    fg = values[torch.randint(len(values), (N, P))]
    bg = torch.where(torch.rand(N, P) > 0.3, 1 - fg, 0.0) if ignore else 1 - fg
    fg = torch.where(bg == 0, torch.where(torch.rand(N, P) > 0.5, fg, 0.0), fg) if ignore else fg
    g = torch.randint(-2048, 2048, (2, N, C)) / 1024
    if C > 16:
        g[:, 0, 1] = math.inf
        g[0, 0, 2], g[1, 0, 3] = math.nan, -math.inf
    wanted = g[0].unsqueeze(-1) * fg.unsqueeze(1) + g[1].unsqueeze(-1) * bg.unsqueeze(1)
    if ignore:  # (R3): what has no weight has no gradient, whatever g is
        wanted = torch.where(((fg == 0) & (bg == 0)).unsqueeze(1), 0.0, wanted)

    pyramid = describe([lay_out(torch.empty(shape, dtype=dtype), layout)])
    weights = Weights([fg], [bg] if ignore else [])
    (grad,) = kernels_of("cpu").gradient(g, None, weights, [], pyramid)
    assert torch.equal(grad.isnan(), wanted.isnan())
    assert torch.equal(grad.nan_to_num(), wanted.to(dtype).nan_to_num())


def test_upstream_of_zero_stride_is_added():
    features = torch.randn(2, 5, 9, 7, requires_grad=True)
    mask = torch.rand(2, 9, 7) > 0.5
    out, loss = fdk.tap(features, mask, backend="cpu")
    (alone,) = torch.autograd.grad(loss, features, retain_graph=True)
    (both,) = torch.autograd.grad((loss, out), features, (torch.ones(()), torch.ones(1).expand(out.shape)))
    torch.testing.assert_close(both, alone + 1)


def is_valid(mask: Tensor, ignore_index: float) -> bool:
    from fdkernels.op import cpu

    return cpu.mask_check(mask, ignore_index)(mask)


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("ignore_index", [None, 1, 7])
@pytest.mark.parametrize("how", ["area", "max", "nearest"])
@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "transposed"])
def test_the_full_size_holds_the_pixels_as_they_are(dtype, ignore_index, how, turned):
    values = torch.randint(2, (3, 1, 33, 70)).to(dtype)
    if dtype.is_floating_point:
        values = (torch.rand(3, 1, 33, 70)).to(dtype)
        values[:, :, ::3] = 1
    if ignore_index == 7 and dtype != torch.bool:
        values[:, :, ::2, ::5] = 7
    mask = values.mT.contiguous().mT if turned else values
    fg, bg = kernels_of("cpu").masks(mask, [mask.shape[2:]], torch.float32, how, ignore_index)
    y, valid = values.double().flatten(1), torch.ones(3, 33 * 70)
    if ignore_index is not None:
        valid = (values != ignore_index).double().flatten(1)
    torch.testing.assert_close(fg[0].double(), y * valid, rtol=1e-6, atol=0)
    if ignore_index is not None:
        torch.testing.assert_close(bg[0].double(), (1 - y) * valid, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", INTEGERS[1:] + FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "transposed"])
def test_one_pixel_of_another_value_is_seen(dtype, turned):
    mask = torch.randint(2, (2, 1, 19, 300)).to(dtype)
    mask[0, 0, 3, 5] = 9
    mask = mask.mT.contiguous().mT if turned else mask
    assert is_valid(mask, 9)
    assert not is_valid(mask, 8)
    wrong = [2, 8] if dtype == torch.uint8 else [2, -1]
    if dtype.is_floating_point:
        wrong += [1.25, -0.25, math.nan, math.inf]
    for value in wrong:
        bad = mask.clone()
        bad[1, 0, 18, 299] = value
        assert not is_valid(bad, 9), value


def test_soft_values_are_valid():
    assert is_valid(torch.rand(2, 1, 5, 5), 255)
    assert is_valid(torch.zeros(2, 1, 5, 5, dtype=torch.bool), 1)
