"""The functions of csrc/cpu/norm.cpp over tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fdkernels import _C
from fdkernels.op import norm_packing, packing
from fdkernels.op.norm_formula import Formula, NormInputs, Running
from fdkernels.op.pyramid import Weights

__all__ = ["norm_backward", "norm_forward"]


def norm_forward(
    inputs: NormInputs, formula: Formula, running: Running | None, regions: Weights | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute statistics (N1), output (N2) and region sums of x [N, C, *S].

    A contiguous map is read from memory once, if a cache holds the planes of a channel.
    """
    x = inputs.x
    statistics = norm_packing.room_for_statistics(inputs, formula)
    y = torch.empty_like(x)
    sums = None if regions is None else x.new_empty((2, *x.shape[:2]), dtype=torch.float64)
    _C.cpu_norm_forward(
        *norm_packing.arguments(inputs, formula, None, regions, running),
        statistics.data_ptr(),
        *norm_packing.running_arguments(running),
        y.data_ptr(),
        packing.pointer(sums),
        torch.get_num_threads(),
    )
    return y, statistics, sums


def norm_backward(
    inputs: NormInputs,
    formula: Formula,
    grad_y: Tensor,
    added: tuple[Tensor, Weights] | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients (N5) of x [N, C, *S] and (N4) of γ and β [C], None for what is not needed."""
    assert inputs.statistics is not None
    grads = norm_packing.empty_gradients(inputs, needs)
    slopes, regions = norm_packing.put_slopes(inputs, added)
    _C.cpu_norm_backward(
        *norm_packing.arguments(inputs, formula, grad_y, regions, None),
        inputs.statistics.data_ptr(),
        packing.pointer(grads[0]),
        packing.pointer(slopes),
        packing.pointer(grads[1]),
        packing.pointer(grads[2]),
        torch.get_num_threads(),
    )
    return grads
