"""`mask_gradient` of every backend, the gradient of the weights of soft masks, against float64 truth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import ALL_LAYOUTS, FEATURE_DTYPES, WEIGHT_KINDS, Case, cases, lay_out, weights_for
from fdkernels.op.kernels import kernels_of
from fdkernels.op.pyramid import Weights, accumulate_dtype
from oracles import assert_within, sums_gradients, unit

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy"),  # with which the interpreter computes
]


def check(backend: str, features: Sequence[Tensor], weights: Weights) -> None:
    """The gradients of all weights, for random g, are those of the formula."""
    dtype, device = accumulate_dtype(features), features[0].device
    channels = [layer.shape[1] for layer in features]
    g = torch.randn(2, features[0].shape[0], sum(channels), dtype=dtype, device=device)
    fg, bg = kernels_of(backend).mask_gradient(g, weights, features)
    assert (len(fg), len(bg)) == (len(features), len(weights.bg))
    for index, part in enumerate(g.cpu().double().split(channels, dim=-1)):
        layer, w_fg = features[index].cpu(), weights.fg[index].cpu()
        w_bg = weights.bg[index].cpu() if weights.bg else None
        _, *wanted = sums_gradients(layer, w_fg, w_bg, part)
        size = part.abs()
        if w_bg is None:  # the foreground stands for both, and its gradient is a difference
            size[1] *= -1
        _, *sizes = sums_gradients(layer.abs(), w_fg, w_bg, size)
        made = [fg[index]] if w_bg is None else [fg[index], bg[index]]
        for grad, value, band in zip(made, wanted, sizes, strict=True):
            assert grad.dtype == dtype
            assert_within(grad, value, unit(dtype) * band, "gradient of the weights")


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("dtype", FEATURE_DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_every_layout_and_dtype(backend, device, layout, dtype):
    features = [lay_out(torch.randn(s).to(device, dtype), layout) for s in ((2, 5, 6, 7), (2, 9, 4, 5))]
    check(backend, features, weights_for(features, "valid wide"))


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_weights_of_every_kind(backend, device, kind, dtype):
    features = [torch.randn(3, 4, 11), lay_out(torch.randn(3, 6, 15), "channels_last"), torch.randn(3, 1, 1)]
    features = [layer.to(device, dtype) for layer in features]
    check(backend, features, weights_for(features, kind))


def test_any_layers_and_weights(backend, device, for_all):
    @for_all(cases(layouts=ALL_LAYOUTS, max_size=11), st.sampled_from(WEIGHT_KINDS))
    def check_case(case: Case, kind: str) -> None:
        features = [layer.detach() for layer in case.features(device)]
        check(backend, features, weights_for(features, kind, torch.Generator().manual_seed(case.seed)))


def test_more_channels_than_a_block_has_and_more_layers_than_a_launch(backend, device, interpreted):
    check(backend, [torch.randn(1, 70, 3, device=device)], Weights([torch.rand(1, 3, device=device)], []))
    features = [torch.randn(1, 1, 2, device=device) for _ in range(17 if interpreted else 37)]
    check(backend, features, weights_for(features, "valid wide"))


def test_the_gradient_by_hand(backend, device):
    features = torch.tensor([[[1.0, 2.0, 4.0], [-1.0, 0.5, 3.0]]], device=device)
    fg = torch.tensor([[1.0, 0.25, 0.0]], device=device)
    g = torch.tensor([[[2.0, 3.0]], [[-4.0, 8.0]]], device=device)
    (of_fg,), of_bg = kernels_of(backend).mask_gradient(g, Weights([fg], []), [features])
    # g_fg - g_bg = (6, -5)
    assert of_fg.tolist() == [[6 + 5, 12 - 2.5, 24 - 15]]
    assert list(of_bg) == []
    bg = torch.tensor([[0.0, 0.5, 0.0]], device=device)
    (of_fg,), (of_bg,) = kernels_of(backend).mask_gradient(g, Weights([fg], [bg]), [features])
    assert of_fg.tolist() == [[2 - 3, 4 + 1.5, 0]]  # the last pixel is left out
    assert of_bg.tolist() == [[-4 - 8, -8 + 4, 0]]


def test_what_pixels_hold_that_are_left_out_has_no_effect(backend, device):
    features = torch.randn(2, 3, 4, 5, device=device)
    (fg,), (bg,) = weights = weights_for([features], "valid wide")
    left_out = (fg == 0) & (bg == 0)
    g = torch.randn(2, 2, 3, device=device)
    results = []
    for value in (0.0, math.nan, math.inf):
        layer = features.masked_fill(left_out.reshape(2, 1, 4, 5), value)
        results.append([of_all[0] for of_all in kernels_of(backend).mask_gradient(g, weights, [layer])])
    for of_fg, of_bg in results:
        assert (of_fg[left_out] == 0).all()
        assert (of_bg[left_out] == 0).all()
        assert torch.equal(of_fg, results[0][0])
        assert torch.equal(of_bg, results[0][1])


def test_a_bad_feature_reaches_the_gradient_of_its_pixel_alone(backend, device):
    features = torch.randn(2, 3, 4, device=device)
    features[1, 2, 3] = math.nan
    weights = weights_for([features], "wide")
    g = torch.randn(2, 2, 3, device=device)
    (of_fg,), _ = kernels_of(backend).mask_gradient(g, weights, [features])
    assert of_fg.isnan().nonzero().tolist() == [[1, 3]]


def test_a_gradient_of_sums_with_strides_is_taken(backend, device):
    features = torch.randn(2, 3, 5, device=device)
    weights, g = weights_for([features], "wide"), torch.randn(1, 1, 3, device=device).expand(2, 2, 3)
    results = [kernels_of(backend).mask_gradient(of, weights, [features]) for of in (g, g.contiguous())]
    assert torch.equal(results[0].fg[0], results[1].fg[0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_twice(backend, device, layout):
    features = lay_out(torch.randn(2, 33, 9, 11).to(device), layout)
    weights, g = weights_for([features], "valid wide"), torch.randn(2, 2, 33, device=device)
    first, second = (kernels_of(backend).mask_gradient(g, weights, [features]) for _ in range(2))
    assert torch.equal(first.fg[0], second.fg[0])
    assert torch.equal(first.bg[0], second.bg[0])


def test_batches_without_samples_and_layers_without_channels(backend, device):
    for batch, channels in ((0, 3), (2, 0)):
        features = torch.randn(batch, channels, 4, 3, device=device)
        weights = weights_for([features], "valid wide")
        g = torch.randn(2, batch, channels, device=device)
        for (grad,) in kernels_of(backend).mask_gradient(g, weights, [features]):
            assert torch.equal(grad, torch.zeros(batch, 12, device=device))
