"""Stage layer_masks: a registered op over the backends, and which sizes it need not make."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fdkernels import backend as backends
from fdkernels.layer_masks.impl import reference
from fdkernels.layer_masks.rule import weight_dtype

__all__ = ["LayerMasks", "layer_masks"]

torch.library.define(
    "fdkernels::layer_masks",
    # sizes holds the spatial sizes one after the other.
    "(Tensor mask, SymInt[] sizes, ScalarType dtype, str mask_resize, float? ignore_index, str backend) "
    "-> (Tensor[], Tensor[])",
)


@torch.library.impl("fdkernels::layer_masks", "CompositeExplicitAutograd")
def _forward(
    mask: Tensor,
    sizes: list[int],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
    backend: str,
) -> tuple[list[Tensor], list[Tensor]]:
    stage = backends.implementation("layer_masks", backend)
    weights: tuple[list[Tensor], list[Tensor]] = stage.forward(
        mask, _as_sizes(mask, sizes), dtype, mask_resize, ignore_index
    )
    return weights


@torch.library.register_fake("fdkernels::layer_masks")
def _forward_fake(
    mask: Tensor,
    sizes: list[int],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
    backend: str,
) -> tuple[list[Tensor], list[Tensor]]:
    full = mask.shape[2:]
    fg = [
        mask.new_empty(
            (mask.shape[0], size.numel()), dtype=weight_dtype(mask.dtype, size == full, dtype, mask_resize)
        )
        for size in _as_sizes(mask, sizes)
    ]
    return fg, [] if ignore_index is None else [torch.empty_like(weight) for weight in fg]


def _as_sizes(mask: Tensor, sizes: list[int]) -> list[torch.Size]:
    rank = mask.dim() - 2
    return [torch.Size(sizes[start : start + rank]) for start in range(0, len(sizes), rank)]


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
    backend: str = "reference",
) -> LayerMasks:
    """Bring a checked mask to the size of every layer.

    With y the mask and v its validity (0 where it equals `ignore_index`, else 1) at full size, a cell of a
    layer has

    - `"area"`: v·y = mean of the pixels' v·y, v = mean of v (adaptive average pooling)
    - `"max"`: y = max over the valid pixels, v = 1 if any is valid (adaptive max pooling)
    - `"nearest"`: the pixel that nearest-exact sampling takes

    Differentiable with respect to a floating-point mask, which goes through the reference. A size is made
    once, however many layers have it, and the mask's own size not at all where kernels read it as it is.

    Args:
        mask: [N, 1, *S0], checked.
        sizes: the spatial size S_l of every layer.
        dtype: the accumulation dtype of the layers.
        mask_resize: `"area"`, `"max"` or `"nearest"`.
        ignore_index: the mask value of pixels to leave out, or None.
        backend: the name of an available backend.
    """
    if mask.requires_grad:
        return LayerMasks(*reference.forward(mask, sizes, dtype, mask_resize, ignore_index))
    as_is = _readable_as_is(mask, dtype) if ignore_index is None else None
    plan = _plan if torch.compiler.is_compiling() else _kept_plan
    missing, places = plan(tuple(sizes), None if as_is is None else mask.shape[2:])
    made_fg = [] if as_is is None else [as_is]
    made_bg: list[Tensor] = []
    if missing:
        if backends.may_call_directly([mask]):
            stage = backends.implementation("layer_masks", backend)
            fg, bg = stage.forward(mask, missing, dtype, mask_resize, ignore_index)
        else:
            flat = [extent for size in missing for extent in size]
            fg, bg = torch.ops.fdkernels.layer_masks(mask, flat, dtype, mask_resize, ignore_index, backend)
        made_fg, made_bg = made_fg + list(fg), list(bg)
    fg, bg = [made_fg[place] for place in places], [made_bg[place] for place in places] if made_bg else []
    if torch.compiler.is_compiling():
        # torch.compile does not trace an autograd function that is given one tensor twice.
        fg, bg = ([weight.view_as(weight) for weight in weights] for weights in (fg, bg))
    return LayerMasks(fg, bg)


def _plan(sizes: tuple[torch.Size, ...], given: torch.Size | None) -> tuple[list[torch.Size], list[int]]:
    """The sizes to make, and the place of each layer's among the given one, if any, and these."""
    known: list[torch.Size] = [] if given is None else [given]
    num_given = len(known)
    places = []
    for size in sizes:
        place = _find(size, known)
        if place is None:
            place = len(known)
            known.append(size)
        places.append(place)
    return known[num_given:], places


# torch.compile would trace the function and warn of its cache.
_kept_plan = lru_cache(maxsize=64)(_plan)


def _find(size: torch.Size, sizes: Sequence[torch.Size]) -> int | None:
    # Not `sizes.index` nor a dict: where torch.compile keeps sizes symbolic it has neither identity nor hash.
    return next((place for place, known in enumerate(sizes) if known == size), None)


def _readable_as_is(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The mask itself as [N, P] where kernels can read it, else None."""
    if mask.dtype not in (torch.bool, torch.uint8, dtype) or not mask.is_contiguous():
        return None
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).flatten(1)
