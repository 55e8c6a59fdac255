"""The floors: reading the features once, and writing a gradient of their size once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Not 0: memory that is already zero may be written faster.
_VALUE = 0.5


class Floors:
    """What forward and backward cannot be faster than, on the layers of a case."""

    def __init__(self, layers: Sequence[Tensor]) -> None:
        self.layers = [layer.detach() for layer in layers]
        self.grads: list[Tensor] = []

    def forward(self) -> list[Tensor]:
        """One read: `features.sum()`."""
        return [layer.sum() for layer in self.layers]

    def backward(self) -> None:
        """One write into fresh memory; the last gradients are freed first, as `features.grad = None` does."""
        self.release()
        self.grads = [torch.empty_like(layer).fill_(_VALUE) for layer in self.layers]

    def forward_backward(self) -> None:
        """Both."""
        self.forward()
        self.backward()

    def warm(self) -> None:
        """One write into memory that is already there."""
        if not self.grads:
            self.backward()
        for grad in self.grads:
            grad.fill_(_VALUE)

    def release(self) -> None:
        """Free the gradients."""
        self.grads = []
