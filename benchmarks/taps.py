"""`tap` beside the loss as an op of its own, in a network that sends a gradient to the same features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fdkernels
from benchmarks.cases import Inputs
from benchmarks.truth import Truth, clear_gradients


class Tapped:
    """Forward and backward with a gradient that arrives from the rest of the network.

    `tap` reads it once and writes the sum once; `separate` writes the gradient of the loss, and autograd
    reads both and writes their sum.
    """

    def __init__(self, inputs: Inputs, truth: Truth, options: dict[str, Any]) -> None:
        self.layers, self.mask = inputs.layers, inputs.mask
        self.truth = truth
        self.options = options
        # As large as the gradient of the loss, so that a check of the sum sees both.
        self.upstream = [
            torch.empty_like(layer).uniform_(-1, 1).mul_(coefficients.abs().max().item())
            for layer, coefficients in zip(self.layers, truth.coefficients, strict=True)
        ]

    def tap(self) -> None:
        """The loss by `fdkernels.tap`."""
        clear_gradients(self.layers)
        tapped, loss = fdkernels.tap(self.layers, self.mask, **self.options)
        _backward(loss, tapped, self.upstream)

    def separate(self) -> None:
        """The loss by `fdkernels.feature_discrepancy_loss`."""
        clear_gradients(self.layers)
        used = [layer.view_as(layer) for layer in self.layers]
        loss = fdkernels.feature_discrepancy_loss(self.layers, self.mask, **self.options)
        _backward(loss, used, self.upstream)

    def floor(self) -> None:
        """One read of the features, one of the gradient that arrives, and one write."""
        clear_gradients(self.layers)
        for layer, upstream in zip(self.layers, self.upstream, strict=True):
            layer.detach().sum()
            layer.grad = upstream + 0.5

    def errors(self) -> dict[str, float]:
        """The largest ‖gradient - truth‖ / ‖truth‖ of each."""
        functions: dict[str, Callable[[], None]] = {"tap": self.tap, "separate": self.separate}
        found = {}
        for name, function in functions.items():
            function()
            grads = [layer.grad for layer in self.layers]
            found[name] = self.truth.gradient_error(grads, self.upstream)
        clear_gradients(self.layers)
        return found


def _backward(loss: Tensor, used: Sequence[Tensor], upstream: Sequence[Tensor]) -> None:
    torch.autograd.backward([loss, *used], [torch.ones_like(loss), *upstream])
