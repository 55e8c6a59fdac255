"""Backend `cpu` of layer_losses: the C++ kernels of csrc/cpu, one call forward and one backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdkernels import _C, native
from fdkernels.log_norm.impl.native import arguments, contiguous
from fdkernels.log_norm.options import Options
from fdkernels.region_sums.geometry import DTYPE_CODES, Geometry, describe

__all__ = ["COMBINES", "backward", "forward"]

# `forward` can give the one loss of all layers, and its slopes.
COMBINES = True


def forward(
    features: Sequence[Tensor],
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    pairing: Tensor | None,
    options: Options,
    with_slopes: bool,
    share: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [L], sums, masses, and the slopes (F1) [2, N, ΣC] (empty where not asked for).

    With a `share` other than 0 the loss is one number [], Σ_l share·L_l, and so are the slopes those of it.
    """
    batch, num_layers, layers = features[0].shape[0], len(features), describe(features)
    dtype = layers.dtype
    sums = torch.empty(2, batch, sum(layers.channels), dtype=dtype)
    masses = torch.empty(2, batch, num_layers, dtype=dtype)
    loss = torch.empty(() if share else num_layers, dtype=dtype)
    slopes = torch.empty(sums.shape if with_slopes else 0, dtype=dtype)
    pairing = contiguous(pairing)
    _C.cpu_layer_losses_forward(
        native.forward_words(features, fg, bg, layers),
        arguments(sums, pairing, layers.channels, layers.pixels, options),
        share,
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
    """The gradients of the features (F2); `grad_loss` is [L], or [] for slopes of the one loss."""
    slopes = slopes.contiguous()
    grads = [torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in geometry]
    _C.cpu_layer_losses_backward(
        native.backward_words(grads, fg, bg, native.same_dtype(upstream, geometry)),
        grads[0].shape[0],
        DTYPE_CODES[slopes.dtype],
        grad_loss.data_ptr(),
        grad_loss.stride(0) if grad_loss.dim() else 0,
        slopes.data_ptr(),
        torch.get_num_threads(),
    )
    return grads
