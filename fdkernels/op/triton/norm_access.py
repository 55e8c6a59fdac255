"""What the kernels of a normalisation share: how a map is cut, and the rows of (N2), for backend `triton`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fdkernels.op.norm_formula import Formula
from fdkernels.op.pyramid import Weights, accumulate_dtype
from fdkernels.op.triton.access import load_weights, weight_offset
from fdkernels.op.triton.launch import WARPS, LayerAccess, Plan, ceil_div, plan_layers

__all__ = [
    "MERGE",
    "Cut",
    "activate",
    "activations",
    "cut_map",
    "load_map_weights",
    "load_rows",
    "merge_places",
    "offset_of",
    "sizes_of_map",
    "split_mean",
    "through",
]

# What a program of a second pass takes: so many partial results at once, and so many channels. These are few,
# so that there are programs enough, and 64 bytes of a row.
MERGE = {"BLOCK_T": 256, "BLOCK_COLUMN": 8, "num_warps": WARPS}


@triton.jit
def sizes_of_map(C, P, UNIT: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr):
    """Channels and pixels of a map; the dtype of P is that of offsets within a sample."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    if UNIT == "channels":
        C = C // ALIGN * ALIGN
    else:
        P = P // ALIGN * ALIGN
    return C.to(tl.int32), P.to(index)


@triton.jit
def offset_of(channel, pixel, C, P, UNIT: tl.constexpr):
    """The offset of elements within a sample, whose pixels or channels follow each other."""
    if UNIT == "channels":
        return channel.to(P.dtype) + pixel * C
    return channel.to(P.dtype) * P + pixel


@triton.jit
def activate(value, KIND: tl.constexpr, SLOPE: tl.constexpr):
    """The activation of values of any shape; NaN stays."""
    if KIND == "relu":
        value = tl.where(value <= 0, 0, value)
    elif KIND == "leaky_relu":
        value = tl.where(value > 0, value, value * SLOPE)
    return value


@triton.jit
def through(value, grad, KIND: tl.constexpr, SLOPE: tl.constexpr):
    """A gradient times the derivative of the activation at `value`; at 0 it is that below 0, as in torch."""
    if KIND == "relu":
        grad = tl.where(value <= 0, 0, grad)
    elif KIND == "leaky_relu":
        grad = tl.where(value > 0, grad, grad * SLOPE)
    return grad


@triton.jit
def split_mean(mean, DTYPE: tl.constexpr):
    """A float64 mean as a number of the accumulation dtype and what is left of it, in float64."""
    rounded = mean.to(DTYPE)
    return rounded, mean - rounded.to(tl.float64)


@triton.jit
def load_rows(
    statistics_ptr, weight_ptr, bias_ptr, group, groups, channel, C, DTYPE: tl.constexpr, EPS: tl.constexpr
):
    """Mean m, scale and shift [BLOCK_C] of (N2), written z = scale·(u - m) + shift.

    u - m is exact where u is near the mean, and the shift has what m lacks of it: a large mean costs no
    digits. Forward and backward take z from the same numbers by the same operations, so that it has one sign.
    """
    inside = channel < C
    place = statistics_ptr + group * C + channel
    mean, rest = split_mean(tl.load(place, mask=inside, other=0), DTYPE)
    variance = tl.load(place + groups.to(tl.int64) * C, mask=inside, other=0)
    scale = 1 / tl.sqrt((variance + EPS).to(DTYPE))
    if weight_ptr is not None:
        scale = scale * tl.load(weight_ptr + channel, mask=inside, other=0).to(DTYPE)
    shift = -scale * rest.to(DTYPE)
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + channel, mask=inside, other=0).to(DTYPE)
    return mean, scale, shift


@triton.jit
def load_map_weights(fg_ptr, bg_ptr, n, P, pixel, inside, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """The weights of (R1) and v > 0 of sample n, each [BLOCK_P], 0 outside the map."""
    MASK: tl.constexpr = fg_ptr.dtype.element_ty
    BYTES: tl.constexpr = "all" if fg_ptr.dtype.element_ty == tl.uint8 else "none"
    row_bytes = weight_offset(n, P, False, MASK, BYTES)
    fg = fg_ptr.to(tl.int64) + row_bytes
    if bg_ptr is None:
        w_fg, w_bg, valid = load_weights(fg, fg, pixel, inside, False, DTYPE, MASK, BYTES, ALIGN, False)
    else:
        bg = bg_ptr.to(tl.int64) + row_bytes
        w_fg, w_bg, valid = load_weights(fg, bg, pixel, inside, False, DTYPE, MASK, BYTES, ALIGN, True)
    return w_fg, w_bg, valid


@triton.jit
def merge_places(entry, group, channel, N, C, samples):
    """Where partial results [tiles, 2, N, C] of a group lie, and of which tile each is.

    The entries of a group are its tiles, of each the samples that share statistics.
    """
    tile = (entry // samples).to(tl.int64)
    row = tile * 2 * N + group + entry % samples
    return tile, (row * C)[:, None] + channel[None, :]


class Cut(NamedTuple):
    """How a map [N, C, *S] is cut into programs, and what all kernels are told of it.

    Attributes:
        plan: of the map as one layer of one spatial dimension.
        groups: of values that share statistics in a channel, N or 1.
        constants: for the kernels that read the map.
        tile_pixels: of every tile but the last of a sample.
    """

    plan: Plan
    groups: int
    constants: dict[str, Any]
    tile_pixels: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """N, C and P, and the blocks of pixels of a tile."""
        return (*self.plan.shape, self.plan.tile_blocks)

    @property
    def merge_programs(self) -> int:
        """The programs of a second pass over partial results [tiles, 2, N, C]."""
        return self.groups * ceil_div(self.plan.shape[1], MERGE["BLOCK_COLUMN"])


def cut_map(x: Tensor, formula: Formula, regions: Weights | None) -> Cut:
    """Cut a dense map [N, C, *S], over which weights [N, P] may lie."""
    N, C = x.shape[:2]
    P = math.prod(x.shape[2:])
    strides = (C * P, P, 1) if x.is_contiguous() else (C * P, 1, C)
    dtype = accumulate_dtype([x])
    weights: Sequence[Tensor] = () if regions is None else (*regions.fg, *regions.bg)
    mask = weights[0].dtype if weights else dtype
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in (x, *weights))
    (plan,), _ = plan_layers((LayerAccess((N, C, P), (strides,), x.dtype, mask, aligned),), dtype)
    channels, pixels, alignment = plan.block
    constants = {
        "UNIT": plan.units[0],
        "WIDE": plan.wide,
        "BLOCK_C": channels,
        "BLOCK_P": pixels,
        "ALIGN": alignment,
        "num_warps": WARPS,
    }
    return Cut(plan, N if formula.instance else 1, constants, plan.tile_blocks * pixels)


def activations(formula: Formula) -> dict[str, Any]:
    """The activation before the statistics, the one behind them, and the slope of either."""
    before, after = ("none", formula.activation)[:: -1 if formula.activation_first else 1]
    return {"BEFORE": before, "AFTER": after, "SLOPE": formula.slope}
