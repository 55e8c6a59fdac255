"""What the compiled kernels of a normalisation take, and where they write."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fdkernels import _C
from fdkernels.op import packing
from fdkernels.op.norm_formula import Formula, NormInputs, Running
from fdkernels.op.pyramid import Weights, accumulate_dtype, describe

__all__ = ["arguments", "empty_gradients", "put_slopes", "room_for_statistics", "running_arguments"]


def arguments(
    inputs: NormInputs,
    formula: Formula,
    grad_y: Tensor | None,
    regions: Weights | None,
    running: Running | None,
) -> tuple[list[int], int, _C.DType, _C.NormFormula, bool, int, int, _C.DType]:
    """The arguments that all functions begin with, in the order of the stub, for x and grad_y [N, C, *S]."""
    x, weight, bias, _, given = inputs
    kept = weight if weight is not None else bias
    if kept is None and running is not None:
        kept = running.mean
    known = _known(x.shape, x.stride(), x.dtype, formula)
    return (
        packing.norm_words(known.words, x, grad_y, regions),
        x.shape[0],
        known.accumulate,
        known.formula,
        given,
        packing.pointer(weight),
        packing.pointer(bias),
        packing.DTYPES[torch.float32 if kept is None else kept.dtype],
    )


def running_arguments(running: Running | None) -> tuple[int, int, float]:
    """The arguments from `running_mean` to `momentum` of the stub."""
    if running is None:
        return 0, 0, 0.0
    return running.mean.data_ptr(), running.variance.data_ptr(), running.momentum


def room_for_statistics(inputs: NormInputs, formula: Formula) -> Tensor:
    """The statistics that forward reads or writes, [2, C] or of the samples [2, N, C]."""
    x, statistics = inputs.x, inputs.given_statistics(formula)
    if statistics is not None:
        return statistics
    shape = (2, *x.shape[:2]) if formula.instance else (2, x.shape[1])
    return x.new_empty(shape, dtype=torch.float64)


def empty_gradients(
    inputs: NormInputs, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Allocate the gradients of x [N, C, *S], γ and β [C] that are needed."""
    x, weight, bias = inputs[:3]
    return (
        torch.empty_like(x) if needs[0] else None,
        torch.empty_like(weight) if weight is not None and needs[1] else None,
        torch.empty_like(bias) if bias is not None and needs[2] else None,
    )


def put_slopes(
    inputs: NormInputs, added: tuple[Tensor, Weights] | None
) -> tuple[Tensor | None, Weights | None]:
    """Slopes [2, N, C] as the kernels read them, which must outlive the call, and their weights [N, P]."""
    if added is None:
        return None, None
    slopes, regions = added
    return slopes.to(accumulate_dtype([inputs.x])).contiguous(), regions


class _Known(NamedTuple):
    """What all calls of one formula with inputs of one kind share.

    Attributes:
        words: the layer, with 0 for what a call fills in.
        accumulate: dtype of sums.
        formula: as the kernels take it.
    """

    words: list[int]
    accumulate: _C.DType
    formula: _C.NormFormula


@lru_cache(maxsize=256)
def _known(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, formula: Formula) -> _Known:
    pyramid = describe([torch.empty_strided(shape, stride, dtype=dtype, device="meta")])
    compiled = _C.NormFormula(
        activation=_C.Activation.__members__[formula.activation],
        slope=formula.slope,
        activation_first=formula.activation_first and formula.activation != "none",
        instance=formula.instance,
        eps=formula.eps,
    )
    return _Known(packing.features_words(pyramid), packing.DTYPES[pyramid.dtype], compiled)
