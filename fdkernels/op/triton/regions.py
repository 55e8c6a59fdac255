"""Sums over any number of regions (C1), and second moments (C2), on backend `triton`.

Two launches, as for two regions: partial sums of tiles, and the second pass. A program reads a tile of the
features once for up to 32 sums; of more, each part of the regions has programs of its own, next to each
other, so that the tile is mostly in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fdkernels.op.pyramid import Pyramid, Regions, Weights
from fdkernels.op.triton.access import load_weight, pixel_offsets, sizes_of, strides_of, tile_of, where_scalar
from fdkernels.op.triton.launch import (
    access_of_layers,
    addresses,
    as_pointer,
    entry_of_layer,
    launch,
    layer_of,
    per_layer_table,
    plan_layers,
    power_of_2,
)
from fdkernels.op.triton.region_blocks import RegionBlocks, append, load_region, split_regions, valid_pixels
from fdkernels.op.triton.second_pass import plan_second_pass

__all__ = ["region_sums"]

# Sums that a program unrolls, with accumulators in registers while it reads the features once.
_MOST_SUMS = 32


@triton.jit
def _fold(x, UNIT: tl.constexpr, FOLD: tl.constexpr):
    """Add the FOLD pixels [BLOCK_C, BLOCK_P] that one thread holds of each channel; no thread asks another.

    They are neighbours where pixels are contiguous, and far from each other where channels are.
    """
    C: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1] // FOLD
    if FOLD == 1:
        folded = x
    elif UNIT == "channels":
        folded = tl.sum(tl.reshape(x, [C, FOLD, P]), axis=1)
    else:
        folded = tl.sum(tl.reshape(x, [C, P, FOLD]), axis=2)
    return folded


@triton.jit
def _write_masses(
    row_ptr, row_stride, n, first_region, weights, P, begin, end, is_byte,
    MASK: tl.constexpr, BYTES: tl.constexpr, R: tl.constexpr, PART: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write the masses of PART regions over the pixels from begin to end."""
    BLOCK_P: tl.constexpr = 128  # with 32 regions 16 a thread
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    j = tl.arange(0, BLOCK_R)
    counts = (j < PART) & (first_region + j < R)
    row = (n * R + first_region + j) * P
    mass = tl.zeros([BLOCK_R, BLOCK_P], dtype)
    for start in range(begin, end, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P).to(P.dtype)
        inside = counts[:, None] & (pixel < end)[None, :]
        mass += load_weight(weights, row[:, None] + pixel[None, :], inside, is_byte, dtype, MASK, BYTES, 1)
    tl.store(row_ptr + j * row_stride, tl.sum(mass, axis=1), mask=counts)


