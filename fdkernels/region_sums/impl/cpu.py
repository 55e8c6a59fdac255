"""Backend `cpu` of region_sums: the C++ kernels of csrc/cpu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdkernels import _C, native
from fdkernels.region_sums.geometry import DTYPE_CODES, Geometry, accumulate_dtype

__all__ = ["backward", "forward"]


def forward(features: Sequence[Tensor], fg: Sequence[Tensor], bg: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums [2, N, ΣC] and masses [2, N, L] by (R2)."""
    batch = features[0].shape[0]
    channels = sum(layer.shape[1] for layer in features)
    dtype = accumulate_dtype(features)
    sums = torch.empty((2, batch, channels), dtype=dtype)
    masses = torch.empty((2, batch, len(features)), dtype=dtype)
    _C.cpu_region_sums_forward(
        native.forward_words(features, fg, bg),
        batch,
        DTYPE_CODES[dtype],
        sums.data_ptr(),
        masses.data_ptr(),
        torch.get_num_threads(),
    )
    return sums, masses


def backward(
    grad_sums: Tensor,
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    features: Sequence[Tensor],
    geometry: Sequence[Geometry],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The gradients (R3) for the layers of `geometry` and (R4) for the masks of `features`."""
    grad_sums = grad_sums.contiguous()
    code, threads = DTYPE_CODES[grad_sums.dtype], torch.get_num_threads()
    grads = [torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in geometry]
    if grads:
        added = native.same_dtype(upstream, geometry)
        words = native.backward_words(grads, fg, bg, added)
        batch = grads[0].shape[0]
        _C.cpu_region_sums_backward(words, batch, code, grad_sums.data_ptr(), threads)
    grad_fg = [torch.empty(w.shape, dtype=grad_sums.dtype) for w in fg] if features else []
    grad_bg = [torch.empty_like(grad) for grad in grad_fg] if bg else []
    if features:
        words = native.mask_backward_words(features, fg, bg, grad_fg, grad_bg)
        batch = features[0].shape[0]
        _C.cpu_region_sums_mask_backward(words, batch, code, grad_sums.data_ptr(), threads)
    return grads, grad_fg, grad_bg
