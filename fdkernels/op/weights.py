"""The mask at the size of each layer: which sizes have to be made, and which are there already."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fdkernels import checks
from fdkernels.op import reference, registered
from fdkernels.op.pyramid import Weights
from fdkernels.transforms import has_plain_memory

__all__ = ["weights_of"]


def weights_of(
    mask: Tensor,
    sizes: Sequence[torch.Size],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
    backend: str = "reference",
) -> Weights:
    """Resize a checked mask to each layer.

    With y the mask and v its validity (0 where it equals `ignore_index`, else 1) at full size, a cell of a
    layer has

    - `"area"`: v·y = mean of the pixels' v·y, v = mean of v (adaptive average pooling)
    - `"max"`: y = max over the valid pixels, v = 1 if any is valid (adaptive max pooling)
    - `"nearest"`: the pixel that nearest-exact sampling takes

    A floating-point mask that requires a gradient goes through the reference, which is differentiable. Layers
    of one size share a tensor, and kernels read a mask in a dtype of theirs at its own size as it is, a
    floating-point one if its values have been checked: others become NaN outside [0, 1] here.

    Args:
        mask: [N, 1, *S0], checked.
        sizes: the spatial size S_l of each layer.
        dtype: the accumulation dtype of the layers.
        mask_resize: `"area"`, `"max"` or `"nearest"`.
        ignore_index: the mask value of pixels to leave out, or None.
        backend: the name of an available backend.

    Returns:
        The weights [N, P_l] of each layer.
    """
    if mask.requires_grad:
        return reference.masks(mask, sizes, dtype, mask_resize, ignore_index)
    as_is = _readable_as_is(mask, dtype) if ignore_index is None else None
    compiling = torch.compiler.is_compiling()
    plan = _plan if compiling else _cached_plan
    missing, indices = plan(tuple(sizes), None if as_is is None else mask.shape[2:])
    fg: list[Tensor] = [] if as_is is None else [as_is]
    bg: list[Tensor] = []
    if missing:
        made = registered.masks(mask, missing, dtype, mask_resize, ignore_index, backend)
        fg, bg = fg + list(made.fg), list(made.bg)
    weights = Weights([fg[i] for i in indices], [bg[i] for i in indices] if bg else [])
    if compiling:
        # torch.compile does not trace an autograd function that is given one tensor twice.
        return Weights(*([weight.view_as(weight) for weight in of_all] for of_all in weights))
    return weights


def _plan(sizes: tuple[torch.Size, ...], given: torch.Size | None) -> tuple[list[torch.Size], list[int]]:
    """The sizes to make, and the index of each layer's size among the given one, if any, and these."""
    known: list[torch.Size] = [] if given is None else [given]
    num_given = len(known)
    indices = []
    for size in sizes:
        index = _find(size, known)
        if index == len(known):
            known.append(size)
        indices.append(index)
    return known[num_given:], indices


# torch.compile would trace the function and warn of its cache.
_cached_plan = lru_cache(maxsize=64)(_plan)


def _find(size: torch.Size, sizes: Sequence[torch.Size]) -> int:
    """The index of a size, or the number of sizes; torch.compile's sizes have neither identity nor hash."""
    for index, known in enumerate(sizes):
        if known == size:
            return index
    return len(sizes)


def _readable_as_is(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The mask itself as [N, P] where kernels can read it, else None."""
    compiling = torch.compiler.is_compiling()
    if mask.dtype not in (torch.bool, torch.uint8, dtype) or not mask.is_contiguous():
        return None
    if not compiling and not has_plain_memory(mask):
        return None
    if mask.dtype == dtype and not checks.values_are_readable(mask):
        return None
    if mask.dtype != torch.bool:
        return mask.flatten(1)
    # Inductor of torch before 2.9 does not lower the view; the copy is a byte a pixel.
    return (mask.to(torch.uint8) if compiling else mask.view(torch.uint8)).flatten(1)
