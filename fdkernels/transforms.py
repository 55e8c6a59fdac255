"""What torch knows of a tensor under names of its own: transforms around it, values, changes in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

__all__ = [
    "PLAIN",
    "apply_plainly",
    "has_plain_memory",
    "has_values",
    "in_transform",
    "innermost",
    "unwrap_dead",
    "version_of",
]

# The types of `has_plain_memory`, for loops in which a call would take longer than the tests.
PLAIN = (Tensor, torch.nn.Parameter)


def has_plain_memory(tensor: Any) -> bool:
    """Whether the memory of a tensor of any shape holds its values; never while compiling.

    That of a subclass may be elsewhere, or nowhere; that of a view such as `x.conj().imag` is yet to be
    negated.
    """
    return not torch.compiler.is_compiling() and type(tensor) in PLAIN and not tensor.is_neg()


def in_transform() -> bool:
    """Whether a transform of torch.func (grad, jvp, vmap, …) or a level of forward-mode AD is running.

    Kernels and autograd functions of ours do not see through them; plain torch does. torch.compile traces
    both questions.
    """
    # What torch.autograd.Function.apply itself asks; the other is -1 outside forward_ad.dual_level().
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0  # noqa: SLF001


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor of any shape has values: those of FakeTensorMode and the meta device have none.

    While compiling each counts as one that has.
    """
    if torch.compiler.is_compiling():
        return True
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def innermost(tensor: Tensor) -> Tensor:
    """The tensor that transforms have wrapped: the same values, of any shape, with every mapped axis."""
    functorch = torch._C._functorch  # noqa: SLF001 - torch has no public name for it
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def unwrap_dead(tensor: Tensor) -> Tensor:
    """What a transform that has ended has wrapped, of any shape; any other tensor as it is.

    torch unwraps it in its dispatcher; kernels read memory, of which the wrapper has none.
    """
    if torch.compiler.is_compiling():
        return tensor
    unwrapped: Tensor = torch._C._functorch.unwrap_if_dead(tensor)  # noqa: SLF001 - no public name
    return unwrapped


def apply_plainly(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)` where no transform runs and no tensor is a dead wrapper of one.

    torch's own asks both in Python, for every argument, which takes a tenth of a small call.
    """
    if torch.compiler.is_compiling():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def version_of(tensor: Tensor) -> int | None:
    """How often the tensor, of any shape, was modified in place; None where torch does not count that."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version  # noqa: SLF001 (public in the documentation of autograd, but for its name)
