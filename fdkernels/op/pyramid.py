"""What a call consists of: its layers without their values, their weights, and what the kernels return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "NO_WEIGHT",
    "Layer",
    "Pyramid",
    "Regions",
    "Sums",
    "Weights",
    "accumulate_dtype",
    "describe",
    "pack",
    "select_layers",
    "unpack",
    "weight_dtype",
]

_FEATURE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Of weights in bytes: the pixel holds a value that is no weight, which is NaN in a floating-point dtype.
NO_WEIGHT = 255


class Layer(NamedTuple):
    """Shape [N, C, *S], strides and dtype of the gradient of a layer.

    The strides are those of the features, made dense where these are sliced or expanded.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def channels(self) -> int:
        """C."""
        return self.shape[1]

    @property
    def pixels(self) -> int:
        """P, the product of S."""
        pixels = 1
        for extent in self.shape[2:]:  # torch 2.6 makes no torch.Size of sizes that it keeps symbolic
            pixels *= extent
        return pixels


@dataclass(frozen=True, eq=False)
class Pyramid:
    """The layers of a call; calls with the same layers share one, so that caches can go by its identity.

    Attributes:
        layers: the gradients of L layers, of one batch size and device.
        strides: of the features themselves, [N, C, *S].
        channels, pixels: C_l and P_l of each.
        total_channels: ΣC.
        dtype: the accumulation dtype, that of sums, masses and losses.
    """

    layers: tuple[Layer, ...]
    strides: tuple[tuple[int, ...], ...]
    channels: tuple[int, ...]
    pixels: tuple[int, ...]
    total_channels: int
    dtype: torch.dtype

    def select(self, indices: Sequence[int]) -> Pyramid:
        """The pyramid of the layers at these indices; `dtype` stays that of the call."""
        if len(indices) == len(self.layers):
            return self
        select = _select if torch.compiler.is_compiling() else _selected
        return select(self, tuple(indices))


class Weights(NamedTuple):
    """The two weights of (R1) for each layer.

    Attributes:
        fg: v·y, [N, P_l] contiguous, uint8 or the accumulation dtype, for each layer.
        bg: v·(1-y) likewise, or empty where every pixel is valid and 1 - fg need not be stored.
    """

    fg: Sequence[Tensor]
    bg: Sequence[Tensor]

    def select(self, indices: Sequence[int]) -> Weights:
        """The weights of the layers at these indices."""
        if len(indices) == len(self.fg):
            return self
        return Weights(
            [self.fg[index] for index in indices], [self.bg[index] for index in indices] if self.bg else []
        )


class Regions(NamedTuple):
    """Any number R of regions of the pixels, as classes and second moments need them; (C1) to (C4).

    Attributes:
        weights: [N, R, P_l] contiguous for each layer, uint8 or the accumulation dtype.
        selects: whether pixels whose weights are all 0 are ignored ones, which are selected out.
        pivots: [R, N, ΣC] in the accumulation dtype, the numbers about which moments are taken; None for
            sums alone.
    """

    weights: Sequence[Tensor]
    selects: bool
    pivots: Tensor | None = None

    @property
    def num_regions(self) -> int:
        """R."""
        return self.weights[0].shape[1]

    def select(self, indices: Sequence[int], pyramid: Pyramid) -> Regions:
        """The regions of the layers at these indices of a pyramid."""
        if len(indices) == len(self.weights):
            return self
        pivots = None if self.pivots is None else select_layers(self.pivots, pyramid, indices)
        return Regions([self.weights[index] for index in indices], self.selects, pivots)


class Sums(NamedTuple):
    """What one forward of the kernels returns.

    Attributes:
        sums: S of (R2) [2, N, ΣC], foreground first, the layers side by side.
        masses: M of (R2) [2, N, L].
        losses: [L], or their sum [] where it was asked for; None without options.
        slopes: ∂L_l/∂S (F1) [2, N, ΣC]; None without options or where not asked for.
    """

    sums: Tensor
    masses: Tensor
    losses: Tensor | None
    slopes: Tensor | None


