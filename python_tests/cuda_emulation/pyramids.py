"""Layers with their weights as the kernels take them, and memory that shows what a kernel wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from cases import FEATURE_DTYPES
from cases import LAYOUTS as COMMON_LAYOUTS
from cases import lay_out as common_lay_out
from fdkernels.op.pyramid import Pyramid, Weights, describe

MASK_DTYPES = (torch.uint8, torch.float32, torch.float64)
LAYOUTS = (*COMMON_LAYOUTS, "sliced by vectors", "channels of more", "off alignment")
DENSE_LAYOUTS = ("contiguous", "channels_last", "transposed", "off alignment", "sliced by vectors")
# Half of the distance between 1 and the next number.
UNIT = {dtype: torch.finfo(dtype).eps / 2 for dtype in FEATURE_DTYPES}


class Outside(NamedTuple):
    """Memory around a tensor, full of NaN as long as nobody writes there."""

    memory: Tensor
    tensor: Tensor

    def assert_untouched(self) -> None:
        inside = torch.zeros_like(self.memory, dtype=torch.bool)
        inside.as_strided(self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()).fill_(True)
        assert self.memory[~inside].isnan().all(), "a kernel wrote outside of its output"


def unwritten(
    shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous", room: int = 64
) -> Outside:
    """A tensor of NaN with NaN around it."""
    like = lay_out(torch.zeros(shape), layout)
    start = room + (layout == "off alignment")
    last = sum((size - 1) * step for size, step in zip(shape, like.stride(), strict=True))
    memory = torch.full((start + max(last + 1, 0) + room,), math.nan, dtype=dtype)
    return Outside(memory, memory.as_strided(shape, like.stride(), start))


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values [N, C, *S] with other strides."""
    if layout == "off alignment":  # of a vector access, not of an element
        room = values.new_empty(values.numel() + 1)
        return room[1:].view(values.shape).copy_(values)
    if layout == "sliced by vectors":  # so that vector accesses stay on their alignment
        room = values.new_full((*values.shape[:-1], values.shape[-1] + 32), math.nan)
        return room[..., 16 : 16 + values.shape[-1]].copy_(values)
    if layout == "channels of more":
        N, C, *spatial = values.shape
        room = values.new_full((N, *spatial, C + 32), math.nan).movedim(-1, 1)
        return room[:, 16 : 16 + C].copy_(values)
    return common_lay_out(values, layout)


class Inputs(NamedTuple):
    """The layers of a call and their weights."""

    features: list[Tensor]
    weights: Weights

    @property
    def pyramid(self) -> Pyramid:
        return describe(self.features)

    @property
    def accumulate(self) -> torch.dtype:
        return self.pyramid.dtype

    @property
    def batch(self) -> int:
        return self.features[0].shape[0]

    def wide(self) -> Inputs:
        """In float64, the weights as the kernels round them."""
        fg, bg = ([w.to(self.accumulate).double() for w in kind] for kind in self.weights)
        return Inputs([layer.double() for layer in self.features], Weights(fg, bg))


def make_layer(
    shape: Sequence[int], dtype: torch.dtype, layout: str, mask_dtype: torch.dtype, has_bg: bool
) -> Inputs:
    """One layer; with background weights some pixels are ignored, and their features are NaN."""
    N, _, *spatial = shape
    P = math.prod(spatial)
    y = torch.rand(N, P, dtype=torch.float64)
    y = (y < 0.4).double() if mask_dtype == torch.uint8 else y
    valid = (torch.rand(N, P) < 0.7).double()
    values = torch.randn(shape, dtype=torch.float64).to(dtype)
    if has_bg and layout != "expanded":
        values.masked_fill_((valid == 0).view(N, 1, *spatial), math.nan)
    features = lay_out(values, layout)
    if not has_bg:
        return Inputs([features], Weights([y.to(mask_dtype)], []))
    fg, bg = (valid * y).to(mask_dtype), (valid * (1 - y)).to(mask_dtype)
    return Inputs([features], Weights([fg], [bg]))


def join(layers: Sequence[Inputs]) -> Inputs:
    features, weights = zip(*layers, strict=True)
    fg, bg = (list(chain.from_iterable(kind)) for kind in zip(*weights, strict=True))
    return Inputs(list(chain.from_iterable(features)), Weights(fg, bg))


def assert_within(got: Tensor, wanted: Tensor, band: Tensor, what: str) -> None:
    """NaN is never within."""
    error = (got.double() - wanted).abs()
    assert (error <= band).all(), (
        f"{what} is off by {(error / band).nan_to_num(math.inf).max():.3g} of its band"
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
