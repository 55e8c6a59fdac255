"""Normalisation and activation under autograd, (N1) to (N5) of README.md.

`NormActPass` is a tap as well (tapped.py): it returns a placeholder for the region sums of its output, and
its backward adds the gradient (R3) of the loss as it reads the one that arrives. With weights that are known
before the output is made the region sums come from the pass that writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdkernels.op.kernels import NormKernels
from fdkernels.op.norm_formula import Formula, NormInputs, Running, is_dense, plain
from fdkernels.op.pyramid import Weights, accumulate_dtype, describe
from fdkernels.op.tapped import TapSlot
from fdkernels.transforms import version_of

__all__ = ["OWN_TAP", "NormActPass", "NormCall", "can_fuse", "norm_act", "own_tap"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def can_fuse(x: Tensor) -> bool:
    """Whether kernels take such an input [N, C, *S]: dense and not empty."""
    return 3 <= x.dim() <= 5 and x.numel() > 0 and x.dtype in _DTYPES and is_dense(x)


# The attribute of an output that `NormActPass` taps itself.
OWN_TAP = "_fdkernels_own_tap"


class OwnTap(NamedTuple):
    """What belongs to an output of `NormActPass`.

    Attributes:
        slot: what the loss leaves for the backward.
        placeholder: [2, N, C], whose gradient is that of the region sums.
        version: of the output as it was made.
    """

    slot: TapSlot
    placeholder: Tensor
    version: int | None


def own_tap(features: Tensor) -> OwnTap | None:
    """What belongs to an output [N, C, *S] of `NormActPass`; None for others, and once changed in place."""
    found: OwnTap | None = getattr(features, OWN_TAP, None)
    # As by `out += residual` behind a block's last normalisation: the loss is of the sum.
    return found if found is not None and found.version == version_of(features) else None


class NormCall(NamedTuple):
    """What a call computes beside its input, γ and β.

    Attributes:
        kernels: that compute.
        formula: what to compute.
        given: mean and variance to use, [2, C] in float64; None takes those of the input.
        running: the statistics to move, where they are not given ones.
        weights_of: gives the weights [N, P] of the two regions for the output, where they are known.
    """

    kernels: NormKernels
    formula: Formula
    given: Tensor | None = None
    running: Running | None = None
    weights_of: Callable[[Tensor], Weights | None] | None = None


def norm_act(call: NormCall, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Normalise and activate an input that `can_fuse` takes.

    Args:
        call: what to compute.
        x: [N, C, *S].
        weight, bias: [C], γ and β, or None for 1 and 0.

    Returns:
        The output [N, C, *S] in the dtype and layout of x.
    """
    slot = TapSlot()
    slot.takes_factor = False
    y: Tensor
    y, placeholder = NormActPass.apply(call, slot, x, weight, bias)
    if y.requires_grad:
        setattr(y, OWN_TAP, OwnTap(slot, placeholder, version_of(y)))
    return y


class NormActPass(torch.autograd.Function):
    """An input, γ and β to the output and a placeholder for its region sums."""

    @staticmethod
    def forward(
        ctx: Any, call: NormCall, slot: TapSlot, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the output [N, C, *S] and the placeholder [2, N, C]."""
        kernels, formula, given, running, weights_of = call
        if weights_of is not None:
            slot.early = weights_of(x)
        inputs = NormInputs(x, weight, bias, given, given is not None)
        y, ctx.statistics, slot.sums = kernels.norm_forward(inputs, formula, running, slot.early)
        ctx.save_for_backward(x, weight, bias)
        ctx.kernels, ctx.formula, ctx.is_given, ctx.slot = kernels, formula, inputs.given, slot
        ctx.set_materialize_grads(False)
        placeholder = x.new_empty((2, *x.shape[:2]), dtype=accumulate_dtype([x]))
        return y, placeholder

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, g: Tensor | None) -> tuple[Tensor | None, ...]:
        """Write the gradients (N4) of γ and β [C] and (N5) of x [N, C, *S].

        Args:
            grad_y: of the output, [N, C, *S].
            g: of the placeholder, [2, N, C], by which (R3) is added.
        """
        x, weight, bias = ctx.saved_tensors
        slot: TapSlot = ctx.slot
        if g is not None and (slot.regions is not None or torch.is_grad_enabled()):
            # A pass of its own for several classes and moments, and for second derivatives.
            grad_y, g = slot.gradient(g, grad_y, describe([x])), None
        if grad_y is None and g is None:
            return None, None, None, None, None
        if grad_y is not None and torch.is_grad_enabled():
            return None, None, *_derivable(ctx, x, weight, bias, grad_y)
        grad_y = torch.zeros_like(x) if grad_y is None else _like(grad_y, x)
        slopes, regions = None, None
        if g is not None:
            slopes, regions = g, slot.weights
        inputs = NormInputs(x, weight, bias, ctx.statistics, ctx.is_given)
        added = None if slopes is None or regions is None else (slopes, regions)
        kernels: NormKernels = ctx.kernels
        needs = ctx.needs_input_grad[_FIRST_INPUT:]
        return None, None, *kernels.norm_backward(inputs, ctx.formula, grad_y, added, needs)


# Where the input, γ and β stand among the arguments of `NormActPass.forward`.
_FIRST_INPUT = 2


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient [N, C, *S] laid out like the input."""
    if grad.stride() == x.stride() and grad.dtype == x.dtype and not grad.is_neg():
        return grad
    return torch.empty_like(x).copy_(grad)


def _derivable(
    ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, grad_y: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of x [N, C, *S], γ and β [C] in plain torch, for second derivatives."""
    inputs = [
        (place, tensor)
        for place, tensor in enumerate((x, weight, bias))
        if tensor is not None and ctx.needs_input_grad[_FIRST_INPUT + place]
    ]
    with torch.enable_grad():
        given = ctx.statistics if ctx.is_given else None
        y = plain(x, weight, bias, given, ctx.formula)
        found = torch.autograd.grad(y, [tensor for _, tensor in inputs], grad_y, create_graph=True)
    grads: list[Tensor | None] = [None] * 3
    for (place, _), grad in zip(inputs, found, strict=True):
        grads[place] = grad
    return tuple(grads)
