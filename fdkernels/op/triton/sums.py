"""The first launch of forward on backend `triton`: masked sums (R2), tile by tile.

All layers with the same memory layout share a launch (`launch`). The partial sums of each tile are written,
and a second pass adds them in the order of the tiles (`losses`): the same input gives the same bits. An
element of the features is read once; a mask is read once for the 32 channels (64 where channels are
contiguous) of a block, mostly from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdkernels.op.pyramid import Pyramid, Weights
from fdkernels.op.triton.access import (
    load_weights,
    pixel_offsets,
    sizes_of,
    strides_of,
    tile_of,
    weight_offset,
)
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
from fdkernels.op.triton.second_pass import Partials, plan_second_pass

__all__ = ["sum_tiles"]


@triton.jit
def _sum_tile(
    partial_ptr, program, N, features, fg, bg, C, P, tile_blocks, is_byte, strides,
    DTYPE: tl.constexpr, MASK: tl.constexpr, BYTES: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr,
    WIDE: tl.constexpr, HAS_BG: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The partial sums of one tile and BLOCK_C channels, on which ALIGN is known."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    ALIGN_ROW: tl.constexpr = 1 if UNIT == "channels" else ALIGN  # of the weights of a sample
    if UNIT == "channels":
        C = C // ALIGN * ALIGN
    else:
        P = P // ALIGN * ALIGN
    C = C.to(tl.int32)
    P = P.to(index)
    tile_blocks = tile_blocks.to(tl.int32)
    n, channel_block, tile, first, end = tile_of(program, C, P, tile_blocks, BLOCK_C, BLOCK_P)
    stride_n, stride_c, stride_p, stride_0, stride_1 = strides_of(strides, 0, index, UNIT, DIMS, ALIGN)
    size_1, size_2 = sizes_of(strides, index, DIMS, ALIGN)
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_offsets = channel.to(index) * stride_c
    features_ptr = as_pointer(features, DTYPE, ALIGN) + n * stride_n
    row_bytes = weight_offset(n, P, is_byte, MASK, BYTES)

    sum_fg = tl.zeros([BLOCK_C, BLOCK_P], dtype)
    sum_bg = tl.zeros([BLOCK_C, BLOCK_P], dtype)
    mass_fg = tl.zeros([BLOCK_P], dtype)
    mass_bg = tl.zeros([BLOCK_P], dtype)
    for block in range(first, end):
        pixel = block * BLOCK_P + tl.arange(0, BLOCK_P).to(index)
        inside = pixel < P
        offsets = pixel_offsets(pixel, size_1, size_2, stride_0, stride_1, stride_p, DIMS)
        F = tl.load(
            features_ptr + (channel_offsets[:, None] + offsets[None, :]),
            mask=(channel < C)[:, None] & inside[None, :],
            other=0,
        ).to(dtype)  # [BLOCK_C, BLOCK_P]
        w_fg, w_bg, valid = load_weights(
            fg + row_bytes, bg + row_bytes, pixel, inside, is_byte, dtype, MASK, BYTES, ALIGN_ROW, HAS_BG
        )
        if HAS_BG:
            F = tl.where(valid[None, :], F, 0)
        sum_fg += F * w_fg[None, :]
        sum_bg += F * w_bg[None, :]
        mass_fg += w_fg
        mass_bg += w_bg

    # Partial sums of a layer: [tiles, 2, N, C + 1], the mass in the last column.
    fg_row = partial_ptr + (tile.to(tl.int64) * 2 * N + n) * (C + 1)
    bg_row = fg_row + N.to(tl.int64) * (C + 1)
    tl.store(fg_row + channel, tl.sum(sum_fg, axis=1), mask=channel < C)
    tl.store(bg_row + channel, tl.sum(sum_bg, axis=1), mask=channel < C)
    tl.store(fg_row + C, tl.sum(mass_fg, axis=0), mask=channel_block == 0)
    tl.store(bg_row + C, tl.sum(mass_bg, axis=0), mask=channel_block == 0)


@triton.jit(do_not_specialize=["N", "counters"])
def sums_kernel(
    partial_ptr, counters_ptr, N, counters, starts, tables, columns, strides,
    DTYPE: tl.constexpr, MASK: tl.constexpr, BYTES: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr,
    WIDE: tl.constexpr, HAS_BG: tl.constexpr, BLOCK_SHAPES: tl.constexpr, BLOCK_COUNTER: tl.constexpr,
):  # fmt: skip
    """The partial sums (R2) of all layers; a program sums a tile of one."""
    program = tl.program_id(0)
    if program == 0:  # zeros for `losses_kernel`, which counts finished samples there
        counter = tl.arange(0, BLOCK_COUNTER)
        tl.store(counters_ptr + counter, tl.zeros_like(counter), mask=counter < counters)
    layer = layer_of(starts, program)
    start, partial_start, features, fg, bg = entry_of_layer(tables, layer)
    C, P, tile_blocks, block_shape, is_byte = entry_of_layer(columns, layer)
    places = entry_of_layer(strides, layer)
    for i in tl.static_range(len(BLOCK_SHAPES)):
        if block_shape == i:
            _sum_tile(
                partial_ptr + partial_start, program - start.to(tl.int32), N,
                features, fg, bg, C, P, tile_blocks, is_byte != 0, places,
                DTYPE, MASK, BYTES, UNIT, DIMS, WIDE, HAS_BG,
                BLOCK_SHAPES[i][0], BLOCK_SHAPES[i][1], BLOCK_SHAPES[i][2],
            )  # fmt: skip


def sum_tiles(features: Sequence[Tensor], weights: Weights, pyramid: Pyramid) -> Partials:
    """Launch the first pass of (R2) over [N, C_l, *S_l], once for all layers with the same memory layout."""
    dtype = pyramid.dtype
    N, L = features[0].shape[0], len(features)
    plans, groups = plan_layers(access_of_layers(weights, features), dtype)
    second_pass = plan_second_pass(
        tuple(plan.shape[1] for plan in plans), tuple(plan.tiles for plan in plans), 2 * N
    )
    sums = features[0].new_empty((2, N, second_pass.total_channels), dtype=dtype)
    masses = sums.new_empty((2, N, L))
    partial = sums.new_empty(second_pass.size)
    counters = sums.new_empty(L, dtype=torch.int32)
    for group in groups:
        layers = group.layers
        partial_starts = per_layer_table(second_pass.starts[i] for i in layers)
        launch(sums_kernel, group.programs,
            partial, counters, N, L, group.starts,
            (group.starts, partial_starts, *addresses(layers, features, weights.fg, weights.bg)),
            group.columns, group.strides, HAS_BG=bool(weights.bg),
            BLOCK_SHAPES=group.block_shapes, BLOCK_COUNTER=power_of_2(L), **group.constants,
        )  # fmt: skip
    return Partials(partial, counters, sums, masses, second_pass)
