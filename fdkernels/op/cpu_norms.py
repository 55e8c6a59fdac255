"""The functions of csrc/cpu/norm.cpp over tensors."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fdkernels import _C
from fdkernels.op import packing
from fdkernels.op.norm_formula import Formula, NormInputs, Running
from fdkernels.op.pyramid import Weights, accumulate_dtype, describe

__all__ = ["norm_backward", "norm_forward"]


def norm_forward(
    inputs: NormInputs, formula: Formula, running: Running | None, regions: Weights | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute statistics (N1), output (N2) and region sums of x [N, C, *S].

    A contiguous map is read from memory once, if a cache holds the planes of a channel.
    """
    x, statistics = inputs.x, inputs.statistics
    if statistics is None:
        shape = (2, *x.shape[:2]) if formula.instance else (2, x.shape[1])
        statistics = torch.empty(shape, dtype=torch.float64, device=x.device)
    elif formula.instance and statistics.dim() == 2:
        statistics = statistics.unsqueeze(1).expand(2, *x.shape[:2]).contiguous()
    y = torch.empty_like(x)
    sums = None if regions is None else x.new_empty((2, *x.shape[:2]), dtype=torch.float64)
    _C.cpu_norm_forward(
        *_arguments(inputs, formula, None, regions, running),
        statistics.data_ptr(),
        0 if running is None else running.mean.data_ptr(),
        0 if running is None else running.variance.data_ptr(),
        0.0 if running is None else running.momentum,
        y.data_ptr(),
        packing.pointer(sums),
        torch.get_num_threads(),
    )
    return y, statistics, None if sums is None else sums.to(accumulate_dtype([x]))


def norm_backward(
    inputs: NormInputs,
    formula: Formula,
    grad_y: Tensor,
    added: tuple[Tensor, Weights] | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients (N5) of x [N, C, *S] and (N4) of γ and β [C], None for what is not needed."""
    x, weight, bias, statistics, _ = inputs
    assert statistics is not None
    grad_x = torch.empty_like(x) if needs[0] else None
    grad_weight = torch.empty_like(weight) if weight is not None and needs[1] else None
    grad_bias = torch.empty_like(bias) if bias is not None and needs[2] else None
    slopes, regions = (None, None) if added is None else added
    slopes = None if slopes is None else slopes.to(accumulate_dtype([x])).contiguous()
    _C.cpu_norm_backward(
        *_arguments(inputs, formula, grad_y, regions, None),
        statistics.data_ptr(),
        packing.pointer(grad_x),
        packing.pointer(slopes),
        packing.pointer(grad_weight),
        packing.pointer(grad_bias),
        torch.get_num_threads(),
    )
    return grad_x, grad_weight, grad_bias


def _arguments(
    inputs: NormInputs,
    formula: Formula,
    grad_y: Tensor | None,
    regions: Weights | None,
    running: Running | None,
) -> tuple[list[int], int, _C.DType, _C.NormFormula, bool, int, int, _C.DType]:
    """The arguments that both functions begin with, in the order of the stub."""
    x, weight, bias, _, given = inputs
    kept = weight if weight is not None else bias
    if kept is None and running is not None:
        kept = running.mean
    pyramid = describe([x])
    return (
        packing.norm_words(x, grad_y, regions, pyramid),
        x.shape[0],
        packing.DTYPES[pyramid.dtype],
        _formula(formula),
        given,
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        packing.DTYPES[torch.float32 if kept is None else kept.dtype],
    )


@lru_cache(maxsize=64)
def _formula(formula: Formula) -> _C.NormFormula:
    return _C.NormFormula(
        activation=_C.Activation.__members__[formula.activation],
        slope=formula.slope,
        activation_first=formula.activation_first and formula.activation != "none",
        instance=formula.instance,
        eps=formula.eps,
    )
