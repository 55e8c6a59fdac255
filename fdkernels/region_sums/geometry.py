"""What backward must know of features that it does not keep: shape, strides and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# The codes are those of `enum class DType` in csrc/region_sums.h; the uint8 of masks has no feature code.
DTYPE_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
}
# Words of a `Layer` of csrc/region_sums.h.
LAYER_WORDS = 22
_FEATURE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Geometry(NamedTuple):
    """Shape, dense strides in the features' own layout, and dtype of a gradient."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Layers(NamedTuple):
    """What the stages have to know of the layers of a call beside where they lie.

    Attributes:
        geometry: that of the gradient of every layer.
        channels: C_l.
        pixels: P_l.
        dtype: the accumulation dtype.
        words: `Layer` of csrc/region_sums.h for each layer, with 0 for what is not known here.
    """

    geometry: list[Geometry]
    channels: list[int]
    pixels: list[int]
    dtype: torch.dtype
    words: list[int]


def describe(features: Sequence[Tensor]) -> Layers:
    """Describe the layers of a call.

    The calls of a training loop share one description, which must not be changed.
    """
    kinds = tuple([(layer.shape, layer.stride(), layer.dtype) for layer in features])
    return _describe(kinds)


@lru_cache(maxsize=64)
def _describe(kinds: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]) -> Layers:
    features = [
        torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in kinds
    ]
    words: list[int] = []
    for shape, stride, dtype in kinds:
        padding = 5 - len(shape)
        words += [0, DTYPE_CODES[dtype], shape[1], *[1] * padding, *shape[2:]]
        words += [*stride[:2], *[0] * padding, *stride[2:]]
        words += [0] * (LAYER_WORDS - 11)
    return Layers(
        [geometry_of(layer) for layer in features],
        [shape[1] for shape, _, _ in kinds],
        [shape[2:].numel() for shape, _, _ in kinds],
        accumulate_dtype(features),
        words,
    )


def geometry_of(features: Tensor) -> Geometry:
    """The geometry of the gradient of `features`: theirs, made dense where they are sliced or expanded."""
    stride = features.stride()
    if not features.is_contiguous() and not _is_channels_last(features):
        stride = torch.empty_like(features, device="meta").stride()
    return Geometry(tuple(features.shape), tuple(stride), features.dtype)


def pack(geometry: Sequence[Geometry]) -> list[int]:
    """All geometries as one flat list of integers, the form in which a registered op takes them."""
    packed: list[int] = []
    for shape, stride, dtype in geometry:
        packed += [len(shape), DTYPE_CODES[dtype], *shape, *stride]
    return packed


def unpack(packed: Sequence[int]) -> list[Geometry]:
    """The inverse of `pack`."""
    geometry = []
    start = 0
    while start < len(packed):
        rank = packed[start]
        sizes = start + 2
        strides = sizes + rank
        geometry.append(
            Geometry(
                tuple(packed[sizes:strides]),
                tuple(packed[strides : strides + rank]),
                _FEATURE_DTYPES[packed[start + 1]],
            )
        )
        start = strides + rank
    return geometry


def select_layers(sums: Tensor, geometry: Sequence[Geometry], wanted: Sequence[int]) -> Tensor:
    """The columns of [2, N, ΣC] that belong to the wanted layers."""
    if len(wanted) == len(geometry):
        return sums
    parts = sums.split([layer.shape[1] for layer in geometry], dim=-1)
    return torch.cat([parts[index] for index in wanted], dim=-1)


def accumulate_dtype(features: Sequence[Tensor]) -> torch.dtype:
    """float64 if any layer is float64, else float32: the dtype of sums, masses and loss."""
    wide = any(layer.dtype == torch.float64 for layer in features)
    return torch.float64 if wide else torch.float32


def _is_channels_last(features: Tensor) -> bool:
    if features.dim() == 4:
        return features.is_contiguous(memory_format=torch.channels_last)
    return features.dim() == 5 and features.is_contiguous(memory_format=torch.channels_last_3d)
