"""Backend `cuda` of layer_masks: the CUDA C++ kernel of csrc/cuda, one launch for all sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdkernels import _C
from fdkernels.layer_masks.impl import native, reference

__all__ = ["forward"]


def forward(
    mask: Tensor,
    sizes: Sequence[torch.Size],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The weights v·y and v·(1-y) [N, P] of every size; none of the second where every pixel is valid."""
    if mask.dtype not in native.MASK_CODES:  # the 8-bit floating-point ones
        return reference.forward(mask, sizes, dtype, mask_resize, ignore_index)
    fg, bg = native.empty_weights(mask, sizes, dtype, mask_resize, ignore_index)
    _C.cuda_layer_masks(
        native.arguments(mask, dtype, mask_resize, ignore_index),
        native.size_words(sizes, fg, bg),
        mask.device.index,
        torch.cuda.current_stream(mask.device).cuda_stream,
    )
    return fg, bg
