"""`gradient` of every backend, the one write of backward, against float64 truth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import ALL_LAYOUTS, FEATURE_DTYPES, WEIGHT_KINDS, Case, cases, lay_out, weights_for
from fdkernels.op.kernels import kernels_of
from fdkernels.op.pyramid import Layer, Pyramid, Weights, accumulate_dtype, describe
from oracles import assert_within, sums_gradients, unit

pytestmark = pytest.mark.usefixtures("nan_filled")


def truth(
    layer: Layer, w_fg: Tensor, w_bg: Tensor | None, g: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of a layer [N, C, *S], and what its absolute summands add up to."""
    added = torch.zeros(layer.shape) if added is None else added.detach().cpu().double()
    weights = [w_fg.cpu(), None if w_bg is None else w_bg.cpu()]
    zeros = torch.zeros(layer.shape, dtype=torch.float64)
    grad, size = (sums_gradients(zeros, *weights, of.cpu().double())[0] for of in (g, g.abs()))
    return grad + added, size + added.abs()


def check(
    backend: str,
    pyramid: Pyramid,
    weights: Weights,
    upstream: Sequence[Tensor | None],
    ulps: float,
    factor: Tensor | None = None,
) -> None:
    """The gradients of all layers, for random g, are those of the formula."""
    batch, device = pyramid.layers[0].shape[0], weights.fg[0].device
    g = torch.randn(2, batch, sum(pyramid.channels), dtype=pyramid.dtype, device=device)
    grads = kernels_of(backend).gradient(g, factor, weights, upstream, pyramid)
    assert len(grads) == len(pyramid.layers)
    for index, (grad, part) in enumerate(zip(grads, g.split(pyramid.channels, dim=-1), strict=True)):
        layer = pyramid.layers[index]
        assert (grad.dtype, grad.stride()) == (layer.dtype, layer.stride)
        scaled = part if factor is None else part.double() * factor[index].double()
        w_bg = weights.bg[index] if weights.bg else None
        wanted, size = truth(layer, weights.fg[index], w_bg, scaled, upstream[index] if upstream else None)
        assert_within(grad, wanted, unit(pyramid.dtype) * size, "gradient", ulps)


