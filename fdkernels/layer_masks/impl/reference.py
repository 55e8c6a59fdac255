"""Backend `reference` of layer_masks: the specification in plain PyTorch, any device, differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fdkernels.layer_masks.rule import weight_dtype

__all__ = ["forward"]

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


def forward(
    mask: Tensor,
    sizes: Sequence[torch.Size],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The weights (M3) to (M5) [N, P] of every size; none of the background where every pixel is valid."""
    fg, bg = _weights(mask, sizes, dtype, mask_resize, ignore_index)
    full = mask.shape[2:]
    for index, size in enumerate(sizes):
        stored = weight_dtype(mask.dtype, size == full, dtype, mask_resize)
        fg[index] = fg[index].to(stored)
        if bg:
            bg[index] = bg[index].to(stored)
    return fg, bg


def _weights(
    mask: Tensor,
    sizes: Sequence[torch.Size],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
) -> tuple[list[Tensor], list[Tensor]]:
    if ignore_index is None and not mask.requires_grad:
        same_size = _in_readable_dtype(mask, dtype)
        resized = _resize_all(same_size, sizes, mask_resize, dtype)
        return [_flat(weight) for weight in resized], []
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
        return fg, bg
    both = torch.cat([valid * y, valid * (1 - y)], dim=1)  # [N, 2, *S0]
    resized = _resize_all(both, sizes, mask_resize, dtype)
    return [_flat(w[:, 0]) for w in resized], [_flat(w[:, 1]) for w in resized]


def _in_readable_dtype(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in a dtype that kernels read: uint8 for bool and integers, else the accumulation dtype."""
    return mask.to(dtype if mask.dtype.is_floating_point else torch.uint8, copy=True)


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
        return _nearest(mask, size)
    pools: tuple[Callable[..., Tensor], ...] = _AVG_POOL if mask_resize == "area" else _MAX_POOL
    return pools[len(size) - 1](mask, size)


def _nearest(mask: Tensor, size: torch.Size) -> Tensor:
    """(M5), in integers: torch's nearest-exact rounds positions to float32."""
    for dim, (out, total) in enumerate(zip(size, mask.shape[2:], strict=True), start=2):
        centre = (2 * torch.arange(out, device=mask.device) + 1) * total // (2 * out)
        mask = mask.index_select(dim, centre)
    return mask


def _divides(size: torch.Size, source: torch.Size) -> bool:
    return all(s and big % s == 0 for s, big in zip(size, source, strict=True))


def _flat(weight: Tensor) -> Tensor:
    return weight.flatten(1).contiguous()  # [N, P]
