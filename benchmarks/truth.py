"""The loss and its gradient in float64 by the closed form, with which everyone is compared before the timing.

No autograd over features and no code of the package: region sums by matrix products sample by sample, the
loss from them, and the gradient of a pixel from the two coefficients of its channel, (R2) and (R3) of
fdkernels/region_sums/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs
from benchmarks.peers import EPS, resize

_BLOCK_ELEMENTS = 2**18


class Truth:
    """The numbers that a case must give.

    Attributes:
        loss: the loss.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.layers = inputs.layers
        self.weights: list[Tensor] = []  # [N, P, 2] of each layer
        self.sums: list[Tensor] = []  # S_fg, S_bg, [N, C, 2] of each layer
        self.coefficients: list[Tensor] = []  # g_fg, g_bg, [N, C, 2] of each layer
        losses = []
        for features in self.layers:
            weights = _weights(case, inputs.mask, features.shape[2:])  # [N, P, 2]
            sums = torch.stack(
                [f.double().flatten(1) @ w for f, w in zip(features.detach(), weights, strict=True)]
            ).requires_grad_()  # [N, C, 2]
            masses = weights.sum(1)  # [N, 2]
            if case.convention == "released":
                loss = _released(sums, masses, weights.shape[1])
            else:
                loss = _paper(sums, masses, case.exchange, inputs.pairing)
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

    def gradient_error(
        self, grads: Sequence[Tensor | None], upstream: Sequence[Tensor] | None = None
    ) -> float:
        """The largest of the layers' ‖gradient - truth‖ / ‖truth‖, where the truth has `upstream` added."""
        added = upstream if upstream is not None else [None] * len(grads)
        errors = [
            self._gradient_error(index, grad, other)
            for index, (grad, other) in enumerate(zip(grads, added, strict=True))
        ]
        # max() may drop NaN.
        return torch.tensor(errors, dtype=torch.float64).max().item()

    def sums_error(self, sums: Tensor) -> float:
        """‖sums - truth‖ / ‖truth‖ for sums as stage region_sums gives them, [2, N, ΣC]."""
        expected = torch.cat(self.sums, dim=1).permute(2, 0, 1)
        return ((sums - expected).norm() / expected.norm()).item()

    def _gradient_error(self, index: int, got: Tensor | None, upstream: Tensor | None) -> float:
        if got is None:
            return float("inf")
        error = norm = 0.0
        weights = self.weights[index].mT  # [N, 2, P]
        # By so many channels that a block stays in the cache.
        block = max(1, _BLOCK_ELEMENTS // weights.shape[-1])
        for n, grad in enumerate(got.flatten(2)):  # [C, P]
            for start in range(0, grad.shape[0], block):
                channels = slice(start, start + block)
                expected = self.coefficients[index][n, channels] @ weights[n]  # [block, P]
                if upstream is not None:
                    expected += upstream[n, channels].flatten(1)
                norm += torch.linalg.vector_norm(expected).item() ** 2
                error += torch.linalg.vector_norm(expected.sub_(grad[channels])).item() ** 2
        return (error / norm) ** 0.5


def clear_gradients(layers: list[Tensor]) -> None:
    """Forget the gradients, so that the next backward writes fresh ones."""
    for layer in layers:
        layer.grad = None


def _weights(case: Case, mask: Tensor, size: torch.Size) -> Tensor:
    """v·y and v·(1-y) at the layer's size, [N, P, 2]."""
    how = "max" if case.convention == "released" else "area"
    valid = torch.ones_like(mask, dtype=torch.float64)
    if case.ignore_index is not None:
        valid = (mask != case.ignore_index).double()
    fg = resize(valid * mask.double(), size, how)  # [N, 1, *size]
    bg = 1 - fg if how == "max" else resize(valid * (1 - mask.double()), size, how)
    return torch.stack([fg.flatten(1), bg.flatten(1)], dim=-1)


def _paper(sums: Tensor, masses: Tensor, exchange: str, pairing: Tensor | None) -> Tensor:
    means = sums / masses.sum(-1)[:, None, None]  # [N, C, 2]
    f, b = means.unbind(-1)
    total = _log(f - b).mean()
    if exchange == "shuffle":
        total = total + _log(f[pairing] - b).mean()
    if exchange == "pooled":
        pairs = [torch.cat([f[i] - b[j], f[j] - b[i]]) for i, j in pairing.tolist()]
        total = total + _log(torch.stack(pairs)).mean()
    return total


def _released(sums: Tensor, masses: Tensor, pixels: int) -> Tensor:
    f = sums[..., 0] / pixels  # [N, C]
    b = masses[:, :1] / pixels - f
    return _log((f - b).mT).mean() / 2


def _log(differences: Tensor) -> Tensor:
    return -differences.square().sum(1).add(EPS).log()
