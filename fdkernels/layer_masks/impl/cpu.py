"""Backend `cpu` of layer_masks: the C++ kernel of csrc/cpu."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fdkernels import _C
from fdkernels.layer_masks.rule import weight_dtype
from fdkernels.region_sums.geometry import DTYPE_CODES

__all__ = ["forward"]

# The position of a name is its code in csrc/cpu/layer_masks.h; so are the codes of dtypes.
_RESIZES = ("area", "max", "nearest")
_MASK_CODES = {
    torch.bool: 0,
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float32: 5,
    torch.float64: 6,
    torch.bfloat16: 7,
    torch.float16: 8,
}


def forward(
    mask: Tensor,
    sizes: Sequence[torch.Size],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The weights (M3) to (M5) [N, P] of every size; none of the background where every pixel is valid."""
    if mask.dtype not in _MASK_CODES:
        mask = mask.to(dtype)  # a float of 8 bits
    full, stride, padding = mask.shape[2:], mask.stride(), 5 - mask.dim()
    words = [mask.data_ptr(), _MASK_CODES[mask.dtype], mask.shape[0], *[1] * padding, *full]
    words += [
        stride[0],
        *[0] * padding,
        *stride[2:],
        _RESIZES.index(mask_resize),
        int(ignore_index is not None),
    ]
    fg, bg = [], []
    for size in sizes:
        stored = weight_dtype(mask.dtype, size == full, dtype, mask_resize)
        weight = torch.empty((mask.shape[0], size.numel()), dtype=stored)
        fg.append(weight)
        if ignore_index is not None:
            bg.append(torch.empty_like(weight))
        background = bg[-1].data_ptr() if bg else 0
        words += [*[1] * padding, *size, weight.data_ptr(), background, DTYPE_CODES[stored]]
    ignored = 0.0 if ignore_index is None else _as_the_mask_holds_it(ignore_index, mask.dtype)
    _C.cpu_layer_masks(words, ignored, torch.get_num_threads())
    return fg, bg


@lru_cache(maxsize=32)
def _as_the_mask_holds_it(ignore_index: float, dtype: torch.dtype) -> float:
    """A value rounded as torch rounds it where it compares it with a mask of that dtype."""
    return float(torch.tensor(ignore_index, dtype=dtype).item())
