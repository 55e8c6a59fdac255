"""Stage layer_masks: one mask at the size of every layer, as foreground and background weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_AVG_POOL = (
    functional.adaptive_avg_pool1d,
    functional.adaptive_avg_pool2d,
    functional.adaptive_avg_pool3d,
)
_MAX_POOL = (
    functional.adaptive_max_pool1d,
    functional.adaptive_max_pool2d,
    functional.adaptive_max_pool3d,
)


class LayerMasks(NamedTuple):
    """The two weights of (R1) in region_sums/README.md, for each layer.

    Attributes:
        fg: v·y, [N, P_l] contiguous, uint8 or the accumulation dtype, for each layer.
        bg: v·(1-y) likewise, or empty where every pixel is valid and 1 - fg need not be stored.
    """

    fg: list[Tensor]
    bg: list[Tensor]


def layer_masks(
    mask: Tensor,
    sizes: Sequence[torch.Size],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
) -> LayerMasks:
    """Bring a checked mask to the size of every layer.

    With y the mask and v its validity (0 where it equals `ignore_index`, else 1) at full size, a cell of a
    layer has

    - `"area"`: v·y = mean of the pixels' v·y, v = mean of v (adaptive average pooling)
    - `"max"`: y = max over the valid pixels, v = 1 if any is valid (adaptive max pooling)
    - `"nearest"`: the pixel that nearest-exact sampling takes

    Differentiable with respect to a floating-point mask.

    Args:
        mask: [N, 1, *S0], checked.
        sizes: the spatial size S_l of every layer.
        dtype: the accumulation dtype of the layers.
        mask_resize: `"area"`, `"max"` or `"nearest"`.
        ignore_index: the mask value of pixels to leave out, or None.
    """
    if ignore_index is None and not mask.requires_grad:
        same_size = _readable_as_is(mask, dtype)
        resized = _resize_all(same_size, sizes, mask_resize, dtype)
        return LayerMasks([_flat(weight) for weight in resized], [])
    if ignore_index is None:
        y = mask.to(dtype)
        valid = torch.ones_like(y)
    else:
        valid = (mask != ignore_index).to(dtype)
        y = torch.where(valid != 0, mask.to(dtype), 0)
    if mask_resize == "max":
        # -1 marks what is not valid; it stays only where a whole cell holds nothing else.
        marked = torch.where(valid != 0, y, -1)
        resized = _resize_all(marked, sizes, mask_resize, dtype)
        fg = [_flat(y.clamp(min=0)) for y in resized]
        bg = [_flat(torch.where(y >= 0, 1 - y, 0)) for y in resized]
        return LayerMasks(fg, bg)
    both = torch.cat([valid * y, valid * (1 - y)], dim=1)  # [N, 2, *S0]
    resized = _resize_all(both, sizes, mask_resize, dtype)
    return LayerMasks([_flat(w[:, 0]) for w in resized], [_flat(w[:, 1]) for w in resized])


def _readable_as_is(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask in a dtype that kernels read: uint8 for bool and integers, else the accumulation dtype."""
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8)
    return mask.to(dtype if mask.dtype.is_floating_point else torch.uint8)


def _resize_all(
    mask: Tensor, sizes: Sequence[torch.Size], mask_resize: str, dtype: torch.dtype
) -> list[Tensor]:
    """[N, K, *S0] at every size. A size is made once, from the last map before it that it nests in."""
    full = mask.shape[2:]
    made = [(full, mask)]
    resized = []
    for size in sizes:
        source, found = mask, None
        for larger, candidate in made:
            if larger == size:
                found = candidate
            # Means of means and maxima of maxima over equal cells are those of the whole cell; cells that do
            # not divide the mask overlap.
            elif mask_resize != "nearest" and _divides(size, larger) and _divides(larger, full):
                source = candidate
        if found is None:
            found = _resize(source.to(dtype), size, mask_resize)
            made.append((size, found))
        resized.append(found)
    return resized


def _resize(mask: Tensor, size: torch.Size, mask_resize: str) -> Tensor:
    if mask_resize == "nearest":
        return functional.interpolate(mask, size=size, mode="nearest-exact")
    pools: tuple[Callable[..., Tensor], ...] = _AVG_POOL if mask_resize == "area" else _MAX_POOL
    return pools[len(size) - 1](mask, size)


def _divides(size: torch.Size, source: torch.Size) -> bool:
    return all(s and big % s == 0 for s, big in zip(size, source, strict=True))


def _flat(weight: Tensor) -> Tensor:
    return weight.flatten(1).contiguous()  # [N, P]