def describe(features: Sequence[Tensor]) -> Pyramid:
    """Describe features [N, C_l, *S_l]; calls with the same shapes, strides and dtypes share the result."""
    if torch.compiler.is_compiling():  # which would trace the function behind the cache and warn
        return _describe(features)
    try:
        return _described(tuple([(layer.shape, layer.stride(), layer.dtype) for layer in features]))
    except TypeError:  # sizes that a compiler keeps symbolic have no hash
        return _describe(features)


@lru_cache(maxsize=64)
def _described(kinds: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]) -> Pyramid:
    return _describe(
        [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in kinds]
    )


def _describe(features: Sequence[Tensor]) -> Pyramid:
    layers, strides = [layer_of(layer) for layer in features], [layer.stride() for layer in features]
    return _pyramid(layers, strides, accumulate_dtype(features))


def _pyramid(layers: Sequence[Layer], strides: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Pyramid:
    channels = tuple([layer.channels for layer in layers])
    pixels = tuple([layer.pixels for layer in layers])
    return Pyramid(tuple(layers), tuple(strides), channels, pixels, sum(channels), dtype)


def _select(pyramid: Pyramid, indices: tuple[int, ...]) -> Pyramid:
    layers, strides = pyramid.layers, pyramid.strides
    return _pyramid([layers[i] for i in indices], [strides[i] for i in indices], pyramid.dtype)


# torch.compile would trace the function and warn of its cache.
_selected = lru_cache(maxsize=64)(_select)


def layer_of(features: Tensor) -> Layer:
    """Describe the gradient of one map [N, C, *S]."""
    stride = features.stride()
    if not features.is_contiguous() and not _is_channels_last(features):
        stride = torch.empty_like(features, device="meta").stride()
    return Layer(tuple(features.shape), tuple(stride), features.dtype)


def _is_channels_last(features: Tensor) -> bool:
    if features.dim() == 4:
        return features.is_contiguous(memory_format=torch.channels_last)
    return features.dim() == 5 and features.is_contiguous(memory_format=torch.channels_last_3d)


def pack(pyramid: Pyramid) -> list[int]:
    """Flatten a pyramid into integers, the form in which a registered op takes it, without `strides`."""
    packed = [_FEATURE_DTYPES.index(pyramid.dtype)]
    for shape, stride, dtype in pyramid.layers:
        packed += [len(shape), _FEATURE_DTYPES.index(dtype), *shape, *stride]
    return packed


def unpack(packed: Sequence[int]) -> Pyramid:
    """The inverse of `pack`; `strides` are those of the gradients."""
    layers = []
    start = 1
    while start < len(packed):
        rank = packed[start]
        sizes, strides = start + 2, start + 2 + rank
        start = strides + rank
        layers.append(
            Layer(
                tuple(packed[sizes:strides]),
                tuple(packed[strides:start]),
                _FEATURE_DTYPES[packed[sizes - 1]],
            )
        )
    return _pyramid(layers, [layer.stride for layer in layers], _FEATURE_DTYPES[packed[0]])


def select_layers(sums: Tensor, pyramid: Pyramid, indices: Sequence[int]) -> Tensor:
    """The columns of sums [2, N, ΣC] that belong to the layers at these indices."""
    if len(indices) == len(pyramid.layers):
        return sums
    parts = sums.split(pyramid.channels, dim=-1)
    return torch.cat([parts[index] for index in indices], dim=-1)


def accumulate_dtype(features: Sequence[Tensor]) -> torch.dtype:
    """float64 if any layer [N, C_l, *S_l] is float64, else float32: the dtype of sums, masses and losses."""
    for layer in features:
        if layer.dtype == torch.float64:
            return torch.float64
    return torch.float32


def weight_dtype(mask: torch.dtype, is_full_size: bool, dtype: torch.dtype, mask_resize: str) -> torch.dtype:
    """The storage dtype of a layer's weights in every backend: uint8 where each is 0 or 1, else `dtype`.

    Args:
        mask: dtype of the user's mask.
        is_full_size: whether the layer has the mask's own size.
        dtype: the accumulation dtype.
        mask_resize: `"area"`, `"max"` or `"nearest"`.
    """
    stays_binary = not mask.is_floating_point and (is_full_size or mask_resize != "area")
    return torch.uint8 if stays_binary else dtype
