"""Stage log_norm: registered ops over the backends and their autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fdkernels import backend as backends
from fdkernels.log_norm.impl import reference
from fdkernels.log_norm.options import Options

__all__ = ["log_norm"]

_OPTIONS = (
    "SymInt[] channels, SymInt[] pixels, str region_weight, bool masked_background, str norm, "
    "float log_scale, float eps, str exchange, str reduction, str backend"
)
torch.library.define(
    "fdkernels::log_norm_forward",
    f"(Tensor sums, Tensor masses, Tensor? pairing, {_OPTIONS}) -> Tensor",
)
torch.library.define(
    "fdkernels::log_norm_backward",
    f"(Tensor grad_loss, Tensor sums, Tensor masses, Tensor? pairing, {_OPTIONS}) -> (Tensor, Tensor)",
)


@torch.library.impl("fdkernels::log_norm_forward", "CompositeExplicitAutograd")
def _forward(
    sums: Tensor,
    masses: Tensor,
    pairing: Tensor | None,
    channels: list[int],
    pixels: list[int],
    *options_and_backend: Any,
) -> Tensor:
    *options, backend = options_and_backend
    stage = backends.implementation("log_norm", backend)
    loss: Tensor = stage.forward(sums, masses, pairing, channels, pixels, Options(*options))
    return loss


@torch.library.register_fake("fdkernels::log_norm_forward")
def _forward_fake(
    sums: Tensor,
    masses: Tensor,
    pairing: Tensor | None,
    channels: list[int],
    pixels: list[int],
    *options_and_backend: Any,
) -> Tensor:
    options = Options(*options_and_backend[:-1])
    if options.reduction != "none":
        return sums.new_empty(len(channels))
    if options.norm == "batch":
        return sums.new_empty(sums.shape[-1])
    return sums.new_empty((sums.shape[1], len(channels)))


@torch.library.impl("fdkernels::log_norm_backward", "CompositeExplicitAutograd")
def _backward(
    grad_loss: Tensor,
    sums: Tensor,
    masses: Tensor,
    pairing: Tensor | None,
    channels: list[int],
    pixels: list[int],
    *options_and_backend: Any,
) -> tuple[Tensor, Tensor]:
    *options, backend = options_and_backend
    stage = backends.implementation("log_norm", backend)
    grads: tuple[Tensor, Tensor] = stage.backward(
        grad_loss, sums, masses, pairing, channels, pixels, Options(*options)
    )
    return grads


@torch.library.register_fake("fdkernels::log_norm_backward")
def _backward_fake(grad_loss: Tensor, sums: Tensor, masses: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(sums), torch.empty_like(masses)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_loss, sums, masses, pairing, *rest = inputs
    ctx.save_for_backward(grad_loss, sums, masses, pairing)
    ctx.channels, ctx.pixels = rest[0], rest[1]
    ctx.options = Options(*rest[2:-1])


def _backward_backward(
    ctx: Any, grad_grad_sums: Tensor | None, grad_grad_masses: Tensor | None
) -> tuple[Any, ...]:
    """Second derivatives of O(N·C) numbers: through the reference, which autograd differentiates."""
    grad_loss, sums, masses, pairing = ctx.saved_tensors
    with torch.enable_grad():
        inputs = [
            tensor if tensor.requires_grad else tensor.detach().requires_grad_()
            for tensor in (grad_loss, sums, masses)
        ]
        # Through an alias, so that the inner derivative is by these very nodes and not by what made them.
        g, s, m = (tensor.view_as(tensor) for tensor in inputs)
        loss = reference.forward(s, m, pairing, ctx.channels, ctx.pixels, ctx.options)
        first = torch.autograd.grad(
            loss, (s, m), g, create_graph=True, allow_unused=True, materialize_grads=True
        )
        cotangents = [
            torch.zeros_like(grad) if cotangent is None else cotangent
            for grad, cotangent in zip(first, (grad_grad_sums, grad_grad_masses), strict=True)
        ]
        second = torch.autograd.grad(
            first,
            (g, s, m),
            cotangents,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    return *second, None, *([None] * 10)


torch.library.register_autograd(
    "fdkernels::log_norm_backward", _backward_backward, setup_context=_backward_setup
)


class _LogNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor, masses: Tensor, pairing: Tensor | None, *arguments: Any) -> Tensor:
        ctx.save_for_backward(sums, masses, pairing)
        ctx.arguments = arguments
        loss: Tensor = torch.ops.fdkernels.log_norm_forward(sums, masses, pairing, *arguments)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        sums, masses, pairing = ctx.saved_tensors
        grad_sums, grad_masses = torch.ops.fdkernels.log_norm_backward(
            grad_loss, sums, masses, pairing, *ctx.arguments
        )
        return grad_sums, grad_masses, None, *([None] * len(ctx.arguments))


def log_norm(
    sums: Tensor,
    masses: Tensor,
    pairing: Tensor | None,
    channels: Sequence[int],
    pixels: Sequence[int],
    options: Options,
    backend: str,
) -> Tensor:
    """The loss of every layer from its region sums; README.md beside this file derives it.

    Args:
        sums: [2, N, ΣC], foreground first, the layers side by side.
        masses: [2, N, L].
        pairing: int64, [N] for shuffle, [K, 2] for pooled (rows with a negative entry do not count), or None.
        channels: C of each layer.
        pixels: P of each layer.
        options: convention, exchange and reduction.
        backend: the name of an available backend.

    Returns:
        [L]; without reduction [N, L], or [ΣC] where the norm runs over the batch. Entries left out are 0.
    """
    loss: Tensor = _LogNorm.apply(sums, masses, pairing, list(channels), list(pixels), *options, backend)
    return loss
