"""Whether a mask and the maps of a network can show the same image, by their sizes alone.

A map of a network has its image's aspect up to what strides do to odd sizes, borders that convolutions
without padding take away, and the axes that a network for anisotropic images halves less often than others.
What none of these explains, such as exchanged axes or channels in the last place, is refused in a sentence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fdkernels.checks import one_of

__all__ = ["ASPECTS", "channels_first", "check_aspect"]

ASPECTS = ("same", "any")

# By how much the sides of maps may differ beyond rounding: decoders that up-sample a rounded size are off by
# a few pixels of the image.
_RELATIVE = 0.02

# The U-Net without padding takes 184 of 572 pixels away, and the same 184 of the shorter axis.
_WIDEST = 0.75

_STRIDES = tuple(2**k for k in range(13))

_Size = tuple[int, ...]


def channels_first(layers: list[Tensor], channel_dim: int) -> list[Tensor]:
    """View layers of any layout as [N, C, *S], without a copy.

    Args:
        layers: [N, C, *S] or, where the channels are last, [N, *S, C].
        channel_dim: the axis of the channels, 1, or the last one (-1 for short).

    Raises:
        TypeError: channel_dim is not an integer.
        ValueError: it is another axis.
    """
    if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
        raise TypeError(f"channel_dim must be an integer, got {type(channel_dim).__name__}")
    rank = layers[0].dim()
    axis = channel_dim + rank if channel_dim < 0 else channel_dim
    if axis not in (1, rank - 1):
        raise ValueError(
            "channel_dim must be 1, for features [N, C, *S], or -1, for features [N, *S, C], "
            f"got {channel_dim}"
        )
    return layers if axis == 1 else [layer.movedim(-1, 1) for layer in layers]


def check_aspect(mask: Tensor, layers: Sequence[Tensor], aspect: str, channels_last: bool = False) -> None:
    """Raise ValueError for a mask whose aspect is not that of the maps, unless `aspect` is `"any"`.

    With S0 the size of the mask and S that of a layer, one of these must hold (one axis has no aspect):

    - one stride f serves all axes: S0_d / f is S_d up to less than a pixel, which repeated halving can leave
      of an odd size, or up to 2 %. (For a layer finer than the mask, S_d = f·S0_d up to f - 1 pixels.)
    - the stride f is a power of 2, and all axes lost, or gained, the same border up to f - 1 pixels, of less
      than 3/4 of their length: convolutions without padding, or with more of it;
    - the stride of each axis is a power of 2 of its own, not smaller for a longer axis: networks for
      anisotropic images. In two dimensions axes of one length then have one stride, and another layer of the
      call must fit in the first way.

    Refused is, even so, a mask that one stride fits better with its axes in another order.

    Args:
        mask: [N, 1, *S0].
        layers: [N, C_l, *S_l] for each of L layers.
        aspect: `"same"` or `"any"`.
        channels_last: whether the caller gave the layers as [N, *S_l, C_l], for the sentence.

    Raises:
        ValueError: the aspect of a layer is another one, or `aspect` has no such name.
    """
    one_of("aspect", aspect, ASPECTS)
    if aspect == "any" or mask.dim() < 4:
        return
    # A compiler would trace the function behind the cache and warn.
    find = _misfit_of if torch.compiler.is_compiling() else _cached_misfit_of
    shapes = mask.shape, tuple([layer.shape for layer in layers])
    try:
        misfit = find(*shapes)
    except TypeError:  # sizes that a compiler keeps symbolic have no hash
        misfit = _misfit_of(*shapes)
    if misfit is not None:
        full, shape = tuple(mask.shape[2:]), tuple(layers[misfit].shape)
        raise ValueError(_sentence(_name(misfit, layers), full, shape, channels_last))


def _name(index: int, layers: Sequence[Tensor]) -> str:
    return "features" if len(layers) == 1 else f"features[{index}]"


def _misfit_of(mask: torch.Size, layers: tuple[torch.Size, ...]) -> int | None:
    return _first_misfit(tuple(mask[2:]), tuple([tuple(shape[2:]) for shape in layers]))


_cached_misfit_of = lru_cache(maxsize=64)(_misfit_of)


def _first_misfit(full: _Size, sizes: tuple[_Size, ...]) -> int | None:
    """The index of the first size that no map of an image of size `full` has."""
    off = [index for index, size in enumerate(sizes) if not _has_one_stride(full, size)]
    for index in off:
        size = sizes[index]
        if _has_one_stride_in_another_order(full, size) or not (
            _has_about_one_stride(full, size)
            or _has_a_border(full, size)
            or ((len(full) == 3 or len(off) < len(sizes)) and _has_a_stride_per_axis(full, size))
        ):
            return index
    return None


def _ordered(full: _Size, size: _Size) -> tuple[_Size, _Size]:
    """The finer and the coarser one of two sizes."""
    return (size, full) if all(s0 <= s for s0, s in zip(full, size, strict=True)) else (full, size)


def _has_one_stride(full: _Size, size: _Size) -> bool:
    """Whether some f ≥ 1 has |F - f·C| ≤ f - 1 on every axis of fine F and coarse C: halvings do no more."""
    lowest, highest = 1.0, math.inf
    for fine, coarse in zip(*_ordered(full, size), strict=True):
        lowest = max(lowest, (fine + 1) / (coarse + 1))
        highest = min(highest, (fine - 1) / (coarse - 1) if coarse > 1 else math.inf)
    return lowest <= highest


def _has_about_one_stride(full: _Size, size: _Size) -> bool:
    """Whether some f ≥ 1 has |S0_d / f - S_d| below `_RELATIVE`·S_d, or below 1 in coarser layers."""
    lowest, highest = 1 - _RELATIVE, math.inf
    is_coarser = all(s <= s0 for s0, s in zip(full, size, strict=True))
    for s0, s in zip(full, size, strict=True):
        slack = max(float(is_coarser), _RELATIVE * s)
        lowest = max(lowest, s0 / (s + slack))
        highest = min(highest, s0 / (s - slack) if s > slack else math.inf)
    return lowest < highest


def _has_one_stride_in_another_order(full: _Size, size: _Size) -> bool:
    return any(_has_one_stride(order, size) for order in itertools.permutations(full))


def _has_a_border(full: _Size, size: _Size) -> bool:
    """Whether for some stride f the borders F - f·C of all axes are one border, up to f - 1."""
    pairs = list(zip(*_ordered(full, size), strict=True))
    for f in _STRIDES:
        borders = [fine - f * coarse for fine, coarse in pairs]
        if max(borders) - min(borders) <= f - 1 and all(
            abs(border) < _WIDEST * max(fine, f * coarse)
            for border, (fine, coarse) in zip(borders, pairs, strict=True)
        ):
            return True
    return False


def _has_a_stride_per_axis(full: _Size, size: _Size) -> bool:
    strides = [
        [f for f in _STRIDES if abs(s0 - f * s) <= f - 1] for s0, s in zip(full, size, strict=True)
    ]  # those that fit each axis: several where only a few pixels are left
    if not all(strides):
        return False
    is_volume = len(full) == 3
    for (own, length), (other, other_length) in itertools.permutations(zip(strides, full, strict=True), 2):
        may_exceed = length > other_length or (is_volume and length == other_length)
        if min(own) > max(other) and not may_exceed:
            return False
    return True


def _sentence(name: str, full: _Size, shape: tuple[int, ...], channels_last: bool) -> str:
    """Say what does not fit a layer [N, C, *S] of that shape, and what would."""
    size, channels = shape[2:], shape[1]
    given = [shape[0], *size, channels] if channels_last else list(shape)
    unlike = f"a mask of size {list(full)} does not have the aspect of {name} {given}"
    otherwise = 'or pass aspect="any" if this is meant'
    must = f"mask must have the aspect of the features: {unlike}"
    if len(full) == 3 and full[0] == 1:
        return f"{must}; a mask of volumes is [N, 1, D, H, W] or [N, D, H, W], {otherwise}"
    for order in itertools.permutations(full):
        if _has_one_stride(order, size):
            return f"{must}; its axes seem to be in another order: transpose it to {list(order)}, {otherwise}"
    moved = (*size[1:], channels) if channels_last else (channels, *size[:-1])
    if _first_misfit(full, (moved,)) is None:
        seems, where = ("[N, C, *S]", 1) if channels_last else ("[N, *S, C]", -1)
        return f"features seem to be {seems}: {unlike}; pass channel_dim={where}, {otherwise}"
    return f"{must}; resize or crop it as the images were, {otherwise}"
