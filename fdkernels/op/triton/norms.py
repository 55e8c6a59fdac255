"""Normalisation with its activation on backend `triton`, forward: (N1), (N2) and the region sums (R2).

Three launches where the statistics are those of the input: moments of each tile, the statistics of all
tiles, and the output. A fourth adds the region sums of the tiles, where a sample has more than one. The order
in which numbers are added depends on the shape alone.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdkernels.op.norm_formula import Formula, NormInputs, Running
from fdkernels.op.pyramid import Weights, accumulate_dtype
from fdkernels.op.triton.access import tile_of
from fdkernels.op.triton.launch import launch
from fdkernels.op.triton.norm_access import (
    MERGE,
    Cut,
    activate,
    activations,
    cut_map,
    load_map_weights,
    load_rows,
    merge_places,
    offset_of,
    sizes_of_map,
)

__all__ = ["norm_forward"]


@triton.jit(do_not_specialize=["N", "C", "P", "tile_blocks"])
def norm_moments_kernel(
    x_ptr, partial_ptr, N, C, P, tile_blocks,
    UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    ALIGN: tl.constexpr, BEFORE: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel of a tile, to partial results [tiles, 2, N, C]."""
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    C, P = sizes_of_map(C, P, UNIT, WIDE, ALIGN)
    n, channel_block, tile, first, end = tile_of(tl.program_id(0), C, P, tile_blocks, BLOCK_C, BLOCK_P)
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += n * C * P
    # Deviations from one of the values keep the digits that squares of a large mean would lose.
    first_pixel = first * BLOCK_P
    origin = tl.load(x_ptr + offset_of(channel, first_pixel, C, P, UNIT), mask=channel < C, other=0).to(dtype)
    origin = activate(origin, BEFORE, SLOPE)
    total = tl.zeros([BLOCK_C, BLOCK_P], dtype)
    square = tl.zeros([BLOCK_C, BLOCK_P], dtype)
    for block in range(first, end):
        pixel = block * BLOCK_P + tl.arange(0, BLOCK_P).to(P.dtype)
        in_block = (channel < C)[:, None] & (pixel < P)[None, :]
        place = x_ptr + offset_of(channel[:, None], pixel[None, :], C, P, UNIT)
        u = activate(tl.load(place, mask=in_block, other=0).to(dtype), BEFORE, SLOPE)  # [BLOCK_C, BLOCK_P]
        deviation = tl.where(in_block, u - origin[:, None], 0)
        total += deviation
        square += deviation * deviation

    pixels = (tl.minimum(end * BLOCK_P, P) - first_pixel).to(tl.float64)
    sum_of_tile = tl.sum(total, axis=1).to(tl.float64)
    mean = sum_of_tile / pixels
    place = partial_ptr + (tile.to(tl.int64) * 2 * N + n) * C + channel
    tl.store(place, origin.to(tl.float64) + mean, mask=channel < C)
    square_of_tile = tl.sum(square, axis=1).to(tl.float64) - sum_of_tile * mean
    tl.store(place + N.to(tl.int64) * C, square_of_tile, mask=channel < C)


@triton.jit
def _move(running_ptr, channel, inside, value, momentum):
    """Move running numbers [BLOCK_COLUMN] towards new ones."""
    before = tl.load(running_ptr + channel, mask=inside, other=0).to(tl.float64)
    moved = (1 - momentum) * before + momentum * value
    tl.store(running_ptr + channel, moved.to(running_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "C", "P", "groups", "tiles", "tile_pixels", "momentum", "momentum_rest"])
