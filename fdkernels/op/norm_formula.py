"""What a normalisation with its activation computes, and the same in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ACTIVATIONS", "Formula", "NormInputs", "Running", "is_dense", "plain"]

ACTIVATIONS = ("none", "relu", "leaky_relu")


class Formula(NamedTuple):
    """What is computed.

    Attributes:
        instance: whether the statistics are those of a sample, as of InstanceNorm, or of the batch.
        eps: ε, added to the variance.
        activation: `"none"`, `"relu"` or `"leaky_relu"`.
        slope: of `"leaky_relu"` below 0.
        activation_first: whether it comes before the normalisation.
    """

    instance: bool
    eps: float
    activation: str = "none"
    slope: float = 0.0
    activation_first: bool = False

    def activate(self, x: Tensor) -> Tensor:
        """Apply the activation to a tensor of any shape."""
        if self.activation == "relu":
            return functional.relu(x)
        return functional.leaky_relu(x, self.slope) if self.activation == "leaky_relu" else x


class Running(NamedTuple):
    """Running mean and unbiased variance, [C], float32 or float64, and how much of new ones they take."""

    mean: Tensor
    variance: Tensor
    momentum: float


class NormInputs(NamedTuple):
    """What forward takes, and saves for backward.

    Attributes:
        x: [N, C, *S].
        weight, bias: [C], γ and β, float32 or float64, or None for 1 and 0.
        statistics: mean and biased variance, [2, C], or [2, N, C] of the samples, float64; None before they
            are computed.
        given: whether they were given, and are no function of x.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    statistics: Tensor | None
    given: bool

    def given_statistics(self, formula: Formula) -> Tensor | None:
        """The statistics as the kernels read them, of each sample [2, N, C] if they are those of samples."""
        if self.statistics is None or not formula.instance or self.statistics.dim() == 3:
            return self.statistics
        return self.statistics.unsqueeze(1).expand(2, *self.x.shape[:2]).contiguous()


def is_dense(x: Tensor) -> bool:
    """Whether the pixels of [N, C, *S] follow each other, or its channels do, without gaps."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def plain(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor | None, formula: Formula
) -> Tensor:
    """The output [N, C, *S] in plain torch, differentiable as often as one likes.

    Args:
        x: [N, C, *S].
        weight, bias: [C], γ and β, or None for 1 and 0.
        statistics: mean and biased variance that are given, [2, C]; None takes those of the input.
        formula: what to compute.
    """
    value = formula.activate(x) if formula.activation_first else x
    if statistics is None:
        dims = [*range(2, x.dim())] if formula.instance else [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(value, dims, correction=0, keepdim=True)
    else:
        shape = (-1, x.shape[1], *[1] * (x.dim() - 2))
        mean, variance = (of.to(x.dtype).view(shape) for of in statistics)
    value = (value - mean) * (variance + formula.eps).rsqrt()
    shape = (1, -1, *[1] * (x.dim() - 2))
    if weight is not None:
        value = value * weight.to(x.dtype).view(shape)
    if bias is not None:
        value = value + bias.to(x.dtype).view(shape)
    return value if formula.activation_first else formula.activate(value)
