"""Backend `cpu` of layer_masks: the C++ kernel of csrc/cpu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdkernels import _C
from fdkernels.layer_masks.impl import native

__all__ = ["forward", "has_valid_values"]


def forward(
    mask: Tensor,
    sizes: Sequence[torch.Size],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The weights (M3) to (M5) [N, P] of every size; none of the background where every pixel is valid."""
    if mask.dtype not in native.MASK_CODES:
        mask = mask.to(dtype)  # a float of 8 bits
    fg, bg = native.empty_weights(mask, sizes, dtype, mask_resize, ignore_index)
    _C.cpu_layer_masks(
        native.arguments(mask, dtype, mask_resize, ignore_index),
        native.size_words(sizes, fg, bg),
        torch.get_num_threads(),
    )
    return fg, bg


def has_valid_values(mask: Tensor, ignore_index: float) -> bool:
    """Whether a mask [N, 1, *S0] holds values in [0, 1], of integers 0 and 1, beside `ignore_index`."""
    if mask.dtype not in native.MASK_CODES:
        mask = mask.float()
    words = native.arguments(mask, torch.float32, "area", ignore_index)
    return _C.cpu_layer_masks_is_valid(words, torch.get_num_threads())
