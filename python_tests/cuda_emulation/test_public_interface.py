"""Calls of the public interface that reach the CUDA kernels through fdkernels' own Python, run on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fdkernels as fdk
from cuda_emulation.build import Emulation
from fdkernels import backend as backends
from fdkernels.op import kernels
from oracles import CONVENTIONS, EXCHANGES, RESIZES

pytestmark = pytest.mark.usefixtures("nan_filled", "cuda_on_the_cpu")


@pytest.fixture
def cuda_on_the_cpu(emulated: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make backend `cuda` available for CPU tensors."""
    monkeypatch.setitem(kernels._kernels, "cuda", emulated.backend)
    monkeypatch.setattr(backends, "_device_type", lambda backend: None)
    monkeypatch.setitem(backends._reasons, "cuda", None)


# Nine layers as a UNet has them; the first has the size of the mask.
SIZES = [(24, 16), (12, 8), (6, 4), (3, 2), (2, 1), (3, 2), (6, 4), (12, 8), (24, 16)]


def make_layers(dtype: torch.dtype, layout: torch.memory_format) -> list[torch.Tensor]:
    return [
        torch.rand(4, channels, *size, dtype=torch.float64).to(dtype, memory_format=layout).requires_grad_()
        for channels, size in zip((2, 8, 3, 8, 16, 8, 3, 8, 2), SIZES, strict=True)
    ]


def run(layers: list[torch.Tensor], mask: torch.Tensor, backend: str, **options: Any) -> list[torch.Tensor]:
    """Loss and gradients of a call under `tap`, and then of a plain one."""
    leaves = [layer.detach().requires_grad_() for layer in layers]
    results = []
    for tapped in (True, False):
        if tapped:
            taps, loss = fdk.tap(leaves, mask, backend=backend, **options)
            total = loss + sum(layer.square().sum() for layer in taps[::2])
        else:
            total = loss = fdk.feature_discrepancy_loss(leaves, mask, backend=backend, **options)
        results += [loss.detach(), *torch.autograd.grad(total, leaves)]
    return results


def check(layers: list[torch.Tensor], mask: torch.Tensor, tolerance: float, **options: Any) -> None:
    got = run(layers, mask, "cuda", **options)
    wide = [layer.detach().double().requires_grad_() for layer in layers]
    wanted = run(wide, mask, "reference", **options)
    for value, truth in zip(got, wanted, strict=True):
        assert (value.double() - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_and_exchange(convention, exchange):
    pairing = {"shuffle": torch.tensor([2, 3, 1, 0]), "pooled": torch.tensor([[0, 1], [2, 3]])}.get(exchange)
    mask = torch.rand(4, 1, 24, 16) > 0.7
    layers = make_layers(torch.float32, torch.contiguous_format)[:4]
    check(layers, mask, 1e-4, convention=convention, exchange=exchange, pairing=pairing, eps=1e-4)


@pytest.mark.parametrize("mask_resize", RESIZES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float16, torch.float32])
def test_every_mask_with_pixels_left_out(mask_dtype, layout, mask_resize):
    values = torch.rand(4, 1, 24, 16)
    mask = (values if mask_dtype.is_floating_point else values > 0.7).to(mask_dtype)
    ignore = None
    if mask_dtype != torch.bool:
        ignore = 9
        mask = mask.masked_fill(torch.rand(mask.shape) < 0.2, ignore)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float64, 1e-10)):
        layers = make_layers(dtype, layout)[:5]
        check(layers, mask, tolerance, mask_resize=mask_resize, ignore_index=ignore, eps=1e-4)


def test_a_pyramid_takes_one_launch_for_masks_two_forward_and_one_backward(launches):
    layers = make_layers(torch.float32, torch.contiguous_format)
    whole = [layer for layer in layers if layer[0, 0].numel() % 4 == 0]  # vectors of 16 bytes
    mask = torch.rand(4, 1, 24, 16) > 0.7
    for exchange in EXCHANGES:
        domains = torch.tensor([0, 1, 0, 1]) if exchange == "pooled" else None
        # Layers whose pixels fill no vectors are a kind of their own.
        for pyramid, kinds in ((whole, 1), (layers, 2)):
            launches.count()
            loss = fdk.feature_discrepancy_loss(
                pyramid, mask, exchange=exchange, domains=domains, backend="cuda"
            )
            assert launches.count() == 1 + kinds + 1
            loss.backward()
            assert launches.count() == kinds
    fdk.feature_discrepancy_loss(layers[:1], mask, backend="cuda")
    assert launches.count() == 2  # a mask of the layer's size is read as it is


def test_a_frozen_layer_gets_no_gradient():
    layers = make_layers(torch.float32, torch.contiguous_format)[:3]
    layers[1].requires_grad_(False)
    mask = torch.rand(4, 1, 24, 16) > 0.7
    grads = []
    for backend in ("cuda", "reference"):
        loss = fdk.feature_discrepancy_loss(layers, mask, backend=backend)
        grads.append(torch.autograd.grad(loss, layers[::2]))
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)