@triton.jit
def _sum_tile(
    partial_ptr, pivots_ptr, program, part, N, total_channels, features, weights, C, P, tile_blocks,
    is_byte, strides,
    DTYPE: tl.constexpr, MASK: tl.constexpr, BYTES: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr,
    WIDE: tl.constexpr, SELECTS: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ALIGN: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """The partial sums of one tile, BLOCK_C channels and PART regions."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    ALIGN_ROW: tl.constexpr = 1 if UNIT == "channels" else ALIGN  # of the weights of a region
    ROWS: tl.constexpr = R if pivots_ptr is None else 2 * R
    if UNIT == "channels":
        C = C // ALIGN * ALIGN
    else:
        P = P // ALIGN * ALIGN
    C = C.to(tl.int32)
    P = P.to(index)
    n, channel_block, tile, first, end = tile_of(program, C, P, tile_blocks.to(tl.int32), BLOCK_C, BLOCK_P)
    stride_n, stride_c, stride_p, stride_0, stride_1 = strides_of(strides, 0, index, UNIT, DIMS, ALIGN)
    size_1, size_2 = sizes_of(strides, index, DIMS, ALIGN)
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_offsets = channel.to(index) * stride_c
    features_ptr = as_pointer(features, DTYPE, ALIGN) + n * stride_n
    first_region = part * PART
    # Partial sums of a layer: [tiles, R or 2R, N, C + 1], the mass in the last column of the first R.
    row_stride = N.to(tl.int64) * (C + 1)
    row_ptr = partial_ptr + tile.to(tl.int64) * ROWS * row_stride + n * (C + 1)
    pivot_stride = N.to(tl.int64) * total_channels

    sums = ()
    squares = ()
    for _ in tl.static_range(PART):
        sums = append(sums, _fold(tl.zeros([BLOCK_C, BLOCK_P], dtype), UNIT, FOLD))
        if pivots_ptr is not None:
            squares = append(squares, _fold(tl.zeros([BLOCK_C, BLOCK_P], dtype), UNIT, FOLD))
    for block in range(first, end):
        pixel = block * BLOCK_P + tl.arange(0, BLOCK_P).to(index)
        inside = pixel < P
        offsets = pixel_offsets(pixel, size_1, size_2, stride_0, stride_1, stride_p, DIMS)
        F = tl.load(
            features_ptr + (channel_offsets[:, None] + offsets[None, :]),
            mask=(channel < C)[:, None] & inside[None, :],
            other=0,
        ).to(dtype)  # [BLOCK_C, BLOCK_P]
        if SELECTS:
            valid = valid_pixels(
                weights, n, P, pixel, inside, is_byte, dtype, MASK, BYTES, ALIGN_ROW, R, PARTS, PART
            )
            F = tl.where(valid[None, :], F, 0)
        more_sums = ()
        more_squares = ()
        for j in tl.static_range(PART):
            k = first_region + j
            w = load_region(weights, n, k, P, pixel, inside, is_byte, dtype, MASK, BYTES, ALIGN_ROW, R, PARTS)
            if pivots_ptr is None:
                more_sums = append(more_sums, sums[j] + _fold(F * w[None, :], UNIT, FOLD))
            else:
                # Where an ignored pixel was selected out x is finite, and its weight is 0.
                has_pivot = where_scalar(channel < C, k < R)
                pivot = tl.load(
                    pivots_ptr + k * pivot_stride + n * total_channels + channel, mask=has_pivot, other=0
                )
                x = F - pivot[:, None]
                weighted = x * w[None, :]
                more_sums = append(more_sums, sums[j] + _fold(weighted, UNIT, FOLD))
                more_squares = append(more_squares, squares[j] + _fold(weighted * x, UNIT, FOLD))
        sums = more_sums
        squares = more_squares

    for j in tl.static_range(PART):
        k = first_region + j
        inside = where_scalar(channel < C, k < R)
        tl.store(row_ptr + k * row_stride + channel, tl.sum(sums[j], axis=1), mask=inside)
        if pivots_ptr is not None:
            tl.store(row_ptr + (R + k) * row_stride + channel, tl.sum(squares[j], axis=1), mask=inside)
    if channel_block == 0:
        end = tl.minimum(end * BLOCK_P, P)
        _write_masses(
            row_ptr + first_region * row_stride + C, row_stride, n, first_region, weights, P,
            first * BLOCK_P, end, is_byte, MASK, BYTES, R, PART, BLOCK_R,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "total_channels"])
def region_sums_kernel(
    partial_ptr, pivots_ptr, N, total_channels, starts, tables, columns, strides,
    DTYPE: tl.constexpr, MASK: tl.constexpr, BYTES: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr,
    WIDE: tl.constexpr, SELECTS: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_SHAPES: tl.constexpr,
):  # fmt: skip
    """The partial sums (C1) and (C2) of all layers; a program sums a tile of one."""
    part = tl.program_id(0) % PARTS  # fastest: neighbours share the features in cache
    program = tl.program_id(0) // PARTS
    layer = layer_of(starts, program)
    start, partial_start, channel_start, features, weights = entry_of_layer(tables, layer)
    C, P, tile_blocks, block_shape, is_byte = entry_of_layer(columns, layer)
    places = entry_of_layer(strides, layer)
    if pivots_ptr is not None:
        pivots_ptr += channel_start
    for i in tl.static_range(len(BLOCK_SHAPES)):
        if block_shape == i:
            _sum_tile(
                partial_ptr + partial_start, pivots_ptr, program - start.to(tl.int32), part,
                N, total_channels, features, weights, C, P, tile_blocks, is_byte != 0, places,
                DTYPE, MASK, BYTES, UNIT, DIMS, WIDE, SELECTS, R, PARTS, PART, BLOCK_R,
                BLOCK_SHAPES[i][0], BLOCK_SHAPES[i][1], BLOCK_SHAPES[i][2], BLOCK_SHAPES[i][3],
            )  # fmt: skip


def region_sums(features: Sequence[Tensor], regions: Regions, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
    """Sum layers [N, C_l, *S_l] by (C1) and (C2): [R, N, ΣC], or [2R, N, ΣC], and masses [R, N, L].

    All layers with the same memory layout share the first launch.
    """
    dtype, R = pyramid.dtype, regions.num_regions
    N, L = features[0].shape[0], len(features)
    pivots = None if regions.pivots is None else regions.pivots.contiguous()
    each = 1 if pivots is None else 2  # rows of a region
    parts, part = split_regions(R, _MOST_SUMS // each)
    plans, groups = plan_layers(
        access_of_layers(Weights(regions.weights, []), features),
        dtype,
        RegionBlocks(part, pivots is not None, dtype.itemsize),
    )
    second_pass = plan_second_pass(
        tuple(plan.shape[1] for plan in plans), tuple(plan.tiles for plan in plans), each * R * N
    )
    sums = features[0].new_empty((each * R, N, second_pass.total_channels), dtype=dtype)
    masses = sums.new_empty((R, N, L))
    partial = sums.new_empty(second_pass.size)
    for group in groups:
        layers = group.layers
        starts = [per_layer_table(of_layer[i] for i in layers) for of_layer in
            (second_pass.starts, second_pass.channel_starts)]  # fmt: skip
        launch(region_sums_kernel, group.programs * parts,
            partial, pivots, N, second_pass.total_channels, group.starts,
            (group.starts, *starts, *addresses(layers, features, regions.weights)),
            group.columns, group.strides,
            SELECTS=regions.selects, R=R, PARTS=parts, PART=part, BLOCK_R=power_of_2(part),
            BLOCK_SHAPES=group.block_shapes, **group.constants,
        )  # fmt: skip
    second_pass.run(partial, sums, masses)
    return sums, masses
