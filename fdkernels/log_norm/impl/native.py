"""What the backends `cpu` and `cuda` of log_norm share: the arguments of fdkernels._C and a loss's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fdkernels.log_norm.options import EXCHANGES, NORMS, REDUCTIONS, REGION_WEIGHTS, Options
from fdkernels.region_sums.geometry import DTYPE_CODES


def arguments(
    sums: Tensor,
    pairing: Tensor | None,
    channels: Sequence[int],
    pixels: Sequence[int],
    options: Options,
) -> tuple[Any, ...]:
    """`LogNorm` of csrc/log_norm.h, field by field. `pairing` must be contiguous and outlive the call."""
    return (
        sums.shape[1],
        list(channels),
        list(pixels),
        0 if pairing is None else pairing.data_ptr(),
        0 if pairing is None else pairing.shape[0],
        REGION_WEIGHTS.index(options.region_weight),
        options.masked_background,
        NORMS.index(options.norm),
        EXCHANGES.index(options.exchange),
        REDUCTIONS.index(options.reduction),
        options.log_scale,
        options.eps,
        DTYPE_CODES[sums.dtype],
    )


def empty_loss(sums: Tensor, num_layers: int, options: Options) -> Tensor:
    """An unwritten loss: [L], or without reduction [N, L] ([ΣC] over the batch)."""
    if options.reduction != "none":
        return torch.empty(num_layers, dtype=sums.dtype, device=sums.device)
    if options.norm == "batch":
        return torch.empty(sums.shape[-1], dtype=sums.dtype, device=sums.device)
    return torch.empty((sums.shape[1], num_layers), dtype=sums.dtype, device=sums.device)


def contiguous(pairing: Tensor | None) -> Tensor | None:
    """The pairing as the kernels read it."""
    return None if pairing is None else pairing.contiguous()
