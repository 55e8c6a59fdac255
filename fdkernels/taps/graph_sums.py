"""Region sums that a compiled network makes of its features, which then need not leave its graph."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fdkernels.backend import resolve
from fdkernels.op.autograd import Call, run_pass
from fdkernels.op.pyramid import describe
from fdkernels.op.weights import weights_of
from fdkernels.taps.early import EarlyMask

__all__ = ["GraphSums", "sums_in_graph"]


class GraphSums(NamedTuple):
    """What a compiled graph puts out of one tapped output [N, C, *S].

    Attributes:
        sums: [2, N, C] over foreground and background; they have a gradient.
        masses: [2, N, 1].
        size: S.
        dtype: of the features.
    """

    sums: Tensor
    masses: Tensor
    size: tuple[int, ...]
    dtype: torch.dtype

    def stand_in(self) -> Tensor:
        """A tensor [N, C, *S] that is to checks what the features were; its values are NaN, of one number."""
        nan = self.sums.new_full((), math.nan, dtype=self.dtype, requires_grad=self.sums.requires_grad)
        return nan.expand(*self.sums.shape[1:], *self.size)


def sums_in_graph(features: Tensor, early: EarlyMask) -> GraphSums | None:
    """The region sums of features [N, C, *S] under a mask; None where the loss has to see the features."""
    mask = early.values_for(features)
    if mask is None:
        return None
    backend, pyramid = resolve("auto", features.device), describe([features])
    sizes = [features.shape[2:]]
    weights = weights_of(mask, sizes, pyramid.dtype, early.mask_resize, early.ignore_index, backend)
    sums, masses = run_pass(Call(backend, pyramid), [features], weights, None)
    return GraphSums(sums, masses, tuple(features.shape[2:]), features.dtype)
