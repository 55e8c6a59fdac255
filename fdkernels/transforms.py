"""What a tensor is under torch.func's transforms and forward-mode differentiation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["in_transform", "innermost"]


def in_transform() -> bool:
    """Whether a transform of torch.func (grad, jvp, vmap, …) or a level of forward-mode AD is running.

    Kernels and autograd functions of ours do not see through them; plain torch does. torch.compile traces
    both questions.
    """
    # What torch.autograd.Function.apply itself asks; the other is -1 outside forward_ad.dual_level().
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0  # noqa: SLF001


def innermost(tensor: Tensor) -> Tensor:
    """The tensor that transforms have wrapped: the same values, of any shape, with every mapped axis."""
    functorch = torch._C._functorch  # noqa: SLF001 - torch has no public name for it
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor
