"""The mask at the size of each layer: which sizes have to be made, and which are there already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdkernels import checks
from fdkernels.op import reference, registered
from fdkernels.op.pyramid import Weights
from fdkernels.transforms import has_plain_memory

__all__ = ["WeightsPlan", "make_weights", "plan_weights", "weights_of"]


class WeightsPlan(NamedTuple):
    """How masks of one kind become the weights of a call's layers; it holds for each mask of the kind.

    Attributes:
        sizes, dtype, mask_resize, ignore_index, backend: as for `weights_of`.
        takes_mask: whether kernels read the mask itself at its own size.
        missing: the sizes to make.
        indices: of each layer's size among the mask's own, if it is taken, and the missing ones.
    """

    sizes: Sequence[torch.Size]
    dtype: torch.dtype
    mask_resize: str
    ignore_index: float | None
    backend: str
    takes_mask: bool
    missing: list[torch.Size]
    indices: list[int]


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
    plan = plan_weights(mask, sizes, dtype, mask_resize, ignore_index, backend)
    return make_weights(mask, plan)


def plan_weights(
    mask: Tensor,
    sizes: Sequence[torch.Size],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
    backend: str,
) -> WeightsPlan:
    """Plan the weights of masks of the type, shape, strides, dtype and device of this one, [N, 1, *S0]."""
    takes_mask = ignore_index is None and _is_readable(mask, dtype)
    known: list[torch.Size] = [mask.shape[2:]] if takes_mask else []
    num_given = len(known)
    indices = []
    for size in sizes:
        index = _find(size, known)
        if index == len(known):
            known.append(size)
        indices.append(index)
    missing = known[num_given:]
    return WeightsPlan(sizes, dtype, mask_resize, ignore_index, backend, takes_mask, missing, indices)


def make_weights(mask: Tensor, plan: WeightsPlan) -> Weights:
    """Make the weights [N, P_l] of each layer from a mask [N, 1, *S0] of the plan's kind, as `weights_of`."""
    sizes, dtype, mask_resize, ignore_index, backend, takes_mask, missing, indices = plan
    if mask.requires_grad:
        return reference.masks(mask, sizes, dtype, mask_resize, ignore_index)
    fg: list[Tensor] = [_as_weights(mask)] if takes_mask else []
    bg: list[Tensor] = []
    if missing:
        made = registered.masks(mask, missing, dtype, mask_resize, ignore_index, backend)
        fg, bg = fg + list(made.fg), list(made.bg)
    weights = Weights([fg[i] for i in indices], [bg[i] for i in indices] if bg else [])
    if torch.compiler.is_compiling():
        # torch.compile does not trace an autograd function that is given one tensor twice.
        return Weights(*([weight.view_as(weight) for weight in of_all] for of_all in weights))
    return weights


def _find(size: torch.Size, sizes: Sequence[torch.Size]) -> int:
    """The index of a size, or the number of sizes; torch.compile's sizes have neither identity nor hash."""
    for index, known in enumerate(sizes):
        if known == size:
            return index
    return len(sizes)


def _is_readable(mask: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels can read the mask [N, 1, *S0] itself."""
    if mask.dtype not in (torch.bool, torch.uint8, dtype) or not mask.is_contiguous():
        return False
    if not torch.compiler.is_compiling() and not has_plain_memory(mask):
        return False
    return mask.dtype != dtype or checks.values_are_readable(mask)


def _as_weights(mask: Tensor) -> Tensor:
    """The mask itself as [N, P], as kernels read it."""
    if mask.dtype != torch.bool:
        return mask.flatten(1)
    # Inductor of torch before 2.9 does not lower the view; the copy is a byte a pixel.
    return (mask.to(torch.uint8) if torch.compiler.is_compiling() else mask.view(torch.uint8)).flatten(1)
