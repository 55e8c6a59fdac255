"""A mask that is known before the forward pass: region sums then come from the pass that writes features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fdkernels.op.pyramid import Weights, accumulate_dtype
from fdkernels.op.weights import weights_of
from fdkernels.transforms import has_values, unwrap_dead, version_of

__all__ = ["AskedSizes", "EarlyMask", "TakesMask"]

# Shapes of masks whose sizes are remembered.
_MOST_SHAPES = 32


class _Key(NamedTuple):
    """Of weights: what the features [N, C, *S] and the call that asked for them have in common.

    Attributes:
        batch, size, device: of the features.
        dtype: the accumulation dtype.
        backend: by which they are made.
    """

    batch: int
    size: torch.Size
    device: torch.device
    dtype: torch.dtype
    backend: str


class EarlyMask:
    """A mask and how it is resized, with the weights of the sizes that were asked for.

    Args:
        mask: [N, 1, *S0] or [N, *S0]; it is checked when the loss is computed.
        mask_resize: `"area"`, `"max"` or `"nearest"`.
        ignore_index: the mask value of pixels to leave out, or None.
        asked: what was asked of masks of this shape in earlier passes, and is made together once the first of
            it is asked for; what is asked of this one is added.
    """

    def __init__(self, mask: Tensor, mask_resize: str, ignore_index: float | None, asked: set[_Key]) -> None:
        self.mask, self.mask_resize, self.ignore_index = unwrap_dead(mask), mask_resize, ignore_index
        self._version = version_of(mask)
        self._made: dict[_Key, Weights | None] = {}
        self._asked = asked

    def is_of(self, values: Tensor, mask_resize: str, ignore_index: float | None) -> bool:
        """Whether a loss has the same mask, values [N, 1, *S0], unchanged since, and resizes it likewise."""
        mask = self.mask
        is_same = not has_values(mask) or mask.data_ptr() == values.data_ptr()
        is_same = is_same and mask.dtype == values.dtype
        is_same = is_same and mask.numel() == values.numel() and version_of(mask) == self._version
        return is_same and (self.mask_resize, self.ignore_index) == (mask_resize, ignore_index)

    def values_for(self, x: Tensor) -> Tensor | None:
        """The mask as [N, 1, *S0] for features [N, C, *S]; None if it does not fit or needs a gradient."""
        mask = self.mask.unsqueeze(1) if self.mask.dim() == x.dim() - 1 else self.mask
        fits = mask.dim() == x.dim() and mask.shape[:2] == (x.shape[0], 1) and mask.device == x.device
        fits = fits and has_values(mask) == has_values(x)
        return mask if fits and mask.numel() and not (mask.requires_grad or mask.is_complex()) else None

    def weights_of(self, x: Tensor, backend: str) -> Weights | None:
        """The weights [N, P] for features of the size of x, [N, C, *S]; None where they cannot fit."""
        shape = x.shape
        key = _Key(shape[0], shape[2:], x.device, accumulate_dtype((x,)), backend)
        if key not in self._made:
            mask = self.values_for(x)
            if mask is None:
                self._made[key] = None
            else:
                self._make(key, mask)
        return self._made[key]

    def _make(self, key: _Key, mask: Tensor) -> None:
        """Make the weights for a key from the mask [N, 1, *S0], and those that earlier passes asked for."""
        self._asked.add(key)
        alike = (one for one in self._asked if one._replace(size=key.size) == key)
        keys = [one for one in alike if len(one.size) == len(key.size) and one not in self._made]
        sizes = [one.size for one in keys]
        made = weights_of(mask, sizes, key.dtype, self.mask_resize, self.ignore_index, key.backend)
        self._made |= {one: made.select([index]) for index, one in enumerate(keys)}

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


class AskedSizes:
    """What the features of a network asked of masks, by the shape of the mask, from pass to pass."""

    def __init__(self) -> None:
        self._of_shape: dict[torch.Size, set[_Key]] = {}

    def of(self, mask: Tensor) -> set[_Key]:
        """What was asked of masks of the shape of this one, of any shape."""
        if mask.shape not in self._of_shape and len(self._of_shape) == _MOST_SHAPES:
            self._of_shape.clear()
        return self._of_shape.setdefault(mask.shape, set())


@runtime_checkable
class TakesMask(Protocol):
    """A module that computes the region sums of its output with it."""

    def take_mask(self, early: EarlyMask | None) -> None:
        """Compute region sums under this mask from now on; None ends that."""
