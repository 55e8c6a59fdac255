"""Backend `cpu` of layer_losses: the C++ kernels of csrc/cpu, one call forward and one backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdkernels import _C, native
from fdkernels.log_norm.impl.native import arguments, contiguous
from fdkernels.log_norm.options import Options
from fdkernels.region_sums.geometry import DTYPE_CODES, Geometry, accumulate_dtype

__all__ = ["backward", "forward"]


def forward(
    features: Sequence[Tensor],
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    pairing: Tensor | None,
    options: Options,
    with_slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [L], sums, masses, and the slopes (F1) [2, N, ΣC] (empty where not asked for)."""
    batch, num_layers, dtype = features[0].shape[0], len(features), accumulate_dtype(features)
    channels = [layer.shape[1] for layer in features]
    pixels = [weight.shape[1] for weight in fg]
    sums = torch.empty((2, batch, sum(channels)), dtype=dtype)
    masses = torch.empty((2, batch, num_layers), dtype=dtype)
    loss = torch.empty(num_layers, dtype=dtype)
    slopes = torch.empty(sums.shape if with_slopes else 0, dtype=dtype)
    pairing = contiguous(pairing)
    _C.cpu_layer_losses_forward(
        native.forward_words(features, fg, bg),
        arguments(sums, pairing, channels, pixels, options),
        sums.data_ptr(),
        masses.data_ptr(),
        loss.data_ptr(),
        slopes.data_ptr() if with_slopes else 0,
        torch.get_num_threads(),
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
    """The gradients of the features (F2)."""
    grad_loss, slopes = grad_loss.contiguous(), slopes.contiguous()
    grads = [torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in geometry]
    _C.cpu_layer_losses_backward(
        native.backward_words(grads, fg, bg, native.same_dtype(upstream, geometry)),
        grads[0].shape[0],
        DTYPE_CODES[slopes.dtype],
        grad_loss.data_ptr(),
        slopes.data_ptr(),
        torch.get_num_threads(),
    )
    return grads
