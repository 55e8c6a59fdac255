"""The functions of csrc/cuda/norm.cu over tensors, on the current stream of their device."""

from __future__ import annotations

import torch
from torch import Tensor

from fdkernels import _C
from fdkernels.op import norm_packing, packing
from fdkernels.op.norm_formula import Formula, NormInputs, Running
from fdkernels.op.pyramid import Weights, accumulate_dtype
from fdkernels.op.stream import current_stream

__all__ = ["norm_backward", "norm_forward"]


def norm_forward(
    inputs: NormInputs, formula: Formula, running: Running | None, regions: Weights | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute statistics (N1), output (N2) and region sums of x [N, C, *S].

    Three launches, two under given statistics; and one for region sums of planes that several tiles make.
    """
    x = inputs.x
    statistics = norm_packing.room_for_statistics(inputs, formula)
    y = torch.empty_like(x)
    sums = None if regions is None else x.new_empty((2, *x.shape[:2]), dtype=accumulate_dtype([x]))
    workspace: list[Tensor] = []
    _C.cuda_norm_forward(
        *norm_packing.arguments(inputs, formula, None, regions, running),
        statistics.data_ptr(),
        *norm_packing.running_arguments(running),
        y.data_ptr(),
        packing.pointer(sums),
        packing.allocate_in(workspace, x.device),
        x.device.index,
        current_stream(x.device),
    )
    return y, statistics, sums


def norm_backward(
    inputs: NormInputs,
    formula: Formula,
    grad_y: Tensor,
    added: tuple[Tensor, Weights] | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients (N5) of x [N, C, *S] and (N4) of γ and β [C], None for what is not needed.

    Four launches; two under given statistics if no parameter needs a gradient.
    """
    assert inputs.statistics is not None
    device = inputs.x.device
    grads = norm_packing.empty_gradients(inputs, needs)
    slopes, regions = norm_packing.put_slopes(inputs, added)
    workspace: list[Tensor] = []
    _C.cuda_norm_backward(
        *norm_packing.arguments(inputs, formula, grad_y, regions, None),
        inputs.statistics.data_ptr(),
        packing.pointer(grads[0]),
        packing.pointer(slopes),
        packing.pointer(grads[1]),
        packing.pointer(grads[2]),
        packing.allocate_in(workspace, device),
        device.index,
        current_stream(device),
    )
    return grads
