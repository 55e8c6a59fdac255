"""The registered ops: torch's own checks, the numbers of the kernels, and their derivatives."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from cases import SumsCase, lay_out, weights_for
from fdkernels.op import registered
from fdkernels.op.kernels import kernels_of
from fdkernels.op.pyramid import Weights, describe, pack
from kernel_launches import RecordedOps

OPS = torch.ops.fdkernels
EXCHANGED = SumsCase((3, 1), (8, 4), 3, "region_mean", exchange="pooled", reduction="sum").options
PAIRING = torch.tensor([[0, 1], [-1, 2]])


def opcheck(op: Any, arguments: tuple[Any, ...], interpreted: bool) -> None:
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not interpreted:  # tracing NumPy takes long and says nothing about kernels
        tests.append("test_aot_dispatch_dynamic")
    with warnings.catch_warnings():
        # opcheck itself looks for .grad, of which torch 2.15 warns.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        torch.library.opcheck(op.default, arguments, test_utils=tests)


def layers(device: torch.device) -> list[Tensor]:
    return [torch.randn(3, 3, 4, 2, device=device), torch.randn(3, 1, 2, 2, device=device)]


@pytest.mark.parametrize("how", ["area", "max", "nearest"])
@pytest.mark.parametrize("ignore_index", [None, 255])
def test_masks_passes_opcheck(backend, device, interpreted, how, ignore_index):
    mask = torch.randint(0, 2, (2, 1, 6, 4), dtype=torch.uint8, device=device)
    opcheck(OPS.masks, (mask, [6, 4, 3, 2, 5, 5], torch.float32, how, ignore_index, backend), interpreted)


@pytest.mark.parametrize("kind", ["wide", "valid mixed"])
@pytest.mark.parametrize("what", ["sums", "losses", "slopes"])
def test_sums_passes_opcheck(backend, device, interpreted, what, kind):
    features = layers(device)
    fg, bg = weights_for(features, kind)
    options, pairing = (None, None) if what == "sums" else (EXCHANGED.as_text(), PAIRING.to(device))
    opcheck(OPS.sums, (features, fg, bg, options, pairing, what == "slopes", backend), interpreted)


def test_losses_passes_opcheck(backend, device, interpreted):
    S, M = torch.randn(2, 3, 4, device=device), torch.rand(2, 3, 2, device=device) + 0.5
    pyramid = pack(describe(layers(device)))
    opcheck(OPS.losses, (S, M, pyramid, EXCHANGED.as_text(), PAIRING.to(device), backend), interpreted)


@pytest.mark.parametrize("kind", ["wide", "valid wide"])
@pytest.mark.parametrize("has_factor", [False, True])
@pytest.mark.parametrize("has_upstream", [False, True])
def test_gradient_passes_opcheck(backend, device, interpreted, has_upstream, has_factor, kind):
    features = layers(device)
    fg, bg = weights_for(features, kind)
    g = torch.randn(2, 3, 4, device=device, requires_grad=True)
    factor = torch.randn(2, device=device, requires_grad=True) if has_factor else None
    upstream, indices = ([torch.randn_like(features[1])], [1]) if has_upstream else ([], [])
    arguments = (g, factor, fg, bg, upstream, indices, pack(describe(features)), backend)
    opcheck(OPS.gradient, arguments, interpreted)


@pytest.mark.parametrize("kind", ["wide", "valid wide"])
def test_mask_gradient_passes_opcheck(backend, device, interpreted, kind):
    features = [layer.requires_grad_() for layer in layers(device)]
    g = torch.randn(2, 3, 4, device=device, requires_grad=True)
    fg, bg = weights_for(features, kind)
    opcheck(OPS.mask_gradient, (g, fg, bg, features, backend), interpreted)


@pytest.mark.parametrize("moments", [False, True], ids=["sums", "moments"])
def test_the_ops_over_regions_pass_opcheck(backend, device, interpreted, moments):
    features = layers(device)
    weights = [torch.rand(3, 3, F.shape[2:].numel(), device=device) for F in features]
    pivots = torch.randn(3, 3, 4, device=device) if moments else None
    g = torch.randn(6 if moments else 3, 3, 4, device=device)
    given, about = (weights, pivots, True), (pack(describe(features)), backend)
    opcheck(OPS.region_sums, (features, *given, backend), interpreted)
    read, added = features if moments else [], [torch.randn_like(features[1])]
    opcheck(OPS.region_gradient, (g, *given, read, added, [1], *about), interpreted)
    opcheck(OPS.region_weight_gradient, (g, *given, features, backend), interpreted)


def test_an_op_gives_the_numbers_of_its_kernels(backend, device):
    """Whether called past the op or through it."""
    features = [lay_out(layer, "channels_last") for layer in layers(device)]
    mask, pairing = torch.rand(3, 1, 4, 2, device=device), PAIRING.to(device)
    sizes, pyramid = [layer.shape[2:] for layer in features], describe(features)
    g, factor = torch.randn(2, 3, 4, device=device), torch.randn(2, device=device)

    def all_five() -> list[Tensor]:
        weights = registered.masks(mask, sizes, torch.float32, "area", 0.5, backend)
        out = registered.sums(features, weights, pyramid, EXCHANGED, pairing, True, backend)
        losses = registered.losses(out.sums, out.masses, pyramid, EXCHANGED, pairing, backend)
        with torch.no_grad():
            grads = registered.gradient(g, factor, weights, [None, features[1]], pyramid, backend)
            of_weights = registered.mask_gradient(g, weights, features, backend)
        made = out[:4]  # the op leaves it to others to add up the losses
        return [*weights.fg, *weights.bg, *made, *losses, *grads, *of_weights.fg, *of_weights.bg]

    direct = all_five()
    with RecordedOps() as ops:
        through = all_five()
    assert ops.names == ["masks", "sums", "losses", "gradient", "mask_gradient"]
    for one, other in zip(direct, through, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def test_weights_of_any_strides_are_taken_by_the_ops(backend, device):
    features = torch.randn(2, 3, 4, device=device)
    fg, bg = torch.rand(4, 2, device=device), torch.rand(1, 1, device=device).expand(2, 4)
    spread, dense = Weights([fg.t()], [bg]), Weights([fg.t().contiguous()], [bg.contiguous()])
    wanted = kernels_of(backend).sums([features], dense, describe([features]), None, None, False)
    got = OPS.sums([features], *spread, None, None, False, backend)
    assert torch.equal(got[0], wanted.sums)
    assert torch.equal(got[1], wanted.masses)


def test_a_factor_is_expanded_to_the_channels_of_its_layer():
    pyramid = describe([torch.empty(1, C, 2) for C in (2, 1, 3)])
    assert registered.expand_factor(torch.tensor([5.0, 6.0, 7.0]), pyramid).tolist() == [5, 5, 6, 7, 7, 7]


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("kind", ["wide", "valid wide"])
@pytest.mark.parametrize("has_upstream", [False, True])
def test_gradient_knows_its_derivatives(backend, kind, has_upstream):
    """With respect to g, the factor, the weights and what arrives; ignored pixels stay ignored."""
    features = [lay_out(doubles(2, 3, 2, 2).detach(), "channels_last"), doubles(2, 1, 2, 1).detach()]
    weights, pyramid = weights_for(features, kind), describe(features)
    left_out = [
        torch.zeros_like(w) if not weights.bg else ((w == 0) & (weights.bg[i] == 0)).double()
        for i, w in enumerate(weights.fg)
    ]
    inputs = [doubles(2, 2, 4), doubles(2), doubles(2, 1, 2, 1)]
    inputs += [w.requires_grad_() for w in (*weights.fg, *weights.bg)]

    def grads(g: Tensor, factor: Tensor, upstream: Tensor, *both: Tensor) -> tuple[Tensor, ...]:
        # Finite differences must not make a pixel valid that is left out.
        kept = [w * (1 - left_out[i % 2]) for i, w in enumerate(both)]
        now = Weights(kept[:2], kept[2:])
        added = [None, upstream] if has_upstream else []
        return tuple(registered.gradient(g, factor, now, added, pyramid, backend))

    assert gradcheck(grads, inputs)
    assert gradgradcheck(grads, inputs)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("kind", ["wide", "valid wide"])
def test_mask_gradient_knows_its_derivatives(backend, kind):
    features = [lay_out(doubles(2, 3, 2, 2).detach(), "channels_last"), doubles(2, 1, 2, 1).detach()]
    weights = weights_for(features, kind)

    def of_weights(g: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
        fg, bg = registered.mask_gradient(g, weights, layers, backend)
        return *fg, *bg

    inputs = (doubles(2, 2, 4), *(layer.requires_grad_() for layer in features))
    assert gradcheck(of_weights, inputs)
    assert gradgradcheck(of_weights, inputs)
