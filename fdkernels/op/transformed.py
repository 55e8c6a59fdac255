"""The op under torch.func's transforms and forward-mode differentiation, which see plain torch alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fdkernels.exchange import Ranks
from fdkernels.op import reference
from fdkernels.op.autograd import Call
from fdkernels.op.pyramid import Weights

__all__ = ["refuse_group", "run_transformed"]


def run_transformed(
    call: Call, features: Sequence[Tensor], weights: Weights, pairing: Tensor | None
) -> tuple[Tensor, ...]:
    """Compute what `run_pass` returns, differentiable in every way that torch knows.

    Args:
        call: what to compute; its backend is the reference.
        features: [N, C_l, *S_l] for each layer.
        weights: [N, P_l] for each layer.
        pairing: as for `Kernels.sums`.

    Raises:
        RuntimeError: the call gathers the batch of a group, which no transform sees through.
    """
    refuse_group(call.ranks)
    sums, masses = reference.sums(features, weights, call.pyramid, None, None, with_slopes=False)[:2]
    aliases = [layer.view_as(layer) for layer in features] if call.tap else []
    if call.options is None:
        return sums, masses, *aliases
    wide = reference.wide(sums), reference.wide(masses)
    losses = reference.losses_of(*wide, call.pyramid, call.options, pairing)
    return losses.to(sums.dtype), sums, *aliases


def refuse_group(ranks: Ranks | None) -> None:
    """Raise RuntimeError for a group of ranks, whose batch no transform can see."""
    if ranks is not None:
        raise RuntimeError(
            "group must be None inside torch.func's transforms and forward-mode differentiation, got a "
            "process group; gather the region sums outside of them"
        )
