"""A mask that is known before the forward pass: region sums then come from the pass that writes features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fdkernels.op.pyramid import Weights, accumulate_dtype
from fdkernels.op.weights import weights_of
from fdkernels.transforms import version_of

__all__ = ["EarlyMask", "TakesMask"]


class _Key(NamedTuple):
    size: torch.Size
    dtype: torch.dtype
    backend: str


class EarlyMask:
    """A mask and how it is resized, with the weights of the sizes that were asked for.

    Args:
        mask: [N, 1, *S0] or [N, *S0]; it is checked when the loss is computed.
        mask_resize: `"area"`, `"max"` or `"nearest"`.
        ignore_index: the mask value of pixels to leave out, or None.
    """

    def __init__(self, mask: Tensor, mask_resize: str, ignore_index: float | None) -> None:
        self.mask, self.mask_resize, self.ignore_index = mask, mask_resize, ignore_index
        self._version = version_of(mask)
        self._made: dict[_Key, Weights] = {}

    def is_of(self, values: Tensor, mask_resize: str, ignore_index: float | None) -> bool:
        """Whether a loss has the same mask, values [N, 1, *S0], unchanged since, and resizes it likewise."""
        mask = self.mask
        is_same = mask.data_ptr() == values.data_ptr() and mask.dtype == values.dtype
        is_same = is_same and mask.numel() == values.numel() and version_of(mask) == self._version
        return is_same and (self.mask_resize, self.ignore_index) == (mask_resize, ignore_index)

    def weights_of(self, x: Tensor, backend: str) -> Weights | None:
        """The weights [N, P] for features of the size of x, [N, C, *S]; None where they cannot fit."""
        mask = self.mask.unsqueeze(1) if self.mask.dim() == x.dim() - 1 else self.mask
        fits = mask.dim() == x.dim() and mask.shape[:2] == (x.shape[0], 1) and mask.device == x.device
        if not fits or mask.numel() == 0 or mask.requires_grad or mask.is_complex():
            return None  # the loss says what is wrong, or computes what the kernels do not
        key = _Key(x.shape[2:], accumulate_dtype([x]), backend)
        if key not in self._made:
            self._made[key] = weights_of(
                mask, [key.size], key.dtype, self.mask_resize, self.ignore_index, backend
            )
        return self._made[key]

    def weights_of_all(self, layers: Sequence[Tensor], dtype: torch.dtype, backend: str) -> Weights | None:
        """The weights [N, P_l] of layers [N, C_l, *S_l], those that were made early among them.

        None where the loss is not computed as the sums were: by another backend or in another dtype.
        """
        is_other = all(key.backend != backend for key in self._made)
        if is_other or any(accumulate_dtype([layer]) != dtype for layer in layers):
            return None
        found = [self.weights_of(layer, backend) for layer in layers]
        if any(weights is None for weights in found):
            return None
        return Weights(
            [weights.fg[0] for weights in found if weights is not None],
            [weights.bg[0] for weights in found if weights is not None and weights.bg],
        )


@runtime_checkable
class TakesMask(Protocol):
    """A module that computes the region sums of its output with it."""

    def take_mask(self, early: EarlyMask | None) -> None:
        """Compute region sums under this mask from now on; None ends that."""