def arriving(features: Sequence[Tensor], layout: str) -> list[Tensor]:
    return [lay_out(torch.randn(F.shape).to(F.device, F.dtype), layout) for F in features]


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("dtype", FEATURE_DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_every_layout_and_dtype(backend, device, ulps, layout, dtype):
    features = [lay_out(torch.randn(s).to(device, dtype), layout) for s in ((2, 5, 6, 7), (2, 9, 4, 5))]
    check(backend, describe(features), weights_for(features, "valid wide"), arriving(features, layout), ulps)


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_weights_of_every_kind(backend, device, ulps, kind, dtype):
    features = [torch.randn(3, 4, 11), lay_out(torch.randn(3, 6, 15), "channels_last"), torch.randn(3, 1, 1)]
    features = [layer.to(device, dtype) for layer in features]
    check(backend, describe(features), weights_for(features, kind), [], ulps)


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_an_upstream_gradient_of_any_layout_is_added_where_there_is_one(backend, device, ulps, layout):
    features = [lay_out(torch.randn(2, 3, 5, 4).to(device), of) for of in ("contiguous", "channels_last")]
    weights, pyramid = weights_for(features, "uint8"), describe(features)
    upstream = [arriving(features, layout)[0], None]
    check(backend, pyramid, weights, upstream, ulps)
    check(backend, pyramid, weights, upstream[::-1], ulps)
    check(backend, pyramid, weights, [None, None], ulps)


def test_any_layers_weights_upstream_and_factor(backend, device, ulps, for_all):
    @for_all(
        cases(layouts=ALL_LAYOUTS, max_size=11),
        st.sampled_from(WEIGHT_KINDS),
        st.sampled_from((None, *ALL_LAYOUTS)),
        st.booleans(),
    )
    def check_case(case: Case, kind: str, layout: str | None, has_factor: bool) -> None:
        features = [layer.detach() for layer in case.features(device)]
        weights = weights_for(features, kind, torch.Generator().manual_seed(case.seed))
        upstream = [] if layout is None else arriving(features, layout)
        factor = torch.randn(len(features), dtype=accumulate_dtype(features), device=device)
        check(backend, describe(features), weights, upstream, ulps, factor if has_factor else None)


def test_more_layers_than_a_launch_holds(backend, device, ulps, interpreted):
    features = [torch.randn(2, 1 + i % 3, 3 + i % 4, device=device) for i in range(17 if interpreted else 37)]
    upstream = [layer if index % 2 else None for index, layer in enumerate(features)]
    factor = torch.randn(len(features), device=device)
    check(backend, describe(features), weights_for(features, "valid mixed"), upstream, ulps, factor)


def test_the_gradient_by_hand(backend, device):
    features = torch.empty(1, 2, 3, device=device)
    fg = torch.tensor([[1.0, 0.25, 0.0]], device=device)
    g = torch.tensor([[[2.0, 3.0]], [[-4.0, 8.0]]], device=device)
    kernels, pyramid = kernels_of(backend), describe([features])
    (grad,) = kernels.gradient(g, None, Weights([fg], []), [], pyramid)
    assert grad.tolist() == [[[2.0, -2.5, -4.0], [3.0, 6.75, 8.0]]]
    twice = torch.tensor([2.0], device=device)
    (grad,) = kernels.gradient(g, twice, Weights([fg], []), [torch.ones_like(features)], pyramid)
    assert grad.tolist() == [[[5.0, -4.0, -7.0], [7.0, 14.5, 17.0]]]


@pytest.mark.parametrize("strides", ["one number", "every second"])
def test_a_factor_with_strides_is_taken(backend, device, strides):
    features = [torch.randn(2, 3, 5, device=device) for _ in range(3)]
    weights, g = weights_for(features, "wide"), torch.randn(2, 2, 9, device=device)
    values = torch.randn(1).expand(3) if strides == "one number" else torch.randn(6)[::2]
    factor = values.to(device)
    factor = factor[:1].expand(3) if strides == "one number" else torch.stack([factor, factor], 1)[:, 0]
    assert not factor.is_contiguous()
    results = [
        kernels_of(backend).gradient(g, of, weights, [], describe(features))
        for of in (factor, factor.clone(memory_format=torch.contiguous_format))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_gradient_of_sums_with_strides_is_taken(backend, device):
    features = torch.randn(2, 3, 5, device=device)
    weights, g = weights_for([features], "wide"), torch.randn(1, 1, 3, device=device).expand(2, 2, 3)
    results = [
        kernels_of(backend).gradient(of, None, weights, [], describe([features]))
        for of in (g, g.contiguous())
    ]
    assert torch.equal(results[0][0], results[1][0])


def test_pixels_that_are_left_out_get_what_arrives_and_no_more(backend, device):
    features = torch.randn(2, 3, 4, 5, device=device)
    (fg,), (bg,) = weights = weights_for([features], "valid wide")
    left_out = ((fg == 0) & (bg == 0)).reshape(2, 1, 4, 5).expand_as(features)
    upstream = torch.randn_like(features)
    for value in (1.0, math.nan, math.inf):  # whatever g is
        g = torch.full((2, 2, 3), value, device=device)
        (alone,) = kernels_of(backend).gradient(g, None, weights, [], describe([features]))
        (added,) = kernels_of(backend).gradient(g, None, weights, [upstream], describe([features]))
        assert (alone[left_out] == 0).all()
        assert torch.equal(added[left_out], upstream[left_out])


def test_a_gradient_that_is_not_finite_reaches_every_valid_pixel(backend, device):
    fg = torch.tensor([[1.0, 0.0, 0.0]], device=device)
    bg = torch.tensor([[0.0, 1.0, 0.0]], device=device)
    g = torch.tensor([[[math.nan]], [[1.0]]], device=device)
    pyramid = describe([torch.empty(1, 1, 3)])
    (grad,) = kernels_of(backend).gradient(g, None, Weights([fg], [bg]), [], pyramid)
    assert grad.flatten().isnan().tolist() == [True, True, False]
    assert grad.flatten()[2] == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_twice(backend, device, layout):
    features = lay_out(torch.randn(2, 7, 23, 31).to(device, torch.bfloat16), layout)
    weights, g = weights_for([features], "valid wide"), torch.randn(2, 2, 7, device=device)
    first, second = (
        kernels_of(backend).gradient(g, None, weights, [features], describe([features])) for _ in range(2)
    )
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("with_upstream", [False, True])
def test_batches_without_samples_and_layers_without_channels(backend, device, with_upstream):
    for batch, channels in ((0, 3), (2, 0)):
        features = [torch.randn(batch, C, 4, 3, device=device) for C in (channels, 2)]
        weights, pyramid = weights_for(features, "wide"), describe(features)
        g = torch.randn(2, batch, channels + 2, device=device)
        grads = kernels_of(backend).gradient(g, None, weights, features if with_upstream else [], pyramid)
        assert [grad.shape for grad in grads] == [layer.shape for layer in features]
        assert all(grad.isfinite().all() for grad in grads)


def test_one_pixel(backend, device, ulps):
    features = [torch.randn(1, 2, 1, 1, device=device)]
    check(backend, describe(features), weights_for(features, "wide"), features, ulps)
