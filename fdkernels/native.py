"""The words in which tensors are described to fdkernels._C: pointers, sizes and strides as plain integers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdkernels.region_sums.geometry import DTYPE_CODES, Geometry

_NO_UPSTREAM = [0] * 6


def forward_words(features: Sequence[Tensor], fg: Sequence[Tensor], bg: Sequence[Tensor]) -> list[int]:
    """Describe layers that are read: `Layer` of csrc/region_sums.h for each, as one flat list."""
    words: list[int] = []
    for index, layer in enumerate(features):
        words += _layer(layer.data_ptr(), layer.dtype, layer.shape, layer.stride())
        words += _mask(fg[index], bg[index] if bg else None)
        words += _NO_UPSTREAM
        words += [0, 0]
    return words


def backward_words(
    grads: Sequence[Tensor],
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
) -> list[int]:
    """Describe gradients that are written, and the ones that are added to them."""
    words: list[int] = []
    for index, grad in enumerate(grads):
        words += _layer(grad.data_ptr(), grad.dtype, grad.shape, grad.stride())
        words += _mask(fg[index], bg[index] if bg else None)
        added = upstream[index] if upstream else None
        if added is None:
            words += _NO_UPSTREAM
        else:
            words += [added.data_ptr(), *_strides(added.stride())]
        words += [0, 0]
    return words


def mask_backward_words(
    features: Sequence[Tensor],
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    grad_fg: Sequence[Tensor],
    grad_bg: Sequence[Tensor],
) -> list[int]:
    """Describe layers that are read and mask gradients that are written."""
    words: list[int] = []
    for index, layer in enumerate(features):
        words += _layer(layer.data_ptr(), layer.dtype, layer.shape, layer.stride())
        words += _mask(fg[index], bg[index] if bg else None)
        words += _NO_UPSTREAM
        words += [grad_fg[index].data_ptr(), grad_bg[index].data_ptr() if grad_bg else 0]
    return words


def same_dtype(upstream: Sequence[Tensor | None], geometry: Sequence[Geometry]) -> list[Tensor | None]:
    """The upstream gradients in the dtype of the layer to which they belong, which the kernels read."""
    return [
        None if added is None else added.to(layer.dtype)
        for added, layer in zip(upstream, geometry, strict=False)
    ]


def _layer(pointer: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    if len(shape) == 4:  # the common case, written out because small calls are made of this
        c, h, w = shape[1:]
        s_n, s_c, s_h, s_w = stride
        return pointer, DTYPE_CODES[dtype], c, 1, h, w, s_n, s_c, 0, s_h, s_w
    padding = [1] * (5 - len(shape))
    return (pointer, DTYPE_CODES[dtype], shape[1], *padding, *shape[2:], *_strides(stride))


def _strides(stride: Sequence[int]) -> list[int]:
    return [stride[0], stride[1], *[0] * (5 - len(stride)), *stride[2:]]


def _mask(fg: Tensor, bg: Tensor | None) -> tuple[int, int, int]:
    return fg.data_ptr(), 0 if bg is None else bg.data_ptr(), DTYPE_CODES[fg.dtype]
