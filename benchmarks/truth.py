"""The loss and its gradient in float64 by the closed form, with which everyone is compared before the timing.

No autograd over features and no code of the package: region sums by matrix products sample by sample, the
loss from them, and the gradient of a pixel from the two coefficients of its channel, (R2) and (R3) of
fdkernels/region_sums/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.cases import Inputs
from benchmarks.peers import EPS, resize

_BLOCK_ELEMENTS = 2**18


class Truth:
    """The numbers that a case must give.

    Attributes:
        loss: the loss.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.layers = inputs.layers
        self.weights: list[Tensor] = []  # [N, P, 2] of each layer
        self.sums: list[Tensor] = []  # S_fg, S_bg, [N, C, 2] of each layer
        self.coefficients: list[Tensor] = []  # g_fg, g_bg, [N, C, 2] of each layer
        losses = []
        for features in self.layers:
            y = resize(inputs.mask.double(), features).flatten(1)  # [N, P]
            weights = torch.stack([y, 1 - y], dim=-1)  # [N, P, 2]
            sums = torch.stack(
                [f.double().flatten(1) @ w for f, w in zip(features.detach(), weights, strict=True)]
            ).requires_grad_()  # [N, C, 2]
            means = sums / y.shape[1]
            loss = -(means[..., 0] - means[..., 1]).square().sum(1).add(EPS).log().mean()
            (coefficients,) = torch.autograd.grad(loss / len(self.layers), sums)
            self.weights.append(weights)
            self.sums.append(sums.detach())
            self.coefficients.append(coefficients)
            losses.append(loss.item())
        self.loss = sum(losses) / len(losses)

    def errors(self, contender: Callable[[], Tensor]) -> tuple[float, float]:
        """Run a contender forward and backward and compare.

        Returns:
            |loss - truth| / max(1, |truth|), and the largest of the layers' ‖gradient - truth‖ / ‖truth‖.
            NaN where the contender gave NaN, infinite where it gave no gradient.
        """
        clear_gradients(self.layers)
        loss = contender()
        loss.backward()
        loss_error = abs(loss.item() - self.loss) / max(1.0, abs(self.loss))
        gradient_error = self.gradient_error([layer.grad for layer in self.layers])
        clear_gradients(self.layers)
        return loss_error, gradient_error

    def gradient_error(self, grads: Sequence[Tensor | None]) -> float:
        """The largest of the layers' ‖gradient - truth‖ / ‖truth‖."""
        errors = [self._gradient_error(index, grad) for index, grad in enumerate(grads)]
        # max() may drop NaN.
        return torch.tensor(errors, dtype=torch.float64).max().item()

    def sums_error(self, sums: Tensor) -> float:
        """‖sums - truth‖ / ‖truth‖ for sums as stage region_sums gives them, [2, N, ΣC]."""
        expected = torch.cat(self.sums, dim=1).permute(2, 0, 1)
        return ((sums - expected).norm() / expected.norm()).item()

    def _gradient_error(self, index: int, got: Tensor | None) -> float:
        if got is None:
            return float("inf")
        error = norm = 0.0
        weights = self.weights[index].mT  # [N, 2, P]
        # By so many channels that a block stays in the cache.
        block = max(1, _BLOCK_ELEMENTS // weights.shape[-1])
        for n, grad in enumerate(got.flatten(2)):  # [C, P]
            coefficients = self.coefficients[index][n].split(block)
            for part, coefficient in zip(grad.split(block), coefficients, strict=True):
                expected = coefficient @ weights[n]  # [block, P]
                norm += torch.linalg.vector_norm(expected).item() ** 2
                error += torch.linalg.vector_norm(expected.sub_(part)).item() ** 2
        return (error / norm) ** 0.5


def clear_gradients(layers: list[Tensor]) -> None:
    """Forget the gradients, so that the next backward writes fresh ones."""
    for layer in layers:
        layer.grad = None
