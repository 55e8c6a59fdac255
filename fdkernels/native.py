"""The words in which tensors are described to fdkernels._C: pointers, sizes and strides as plain integers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fdkernels.region_sums.geometry import DTYPE_CODES, LAYER_WORDS, Geometry, Layers, describe

# The places of words within a `Layer` of csrc/region_sums.h.
_FEATURES, _FG, _BG, _MASK_DTYPE, _UPSTREAM, _GRAD_FG, _GRAD_BG = 0, 11, 12, 13, 14, 20, 21


def forward_words(
    features: Sequence[Tensor], fg: Sequence[Tensor], bg: Sequence[Tensor], layers: Layers | None = None
) -> list[int]:
    """Describe layers that are read: `Layer` of csrc/region_sums.h for each, as one flat list.

    `layers` is the description of `features`, where the caller has it already.
    """
    words = (layers or describe(features)).words.copy()
    words[_FEATURES::LAYER_WORDS] = [layer.data_ptr() for layer in features]
    words[_FG::LAYER_WORDS] = [weight.data_ptr() for weight in fg]
    if bg:
        words[_BG::LAYER_WORDS] = [weight.data_ptr() for weight in bg]
    words[_MASK_DTYPE::LAYER_WORDS] = [DTYPE_CODES[weight.dtype] for weight in fg]
    return words


def backward_words(
    grads: Sequence[Tensor],
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
) -> list[int]:
    """Describe gradients that are written, and the ones that are added to them."""
    words = forward_words(grads, fg, bg)
    for index, added in enumerate(upstream):
        if added is not None:
            stride = added.stride()
            start = index * LAYER_WORDS + _UPSTREAM
            words[start : start + 6] = [
                added.data_ptr(),
                *stride[:2],
                *[0] * (5 - len(stride)),
                *stride[2:],
            ]
    return words


def mask_backward_words(
    features: Sequence[Tensor],
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    grad_fg: Sequence[Tensor],
    grad_bg: Sequence[Tensor],
) -> list[int]:
    """Describe layers that are read and mask gradients that are written."""
    words = forward_words(features, fg, bg)
    words[_GRAD_FG::LAYER_WORDS] = [grad.data_ptr() for grad in grad_fg]
    if grad_bg:
        words[_GRAD_BG::LAYER_WORDS] = [grad.data_ptr() for grad in grad_bg]
    return words


def same_dtype(upstream: Sequence[Tensor | None], geometry: Sequence[Geometry]) -> list[Tensor | None]:
    """The upstream gradients in the dtype of the layer to which they belong, which the kernels read."""
    return [
        None if added is None else added.to(layer.dtype)
        for added, layer in zip(upstream, geometry, strict=False)
    ]
