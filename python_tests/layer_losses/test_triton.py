"""Backend `triton` of layer_losses: two launches forward and one backward, with the numbers of float64."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import fdkernels as fdk
import oracles
from cases import lay_out
from fdkernels.layer_losses.impl import reference
from fdkernels.layer_losses.impl import triton as backend
from fdkernels.log_norm.impl import triton as log_norm
from fdkernels.log_norm.options import EXCHANGES, NORMS, REGION_WEIGHTS, Options
from fdkernels.region_sums.geometry import geometry_of
from kernel_launches import recorded_launches

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are counted by the interpreter"
    ),
    pytest.mark.usefixtures("nan_filled"),
]

# Channels and size of the nine maps of a small network, from the first to the last.
PYRAMID = [(2, 16), (4, 8), (8, 4), (16, 2), (32, 1), (16, 2), (8, 4), (4, 8), (2, 16)]
FORWARD = ["region_sums_forward_kernel", "layer_losses_forward_kernel"]
BACKWARD = ["region_sums_backward_kernel"]
PAIRINGS = {
    "none": None,
    "shuffle": torch.tensor([1, 1, 0]),  # sample 2 is nobody's partner, 1 is two's
    "pooled": torch.tensor([[0, 1], [-1, 2], [2, 1], [1, 1]]),
}


def pyramid(dtype=torch.float32, layout="contiguous", batch=2):
    return [
        lay_out(torch.randn(batch, C, size, size).to(dtype), layout).detach().requires_grad_()
        for C, size in PYRAMID
    ]


def odd_layers(dtypes=(torch.float32,), batch=3):
    """Layers of odd sizes, one with more channels than a block has, in every layout."""
    shapes = [(5, 7, 3), (37, 2, 5), (1, 9, 9), (3, 4, 4)]
    layouts = ("contiguous", "channels_last", "sliced", "transposed")
    return [
        lay_out(torch.randn(batch, *shape).to(dtypes[i % len(dtypes)]), layout)
        for i, (shape, layout) in enumerate(zip(shapes, layouts, strict=True))
    ]


def weights_of(layers, has_bg=False):
    """Weights of the layers, bytes and floats by turns, and sample 1 of the second layer not valid at all."""
    fg, bg = [], []
    for i, layer in enumerate(layers):
        y = torch.rand(layer.shape[0], layer.shape[2:].numel())
        v = (torch.rand(y.shape) > 0.3).float() if has_bg else torch.ones_like(y)
        if i == 1 and has_bg:
            v[1] = 0
        if i % 2:
            y = (y > 0.5).float()
        dtype = torch.uint8 if i % 2 else torch.float32
        fg.append((v * y).to(dtype))
        bg.append((v * (1 - y)).to(dtype))
    return fg, bg if has_bg else []


@pytest.mark.parametrize(
    ("dtype", "layout", "exchange", "mask"),
    [
        (torch.float32, "contiguous", "none", "bytes"),
        (torch.float32, "channels_last", "shuffle", "floats"),
        (torch.bfloat16, "contiguous", "pooled", "floats"),
        (torch.bfloat16, "channels_last", "none", "bytes"),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_a_pyramid_is_three_launches_forward_with_its_masks_and_one_backward(dtype, layout, exchange, mask):
    features = pyramid(dtype, layout)
    y = torch.rand(2, 16, 16)
    pairing = {"none": None, "shuffle": torch.tensor([1, 0]), "pooled": torch.tensor([[0, 1]])}[exchange]
    with recorded_launches() as names:
        loss = fdk.feature_discrepancy_loss(
            features, y > 0.5 if mask == "bytes" else y, exchange=exchange, pairing=pairing, backend="triton"
        )
    # The mask itself serves the layers of its size; the four smaller sizes are made together.
    assert names == ["layer_masks_forward_kernel", *FORWARD]
    with recorded_launches() as names:
        loss.backward()
    assert names == BACKWARD


def test_a_tapped_pyramid_adds_what_arrives_in_its_one_launch_backward():
    features = pyramid(torch.float32, "channels_last")
    mask = torch.rand(2, 16, 16)
    outs, loss = fdk.tap(features, mask, backend="triton")
    arriving = [torch.randn_like(out) for out in outs[::2]]
    with recorded_launches() as names:
        grads = torch.autograd.grad([loss, *outs[::2]], features, [torch.ones(()), *arriving])
    assert names == BACKWARD
    separate = fdk.feature_discrepancy_loss(features, mask, backend="reference")
    wanted = list(torch.autograd.grad(separate, features))
    wanted[::2] = [grad + upstream for grad, upstream in zip(wanted[::2], arriving, strict=True)]
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


def test_more_layers_than_a_launch_holds_take_two_launches_each():
    layers = [torch.randn(1, 1, 3) for _ in range(17)]
    fg = [torch.rand(1, 3) for _ in layers]
    options = Options("valid", False, "vector", 1.0, 1e-3, "none", "mean")
    with recorded_launches() as names:
        outputs = backend.forward(layers, fg, [], None, options, True)
    assert names == [name for name in FORWARD for _ in range(2)]
    for mine, theirs in zip(outputs, reference.forward(layers, fg, [], None, options, True), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("norm", "exchange", "weight"),
    [
        (norm, exchange, REGION_WEIGHTS[(2 * i + j) % 4])
        for i, norm in enumerate(NORMS)
        for j, exchange in enumerate(EXCHANGES)
    ],
)
def test_loss_sums_and_slopes_are_those_of_float64(norm, exchange, weight):
    """Of layers in four layouts, with masks of bytes and floats in one call."""
    layers = odd_layers()[1:]
    fg, bg = weights_of(layers, has_bg=exchange != "none")
    options = Options(
        weight, weight == "pixels", norm, 0.5, 1e-2, exchange, ("mean", "sum")[norm == "vector"]
    )
    outputs = backend.forward(layers, fg, bg, PAIRINGS[exchange], options, True)
    wide = [[t.double() for t in tensors] for tensors in (layers, fg, bg)]
    for mine, theirs in zip(
        outputs, reference.forward(*wide, PAIRINGS[exchange], options, True), strict=True
    ):
        assert mine.dtype == torch.float32
        scale = theirs.abs().max().item()
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("convention", ["paper", "released"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_loss_and_gradients_match_the_oracle_for_mixed_dtypes(convention, exchange):
    features = odd_layers((torch.float32, torch.bfloat16, torch.float64, torch.float16))
    for layer in features:
        layer.requires_grad_()
    mask = (torch.rand(3, 9, 9) > 0.5).to(torch.int16)
    mask[0, :4] = -1
    pairing = PAIRINGS[exchange] if exchange != "pooled" else torch.tensor([[0, 1], [2, 1]])
    options = {
        "convention": convention, "exchange": exchange, "pairing": pairing, "ignore_index": -1,
        "eps": 1e-3,
    }  # fmt: skip
    # Layers of half precision are held to the error of float32 sums.
    truth = oracles.truth([layer.float() for layer in features], mask, **options)
    loss = fdk.feature_discrepancy_loss(features, mask, backend="triton", **options)
    oracles.assert_within(loss, truth.loss, truth.loss_band, "loss")
    for grad, wanted, band in zip(torch.autograd.grad(loss, features), truth.grads, truth.bands, strict=True):
        oracles.assert_within(grad, wanted, band, "gradient", ulps=1.01)  # the interpreter cuts off


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_backward_scales_slopes_and_adds_what_arrives(layout):
    layers = [lay_out(torch.randn(2, C, s, s), layout) for C, s in ((3, 5), (2, 4), (6, 3))]
    fg, bg = weights_of(layers, has_bg=True)
    slopes, grad_loss = torch.randn(2, 2, 11), torch.randn(1).expand(3)
    upstream = [None, torch.randn(2, 2, 4, 4), lay_out(torch.randn(2, 6, 3, 3), layout)]
    geometry = [geometry_of(layer) for layer in layers]
    grads = backend.backward(grad_loss, slopes, fg, bg, upstream, geometry)
    wanted = reference.backward(grad_loss, slopes, fg, bg, upstream, geometry)
    for grad, other, layer in zip(grads, wanted, layers, strict=True):
        assert grad.stride() == layer.stride()
        torch.testing.assert_close(grad, other)


def test_the_same_input_gives_the_same_bits():
    layers = odd_layers()[:2]
    fg, bg = weights_of(layers)
    options = Options("valid", False, "vector", 1.0, 1e-12, "pooled", "mean")
    runs = [backend.forward(layers, fg, bg, PAIRINGS["pooled"], options, True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_more_samples_than_a_tile_holds_have_the_slopes_of_float64(exchange, monkeypatch):
    monkeypatch.setattr(log_norm, "_TILE", 8)
    monkeypatch.setattr(log_norm, "COUNT", 2)
    layers = [torch.randn(3, 4, 5), torch.randn(3, 3, 2)]
    fg, bg = weights_of(layers)
    options = Options("region", False, "vector", 1.0, 1e-2, exchange, "mean")
    slopes = backend.forward(layers, fg, bg, PAIRINGS[exchange], options, True)[3]
    wide = [[t.double() for t in tensors] for tensors in (layers, fg, bg)]
    wanted = reference.forward(*wide, PAIRINGS[exchange], options, True)[3]
    torch.testing.assert_close(slopes.double(), wanted, rtol=1e-5, atol=2e-6 * wanted.abs().max().item())


def test_without_slopes_nothing_else_changes():
    layers = odd_layers()[:2]
    fg, bg = weights_of(layers)
    options = Options("valid", False, "vector", 1.0, 1e-12, "none", "mean")
    with_slopes = backend.forward(layers, fg, bg, None, options, True)
    without = backend.forward(layers, fg, bg, None, options, False)
    assert without[3].numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(with_slopes[:3], without[:3], strict=True))


@pytest.mark.parametrize("norm", ["vector", "batch"])
def test_an_empty_batch_has_the_loss_zero(norm):
    layers = odd_layers(batch=0)
    fg, bg = weights_of(layers)
    options = Options("valid", False, norm, 1.0, 1e-12, "none", "mean")
    loss, sums, masses, slopes = backend.forward(layers, fg, bg, None, options, True)
    assert loss.tolist() == [0, 0, 0, 0]
    assert [t.shape for t in (sums, masses, slopes)] == [(2, 0, 46), (2, 0, 4), (2, 0, 46)]
    grads = backend.backward(loss, slopes, fg, bg, [], [geometry_of(layer) for layer in layers])
    assert [grad.shape for grad in grads] == [layer.shape for layer in layers]