def norm_statistics_kernel(
    partial_ptr, statistics_ptr, mean_ptr, variance_ptr, N, C, P, groups, tiles, tile_pixels,
    momentum, momentum_rest,
    BLOCK_T: tl.constexpr, BLOCK_COLUMN: tl.constexpr,
):  # fmt: skip
    """The statistics [2, groups, C] of partial results [tiles, 2, N, C], and with one group the running ones.

    The mean of the means first, and then the squares about it, in the order of the tiles: in float64 that is
    as good as joining them two by two.
    """
    program = tl.program_id(0)
    column_blocks = tl.cdiv(C, BLOCK_COLUMN)
    group = (program // column_blocks).to(tl.int64)
    channel = (program % column_blocks) * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
    inside = channel < C
    samples = N // groups
    entries = tiles * samples
    count = P.to(tl.float64) * samples.to(tl.float64)
    half = N.to(tl.int64) * C

    total = tl.zeros([BLOCK_T, BLOCK_COLUMN], tl.float64)
    for first in range(0, entries, BLOCK_T):
        entry = first + tl.arange(0, BLOCK_T)
        tile, place = merge_places(entry, group, channel, N, C, samples)
        in_block = (entry < entries)[:, None] & inside[None, :]
        pixels = tl.minimum(P - tile * tile_pixels, tile_pixels).to(tl.float64)
        total += pixels[:, None] * tl.load(partial_ptr + place, mask=in_block, other=0)
    mean = tl.sum(total, axis=0) / count

    total = tl.zeros([BLOCK_T, BLOCK_COLUMN], tl.float64)
    for first in range(0, entries, BLOCK_T):
        entry = first + tl.arange(0, BLOCK_T)
        tile, place = merge_places(entry, group, channel, N, C, samples)
        in_block = (entry < entries)[:, None] & inside[None, :]
        pixels = tl.minimum(P - tile * tile_pixels, tile_pixels).to(tl.float64)
        difference = tl.load(partial_ptr + place, mask=in_block, other=0) - mean[None, :]
        square = tl.load(partial_ptr + half + place, mask=in_block, other=0)
        total += tl.where(in_block, square + pixels[:, None] * difference * difference, 0)
    variance = tl.sum(total, axis=0) / count

    place = statistics_ptr + group * C + channel
    tl.store(place, mean, mask=inside)
    tl.store(place + groups.to(tl.int64) * C, variance, mask=inside)
    if mean_ptr is not None:
        share = tl.cast(momentum, tl.float64) + tl.cast(momentum_rest, tl.float64)
        _move(mean_ptr, channel, inside, mean, share)
        _move(variance_ptr, channel, inside, variance * (count / (count - 1)), share)


@triton.jit(do_not_specialize=["N", "C", "P", "tile_blocks", "groups"])
def norm_apply_kernel(
    x_ptr, y_ptr, statistics_ptr, weight_ptr, bias_ptr, partial_ptr, fg_ptr, bg_ptr,
    N, C, P, tile_blocks, groups,
    UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    ALIGN: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, SLOPE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """The output (N2) of a tile, and with weights its partial region sums [tiles, 2, N, C]."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    ALIGN_ROW: tl.constexpr = 1 if UNIT == "channels" else ALIGN  # of the weights of a sample
    C, P = sizes_of_map(C, P, UNIT, WIDE, ALIGN)
    n, channel_block, tile, first, end = tile_of(tl.program_id(0), C, P, tile_blocks, BLOCK_C, BLOCK_P)
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += n * C * P
    y_ptr += n * C * P
    mean, scale, shift = load_rows(
        statistics_ptr, weight_ptr, bias_ptr, n % groups, groups, channel, C, dtype, EPS
    )
    sum_fg = tl.zeros([BLOCK_C, BLOCK_P], dtype)
    sum_bg = tl.zeros([BLOCK_C, BLOCK_P], dtype)
    for block in range(first, end):
        pixel = block * BLOCK_P + tl.arange(0, BLOCK_P).to(P.dtype)
        inside = pixel < P
        in_block = (channel < C)[:, None] & inside[None, :]
        offsets = offset_of(channel[:, None], pixel[None, :], C, P, UNIT)
        u = activate(tl.load(x_ptr + offsets, mask=in_block, other=0).to(dtype), BEFORE, SLOPE)
        z = tl.fma(u - mean[:, None], scale[:, None], shift[:, None])
        y = activate(z, AFTER, SLOPE).to(DTYPE)  # [BLOCK_C, BLOCK_P]
        tl.store(y_ptr + offsets, y, mask=in_block)
        if fg_ptr is not None:
            w_fg, w_bg, valid = load_map_weights(fg_ptr, bg_ptr, n, P, pixel, inside, dtype, ALIGN_ROW)
            F = tl.where(valid[None, :] & in_block, y.to(dtype), 0)
            sum_fg += F * w_fg[None, :]
            sum_bg += F * w_bg[None, :]
    if fg_ptr is not None:
        place = partial_ptr + (tile.to(tl.int64) * 2 * N + n) * C + channel
        tl.store(place, tl.sum(sum_fg, axis=1), mask=channel < C)
        tl.store(place + N.to(tl.int64) * C, tl.sum(sum_bg, axis=1), mask=channel < C)


def norm_forward(
    inputs: NormInputs, formula: Formula, running: Running | None, regions: Weights | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute statistics (N1), output (N2) and region sums of x [N, C, *S]."""
    x, weight, bias = inputs[:3]
    N, C = x.shape[:2]
    cut = cut_map(x, formula, regions)
    statistics = inputs.given_statistics(formula)
    if statistics is None:
        statistics = _statistics(x, formula, running, cut)
    y = torch.empty_like(x)
    fg, bg, partial = None, None, None
    if regions is not None:
        fg, bg = regions.fg[0], regions.bg[0] if regions.bg else None
        partial = x.new_empty((cut.plan.tiles, 2, N, C), dtype=accumulate_dtype([x]))
    launch(norm_apply_kernel, cut.plan.programs,
        x, y, statistics, weight, bias, partial, fg, bg, *cut.sizes, cut.groups,
        EPS=formula.eps, **activations(formula), **cut.constants,
    )  # fmt: skip
    if partial is None:
        return y, statistics, None
    return y, statistics, partial[0] if cut.plan.tiles == 1 else partial.sum(0)


def _statistics(x: Tensor, formula: Formula, running: Running | None, cut: Cut) -> Tensor:
    """The statistics (N1) of a map [N, C, *S], [2, C] or [2, N, C]; running ones are moved."""
    N, C, P = cut.plan.shape
    partial = x.new_empty((cut.plan.tiles, 2, N, C), dtype=torch.float64)
    shape = (2, N, C) if formula.instance else (2, C)
    statistics = partial.new_empty(shape)
    before = activations(formula)
    del before["AFTER"]
    launch(norm_moments_kernel, cut.plan.programs, x, partial, *cut.sizes, **before, **cut.constants)
    in_kernel = running if cut.groups == 1 else None
    momentum, rest = _split(0.0 if in_kernel is None else in_kernel.momentum)
    launch(norm_statistics_kernel, cut.merge_programs,
        partial, statistics, in_kernel and in_kernel.mean, in_kernel and in_kernel.variance,
        N, C, P, cut.groups, cut.plan.tiles, cut.tile_pixels, momentum, rest, **MERGE,
    )  # fmt: skip
    if running is not None and in_kernel is None:
        mean, variance = statistics.mean(1)
        for moved, value in ((running.mean, mean), (running.variance, variance * (P / (P - 1)))):
            moved.copy_((1 - running.momentum) * moved.double() + running.momentum * value)
    return statistics


def _split(number: float) -> tuple[float, float]:
    """A number as two of float32, in which Triton takes floats."""
    (rounded,) = struct.unpack("f", struct.pack("f", number))
    return rounded, number - rounded
