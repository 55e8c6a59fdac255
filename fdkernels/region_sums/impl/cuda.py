"""Backend `cuda` of region_sums: the CUDA C++ kernels of csrc/cuda."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdkernels import _C, native
from fdkernels.region_sums.geometry import DTYPE_CODES, Geometry, accumulate_dtype

__all__ = ["backward", "forward"]


def forward(features: Sequence[Tensor], fg: Sequence[Tensor], bg: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums [2, N, ΣC] and masses [2, N, L] by (R2)."""
    batch, device = features[0].shape[0], features[0].device
    channels = sum(layer.shape[1] for layer in features)
    dtype = accumulate_dtype(features)
    sums = torch.empty((2, batch, channels), dtype=dtype, device=device)
    masses = torch.empty((2, batch, len(features)), dtype=dtype, device=device)
    words = native.forward_words(features, fg, bg)
    code = DTYPE_CODES[dtype]
    size = _C.cuda_region_sums_workspace(words, batch, code)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    _C.cuda_region_sums_forward(
        words,
        batch,
        code,
        sums.data_ptr(),
        masses.data_ptr(),
        workspace.data_ptr(),
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
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
    device, code = grad_sums.device, DTYPE_CODES[grad_sums.dtype]
    stream = torch.cuda.current_stream(device).cuda_stream
    grads = [
        torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in geometry
    ]
    if grads:
        added = native.same_dtype(upstream, geometry)
        words = native.backward_words(grads, fg, bg, added)
        batch, pointer = grads[0].shape[0], grad_sums.data_ptr()
        _C.cuda_region_sums_backward(words, batch, code, pointer, device.index, stream)
    grad_fg = [torch.empty(w.shape, dtype=grad_sums.dtype, device=device) for w in fg]
    grad_fg = grad_fg if features else []
    grad_bg = [torch.empty_like(grad) for grad in grad_fg] if bg else []
    if features:
        words = native.mask_backward_words(features, fg, bg, grad_fg, grad_bg)
        batch, pointer = features[0].shape[0], grad_sums.data_ptr()
        _C.cuda_region_sums_mask_backward(words, batch, code, pointer, device.index, stream)
    return grads, grad_fg, grad_bg
