"""Results belong on the features' device, whatever torch's default device is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import fdkernels as fdk
from oracles import CONVENTIONS


@contextmanager
def by_block() -> Iterator[None]:
    with torch.device("meta"):
        yield


@contextmanager
def by_setting() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def inputs(device: torch.device) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(3)
    maps = [torch.randn(shape, generator=generator) for shape in ((4, 3, 8, 6), (4, 5, 4, 3))]
    mask = torch.rand(4, 1, 8, 6, generator=generator)
    return [F.to(device).requires_grad_() for F in maps], mask.to(device)


def hard(mask: Tensor) -> Tensor:
    """An integer mask [N, 1, H, W] in which some pixels are to be ignored."""
    return torch.where(mask < 0.2, 255, (mask > 0.5).long())


def loss(**options: Any) -> Callable[[list[Tensor], Tensor, str], list[Tensor]]:
    return lambda F, mask, backend: [fdk.feature_discrepancy_loss(F, mask, backend=backend, **options)]


def seeded(exchange: str, **options: Any) -> Callable[[list[Tensor], Tensor, str], list[Tensor]]:
    def call(F: list[Tensor], mask: Tensor, backend: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(5)
        return loss(exchange=exchange, generator=generator, **options)(F, mask, backend)

    return call


def own_generator(F: list[Tensor], mask: Tensor, backend: str) -> list[Tensor]:
    torch.manual_seed(7)
    return loss(exchange="shuffle")(F, mask, backend)


def tapped(F: list[Tensor], mask: Tensor, backend: str) -> list[Tensor]:
    outs, value = fdk.tap(F, mask, backend=backend)
    return [*outs, value]


def criterion(rule: str) -> Callable[[list[Tensor], Tensor, str], list[Tensor]]:
    def call(F: list[Tensor], mask: Tensor, backend: str) -> list[Tensor]:
        with torch.device(mask.device):
            alpha_init = 0.0 if rule == "ramp" else 0.5
            crit = fdk.FeatureDiscrepancyLoss(2, rule, alpha_init=alpha_init, ramp_steps=1, backend=backend)
        crit(F, mask)
        return [crit(F, mask), crit.layer_losses, crit.alpha.clone()]

    return call


CALLS: dict[str, Callable[[list[Tensor], Tensor, str], list[Tensor]]] = {
    **{name: loss(convention=name) for name in CONVENTIONS},
    **{f"reduction {name}": loss(reduction=name) for name in ("sum", "none")},
    **{f"mask_resize {name}": loss(mask_resize=name) for name in ("area", "max", "nearest")},
    "hard mask": lambda F, mask, backend: loss()(F, mask > 0.5, backend),
    "ignored pixels": lambda F, mask, backend: loss(ignore_index=255)(F, hard(mask), backend),
    "ignored soft pixels": lambda F, mask, backend: loss(ignore_index=-1)(
        F, torch.where(mask < 0.2, -1, mask), backend
    ),
    "soft mask with a gradient": lambda F, mask, backend: loss()(F, mask.detach().requires_grad_(), backend),
    "list of weights": loss(layer_weights=[0.5, 2.0]),
    "list of weights, entries": loss(layer_weights=[0.5, 2.0], reduction="none"),
    "list of partners": loss(exchange="shuffle", pairing=[1, 2, 3, 0]),
    "list of pairs": loss(exchange="pooled", pairing=[[0, 1], [2, 3]]),
    "list of pairs and domains": loss(exchange="pooled", pairing=[[0, 1], [2, 3]], domains=[0, 1, 0, 1]),
    "list of domains": seeded("pooled", domains=[0, 1, 1, 0]),
    "drawn partners": seeded("shuffle"),
    "partners of torch's generator": own_generator,
    "channels last": lambda F, mask, backend: loss(channel_dim=-1)(
        [layer.movedim(1, -1) for layer in F], mask, backend
    ),
    "tap": tapped,
    "region sums": lambda F, mask, backend: [
        value for sums in fdk.region_sums(F, mask, backend=backend) for value in sums
    ],
    **{f"criterion {rule}": criterion(rule) for rule in ("ascent", "descent", "clipped", "ramp")},
}


def results_of(
    call: Callable[[list[Tensor], Tensor, str], list[Tensor]], backend: str, device: torch.device
) -> list[Tensor]:
    """What a call returns, and the gradients of the features."""
    with torch.device("cpu"):
        features, mask = inputs(device)
    out = call(features, mask, backend)
    total = torch.stack([value.square().sum() for value in out if value.requires_grad]).sum()
    return [*out, *torch.autograd.grad(total, features)]


@pytest.mark.parametrize("name", CALLS)
def test_a_default_device_changes_nothing(backend, device, name):
    wanted = results_of(CALLS[name], backend, device)
    with by_block():
        got = results_of(CALLS[name], backend, device)
    for value, truth in zip(got, wanted, strict=True):
        assert value.device == truth.device
        assert torch.equal(value, truth)


@pytest.mark.parametrize("default", [by_block, by_setting])
@pytest.mark.parametrize("fused", [False, True])
def test_taps_and_second_derivatives_are_unchanged(default, fused):
    net = torch.nn.Conv2d(2, 3, 1)
    image, mask = torch.randn(2, 2, 4, 4), torch.rand(2, 4, 4)

    def gradients() -> list[Tensor]:
        with fdk.FeatureTaps(torch.nn.Sequential(net), ["0"], fused=fused) as taps:
            net(image)
        value = fdk.feature_discrepancy_loss(taps if fused else taps.features, mask)
        (first,) = torch.autograd.grad(value, net.weight, create_graph=True)
        return [value, first, *torch.autograd.grad(first.square().sum(), net.weight)]

    wanted = gradients()
    with default():
        got = gradients()
    for value, truth in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, truth, rtol=0, atol=0)
