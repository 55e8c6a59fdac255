"""What the compiled kernels of masks take, and where they write."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fdkernels import _C
from fdkernels.checks import mask_tolerance
from fdkernels.op import packing
from fdkernels.op.pyramid import Weights, weight_dtype

__all__ = ["RESIZES", "arguments", "empty_weights", "readable"]

# Codes by the names of fdkernels/conventions.py.
RESIZES = dict(_C.MaskResize.__members__)
_DTYPES = {**packing.DTYPES, torch.bool: _C.DType.uint8}

# Offsets of the words of a `MaskSize`, and their number.
_SIZE, _SIZE_WORDS = _C.mask_size_fields, _C.mask_size_words
_SIZE_FG, _SIZE_BG = _SIZE["fg"], _SIZE["bg"]


def readable(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a mask [N, 1, *S0] of an 8-bit floating-point dtype, which no kernel reads, to `dtype`."""
    return mask if mask.dtype in _DTYPES else mask.to(dtype)


def arguments(
    mask: Tensor, ignore_index: float | None
) -> tuple[int, _C.DType, int, list[int], int, list[int], bool, float, int, float]:
    """The arguments from `mask` to `tolerance` of the stub, for a mask [N, 1, *S0]."""
    return mask.data_ptr(), *_arguments(mask.shape, mask.stride(), mask.dtype, ignore_index)


@lru_cache(maxsize=64)
def _arguments(
    shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, ignore_index: float | None
) -> tuple[_C.DType, int, list[int], int, list[int], bool, float, int, float]:
    """Those beside the pointer."""
    missing = 5 - len(shape)
    rounds = ignore_index is not None and dtype.is_floating_point  # as torch does where it compares the two
    value = float(torch.tensor(ignore_index, dtype=dtype, device="cpu").item()) if rounds else 0.0
    number = 0 if rounds or ignore_index is None else int(ignore_index)
    return (
        _DTYPES[dtype],
        shape[0],
        [*[1] * missing, *shape[2:]],
        stride[0],
        [*[0] * missing, *stride[2:]],
        ignore_index is not None,
        value,
        number,
        mask_tolerance(dtype),
    )


def empty_weights(
    mask: Tensor,
    sizes: Sequence[torch.Size],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
) -> tuple[Weights, list[int]]:
    """Allocate the weights of a mask [N, 1, *S0] at `sizes`, and pack them."""
    batch, device = mask.shape[0], mask.device
    table = _size_table(tuple(sizes), mask.shape[2:], mask.dtype, dtype, mask_resize)
    words = table.words.copy()
    fg = [torch.empty((batch, pixels), dtype=stored, device=device) for pixels, stored in table.weights]
    words[_SIZE_FG::_SIZE_WORDS] = [weight.data_ptr() for weight in fg]
    if ignore_index is None:
        return Weights(fg, []), words
    bg = [torch.empty((batch, pixels), dtype=stored, device=device) for pixels, stored in table.weights]
    words[_SIZE_BG::_SIZE_WORDS] = [weight.data_ptr() for weight in bg]
    return Weights(fg, bg), words


class _SizeTable(NamedTuple):
    """A `MaskSize` of csrc/op.h for each size with 0 for its pointers, and P and the dtype of its weights."""

    words: list[int]
    weights: list[tuple[int, torch.dtype]]


@lru_cache(maxsize=64)
def _size_table(
    sizes: tuple[torch.Size, ...],
    full: torch.Size,
    mask_dtype: torch.dtype,
    dtype: torch.dtype,
    mask_resize: str,
) -> _SizeTable:
    words = [0] * (_SIZE_WORDS * len(sizes))
    weights = []
    for index, size in enumerate(sizes):
        stored = weight_dtype(mask_dtype, size == full, dtype, mask_resize)
        start = index * _SIZE_WORDS
        packing.put_extents(words, start + _SIZE["size"], size, missing=1)
        words[start + _SIZE["dtype"]] = packing.WORD_OF_DTYPE[stored]
        weights.append((size.numel(), stored))
    return _SizeTable(words, weights)
