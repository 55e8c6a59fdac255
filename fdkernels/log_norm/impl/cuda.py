"""Backend `cuda` of log_norm: the CUDA C++ kernels of csrc/cuda."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdkernels import _C
from fdkernels.log_norm.impl import native
from fdkernels.log_norm.options import Options

__all__ = ["backward", "forward"]


def forward(
    sums: Tensor,
    masses: Tensor,
    pairing: Tensor | None,
    channels: Sequence[int],
    pixels: Sequence[int],
    options: Options,
) -> Tensor:
    """Losses [L], or [N, L] ([ΣC] over the batch) without reduction, by (L1) to (L6)."""
    sums, masses, pairing = sums.contiguous(), masses.contiguous(), native.contiguous(pairing)
    loss = native.empty_loss(sums, len(channels), options)
    _C.cuda_log_norm_forward(
        native.arguments(sums, pairing, channels, pixels, options),
        sums.data_ptr(),
        masses.data_ptr(),
        loss.data_ptr(),
        *_device_and_stream(sums),
    )
    return loss


def backward(
    grad_loss: Tensor,
    sums: Tensor,
    masses: Tensor,
    pairing: Tensor | None,
    channels: Sequence[int],
    pixels: Sequence[int],
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The gradients of sums [2, N, ΣC] and masses [2, N, L], by (L7)."""
    sums, masses, pairing = sums.contiguous(), masses.contiguous(), native.contiguous(pairing)
    grad_loss = grad_loss.contiguous()
    grad_sums, grad_masses = torch.empty_like(sums), torch.empty_like(masses)
    _C.cuda_log_norm_backward(
        native.arguments(sums, pairing, channels, pixels, options),
        grad_loss.data_ptr(),
        sums.data_ptr(),
        masses.data_ptr(),
        grad_sums.data_ptr(),
        grad_masses.data_ptr(),
        *_device_and_stream(sums),
    )
    return grad_sums, grad_masses


def _device_and_stream(tensor: Tensor) -> tuple[int, int]:
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
