"""Backend `cuda` of layer_losses: the CUDA C++ kernels of csrc/cuda."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdkernels import _C, native
from fdkernels.log_norm.impl import native as log_norm
from fdkernels.log_norm.options import Options
from fdkernels.region_sums.geometry import DTYPE_CODES, Geometry, describe

__all__ = ["backward", "forward"]


def forward(
    features: Sequence[Tensor],
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    pairing: Tensor | None,
    options: Options,
    with_slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [L], sums, masses, and the slopes ∂L_l/∂S_k[n,c] [2, N, ΣC] (empty where not asked for)."""
    batch, device = features[0].shape[0], features[0].device
    layers = describe(features)
    dtype = layers.dtype
    sums = torch.empty((2, batch, sum(layers.channels)), dtype=dtype, device=device)
    masses = torch.empty((2, batch, len(features)), dtype=dtype, device=device)
    loss = log_norm.empty_loss(sums, len(features), options)
    slopes = torch.empty_like(sums) if with_slopes else sums.new_empty(0)
    pairing = log_norm.contiguous(pairing)
    # Used by the launches in the order of the stream, as is whatever gets its memory afterwards.
    workspace: list[Tensor] = []

    def allocate(size: int) -> int:
        workspace.append(torch.empty(size, dtype=torch.uint8, device=device))
        return workspace[0].data_ptr()

    _C.cuda_layer_losses_forward(
        native.forward_words(features, fg, bg, layers),
        batch,
        DTYPE_CODES[dtype],
        log_norm.arguments(sums, pairing, layers.channels, layers.pixels, options),
        sums.data_ptr(),
        masses.data_ptr(),
        loss.data_ptr(),
        slopes.data_ptr() if with_slopes else 0,
        allocate,
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )
    return loss, sums, masses, slopes


def backward(
    grad_loss: Tensor,
    slopes: Tensor,
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    geometry: Sequence[Geometry],
) -> list[Tensor]:
    """The gradients of the features: grad_loss [L] times the slopes, through (R3)."""
    slopes, device = slopes.contiguous(), slopes.device
    grads = [
        torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in geometry
    ]
    added = native.same_dtype(upstream, geometry)
    _C.cuda_layer_losses_backward(
        native.backward_words(grads, fg, bg, added),
        slopes.shape[1],
        DTYPE_CODES[slopes.dtype],
        grad_loss.data_ptr(),
        grad_loss.stride(0),  # 0 where one number was expanded: no copy
        slopes.data_ptr(),
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )
    return grads
