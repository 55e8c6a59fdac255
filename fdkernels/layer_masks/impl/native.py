"""What backends `cpu` and `cuda` of layer_masks share: empty weights and the words that describe them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fdkernels.conventions import MASK_RESIZES
from fdkernels.layer_masks.rule import weight_dtype
from fdkernels.region_sums.geometry import DTYPE_CODES

# The codes of `enum class DType` in csrc/region_sums.h for masks as a user gives them.
MASK_CODES = {
    **DTYPE_CODES,
    torch.bool: DTYPE_CODES[torch.uint8],
    torch.int8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
}


def empty_weights(
    mask: Tensor,
    sizes: Sequence[torch.Size],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Unwritten weights [N, P] of the foreground and, where pixels are left out, of the background."""
    full, batch = mask.shape[2:], mask.shape[0]
    dtypes = [weight_dtype(mask.dtype, size == full, dtype, mask_resize) for size in sizes]
    fg: list[Tensor] = []
    bg: list[Tensor] = []
    for weights in (fg,) if ignore_index is None else (fg, bg):
        for size, kind in zip(sizes, dtypes, strict=True):
            weights.append(torch.empty(batch, size.numel(), dtype=kind, device=mask.device))
    return fg, bg


def arguments(
    mask: Tensor, dtype: torch.dtype, mask_resize: str, ignore_index: float | None
) -> tuple[Any, ...]:
    """`LayerMasks` of csrc/layer_masks.h, field by field, without its sizes. The mask is [N, 1, *S0]."""
    missing = 5 - mask.dim()
    value, number = 0.0, 0
    if ignore_index is not None and mask.dtype.is_floating_point:
        value = _as_the_mask_holds_it(ignore_index, mask.dtype)
    elif ignore_index is not None:
        number = int(ignore_index)
    return (
        mask.data_ptr(),
        MASK_CODES[mask.dtype],
        mask.shape[0],
        [1] * missing + list(mask.shape[2:]),
        mask.stride(0),
        [0] * missing + list(mask.stride()[2:]),
        ignore_index is not None,
        value,
        number,
        MASK_RESIZES.index(mask_resize),
        DTYPE_CODES[dtype],
    )


def size_words(sizes: Sequence[torch.Size], fg: Sequence[Tensor], bg: Sequence[Tensor]) -> list[int]:
    """Describe the weights that are written: `MaskSize` of csrc/layer_masks.h for each size, as one list."""
    words: list[int] = []
    for index, size in enumerate(sizes):
        words += [fg[index].data_ptr(), bg[index].data_ptr() if bg else 0]
        words += [1] * (3 - len(size)) + list(size)
        words.append(DTYPE_CODES[fg[index].dtype])
    return words


@lru_cache(maxsize=32)
def _as_the_mask_holds_it(ignore_index: float, dtype: torch.dtype) -> float:
    """A value rounded as torch rounds it where it compares it with a mask of that dtype."""
    return float(torch.tensor(ignore_index, dtype=dtype).item())
