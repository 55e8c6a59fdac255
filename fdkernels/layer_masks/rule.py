"""In which dtype the weights of a layer are stored; all backends go by it."""

from __future__ import annotations

import torch


def weight_dtype(mask: torch.dtype, is_full_size: bool, dtype: torch.dtype, mask_resize: str) -> torch.dtype:
    """uint8 where every weight of a layer is 0 or 1, else the accumulation dtype.

    Args:
        mask: dtype of the mask that the user gave.
        is_full_size: whether the layer has the mask's own size.
        dtype: the accumulation dtype.
        mask_resize: `"area"`, `"max"` or `"nearest"`.
    """
    stays_binary = not mask.is_floating_point and (is_full_size or mask_resize != "area")
    return torch.uint8 if stays_binary else dtype
