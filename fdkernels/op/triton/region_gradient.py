"""Gradients of the sums over any number of regions on backend `triton`: (C3) and (C4), one launch each.

Each element of the gradient is written once, where the upstream gradient, and under moments the features, are
read. The weights of all regions are read once for the channels of a block, mostly from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdkernels.op.pyramid import Pyramid, Regions, Weights
from fdkernels.op.triton.access import pixel_offsets, sizes_of, strides_of, tile_of, where_scalar
from fdkernels.op.triton.gradient import in_dtype_of, starts_of
from fdkernels.op.triton.launch import (
    access_of_layers,
    addresses,
    as_pointer,
    ceil_div,
    entry_of_layer,
    launch,
    layer_of,
    per_layer_table,
    plan_layers,
)
from fdkernels.op.triton.region_blocks import RegionBlocks, append, load_region, split_regions, valid_pixels

__all__ = ["region_gradient", "region_weight_gradient"]

# Regions that the gradient unrolls, and the same under moments, where each takes three loads more: the loads
# of more at once are moved ahead and take more registers than there are.
_UNROLLED = 8
_UNROLLED_MOMENTS = 4
# Regions for which the gradient of weights has accumulators, 4 registers each.
_MOST_REGIONS = 16
# Channels and pixels of a block of the gradient of weights, and the elements that a thread loads together.
_WEIGHT_BLOCK = (32, 64)
_TOGETHER = 4


@triton.jit
def _load_row(ptr, k, row_stride, channel, C, R: tl.constexpr):
    """Load row k of g, h or the pivots, [BLOCK_C], 0 from C and R on."""
    return tl.load(ptr + k * row_stride + channel, mask=where_scalar(channel < C, k < R), other=0)


@triton.jit
def _load_map(
    address, n, channel, C, pixel, P, strides, FIRST: tl.constexpr, size_1, size_2,
    DTYPE: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Load a block [BLOCK_C, BLOCK_P] of the map at an address, 0 outside it and where there is none."""
    index: tl.constexpr = P.dtype
    stride_n, stride_c, stride_p, stride_0, stride_1 = strides_of(strides, FIRST, index, UNIT, DIMS, ALIGN)
    offsets = pixel_offsets(pixel, size_1, size_2, stride_0, stride_1, stride_p, DIMS)
    in_block = (channel < C)[:, None] & (pixel < P)[None, :]
    return tl.load(
        as_pointer(address, DTYPE, ALIGN)
        + n * stride_n
        + ((channel.to(index) * stride_c)[:, None] + offsets[None, :]),
        mask=where_scalar(in_block, address != 0),
        other=0,
    )


@triton.jit
def _write_tile(
    grad_sums_ptr, pivots_ptr, program, N, total_channels, grad, upstream, features, weights, C, P,
    tile_blocks, is_byte, strides,
    DTYPE: tl.constexpr, MASK: tl.constexpr, BYTES: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr,
    WIDE: tl.constexpr, SELECTS: tl.constexpr, UPSTREAM: tl.constexpr, FEATURES: tl.constexpr,
    R: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile and BLOCK_C channels."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    dtype: tl.constexpr = grad_sums_ptr.dtype.element_ty
    ALIGN_ROW: tl.constexpr = 1 if UNIT == "channels" else ALIGN  # of the weights of a region
    STRIDES: tl.constexpr = 3 if DIMS == 1 else 5
    OF_FEATURES: tl.constexpr = STRIDES if UPSTREAM is None else 2 * STRIDES
    if UNIT == "channels":
        C = C // ALIGN * ALIGN
    else:
        P = P // ALIGN * ALIGN
    C = C.to(tl.int32)
    P = P.to(index)
    n, channel_block, _tile, first, end = tile_of(program, C, P, tile_blocks.to(tl.int32), BLOCK_C, BLOCK_P)
    stride_n, stride_c, stride_p, stride_0, stride_1 = strides_of(strides, 0, index, UNIT, DIMS, ALIGN)
    size_1, size_2 = sizes_of(strides, index, DIMS, ALIGN)
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_offsets = channel.to(index) * stride_c
    grad_ptr = as_pointer(grad, DTYPE, ALIGN) + n * stride_n
    row_stride = N.to(tl.int64) * total_channels
    g_ptr = grad_sums_ptr + n * total_channels
    for block in range(first, end):
        pixel = block * BLOCK_P + tl.arange(0, BLOCK_P).to(index)
        inside = pixel < P
        total = tl.zeros([BLOCK_C, BLOCK_P], dtype)
        valid = pixel < 0
        if FEATURES is not None:
            F = _load_map(
                features, n, channel, C, pixel, P, strides, OF_FEATURES, size_1, size_2,
                DTYPE, FEATURES, DIMS, ALIGN,
            ).to(dtype)  # fmt: skip
        for part in range(PARTS):
            for j in tl.static_range(PART):
                k = part * PART + j
                w = load_region(
                    weights, n, k, P, pixel, inside, is_byte, dtype, MASK, BYTES, ALIGN_ROW, R, PARTS
                )
                slope = _load_row(g_ptr, k, row_stride, channel, C, R)[:, None]
                if FEATURES is not None:
                    h = _load_row(g_ptr + R * row_stride, k, row_stride, channel, C, R)
                    pivot = _load_row(pivots_ptr + n * total_channels, k, row_stride, channel, C, R)
                    slope += (2 * h)[:, None] * (F - pivot[:, None])
                total += slope * w[None, :]
                valid = valid | (w != 0)
        if SELECTS:
            total = tl.where(valid[None, :], total, 0)
        if UPSTREAM is not None:
            total += _load_map(
                upstream, n, channel, C, pixel, P, strides, STRIDES, size_1, size_2,
                DTYPE, UPSTREAM, DIMS, ALIGN,
            ).to(dtype)  # fmt: skip
        if tl.bfloat16 == DTYPE:
            total = total.to(tl.float32)  # the interpreter has no other way to bfloat16
        offsets = pixel_offsets(pixel, size_1, size_2, stride_0, stride_1, stride_p, DIMS)
        in_block = (channel < C)[:, None] & inside[None, :]
        tl.store(grad_ptr + (channel_offsets[:, None] + offsets[None, :]), total.to(DTYPE), mask=in_block)


@triton.jit(do_not_specialize=["N", "total_channels"])
def region_gradient_kernel(
    grad_sums_ptr, pivots_ptr, N, total_channels, starts, tables, columns, strides,
    DTYPE: tl.constexpr, MASK: tl.constexpr, BYTES: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr,
    WIDE: tl.constexpr, SELECTS: tl.constexpr, UPSTREAM: tl.constexpr, FEATURES: tl.constexpr,
    R: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, BLOCK_SHAPES: tl.constexpr,
):  # fmt: skip
    """The gradient (C3) of all layers; a program writes a tile of one."""
    program = tl.program_id(0)
    layer = layer_of(starts, program)
    start, channel_start, grad, upstream, features, weights = entry_of_layer(tables, layer)
    C, P, tile_blocks, block_shape, is_byte = entry_of_layer(columns, layer)
    places = entry_of_layer(strides, layer)
    if pivots_ptr is not None:
        pivots_ptr += channel_start
    for i in tl.static_range(len(BLOCK_SHAPES)):
        if block_shape == i:
            _write_tile(
                grad_sums_ptr + channel_start, pivots_ptr, program - start.to(tl.int32), N, total_channels,
                grad, upstream, features, weights, C, P, tile_blocks, is_byte != 0, places,
                DTYPE, MASK, BYTES, UNIT, DIMS, WIDE, SELECTS, UPSTREAM, FEATURES, R, PARTS, PART,
                BLOCK_SHAPES[i][0], BLOCK_SHAPES[i][1], BLOCK_SHAPES[i][2],
            )  # fmt: skip


@triton.jit(do_not_specialize=["N", "total_channels"])
def region_weight_gradient_kernel(
    grad_sums_ptr, pivots_ptr, N, total_channels, starts, tables, columns, strides,
    DTYPE: tl.constexpr, MASK: tl.constexpr, BYTES: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr,
    WIDE: tl.constexpr, SELECTS: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The gradients (C4) of the weights of all layers; a program writes a run of pixels."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    dtype: tl.constexpr = grad_sums_ptr.dtype.element_ty
    TOGETHER: tl.constexpr = ALIGN if DTYPE.primitive_bitwidth * ALIGN <= 128 else 2  # that a thread loads
    # Channels that one thread holds of a pixel, which are added before they are accumulated.
    FOLD: tl.constexpr = TOGETHER if UNIT == "channels" else BLOCK_C * BLOCK_P // (256 * TOGETHER)
    part = tl.program_id(0) % PARTS  # fastest: neighbours share the features in cache
    program = tl.program_id(0) // PARTS
    layer = layer_of(starts, program)
    start, channel_start, grad, features, weights = entry_of_layer(tables, layer)
    C, P, _tile_blocks, _kind, is_byte = entry_of_layer(columns, layer)
    strides = entry_of_layer(strides, layer)
    program -= start.to(tl.int32)
    C = C.to(tl.int32)
    P = P.to(index)
    size_1, size_2 = sizes_of(strides, index, DIMS, ALIGN)
    pixel_blocks = tl.cdiv(P, BLOCK_P)
    n = (program // pixel_blocks).to(tl.int64)
    pixel = (program % pixel_blocks).to(index) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < P
    row_stride = N.to(tl.int64) * total_channels
    grad_sums_ptr += channel_start + n * total_channels

    totals = ()
    for _ in tl.static_range(PART):
        totals = append(totals, tl.zeros([BLOCK_C // FOLD, BLOCK_P], dtype))
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        F = _load_map(
            features, n, channel, C, pixel, P, strides, 0, size_1, size_2, DTYPE, UNIT, DIMS, ALIGN
        ).to(dtype)
        more = ()
        for j in tl.static_range(PART):
            k = part * PART + j
            slope = _load_row(grad_sums_ptr, k, row_stride, channel, C, R)[:, None]
            x = F
            if pivots_ptr is not None:
                h = _load_row(grad_sums_ptr + R * row_stride, k, row_stride, channel, C, R)
                pivots_row = pivots_ptr + channel_start + n * total_channels
                x = F - _load_row(pivots_row, k, row_stride, channel, C, R)[:, None]
                slope += h[:, None] * x
            if UNIT == "channels":
                parts = tl.sum(tl.reshape(slope * x, [BLOCK_C // FOLD, FOLD, BLOCK_P]), axis=1)
            else:
                parts = tl.sum(tl.reshape(slope * x, [FOLD, BLOCK_C // FOLD, BLOCK_P]), axis=0)
            more = append(more, totals[j] + parts)
        totals = more

    byte = is_byte != 0
    if SELECTS:
        valid = valid_pixels(weights, n, P, pixel, inside, byte, dtype, MASK, BYTES, 1, R, PARTS, PART)
    for j in tl.static_range(PART):
        k = part * PART + j
        of_pixel = tl.sum(totals[j], axis=0)  # [BLOCK_P]
        if SELECTS:
            of_pixel = tl.where(valid, of_pixel, 0)
        tl.store(
            as_pointer(grad, dtype, 1) + (n * R + k) * P + pixel, of_pixel, mask=where_scalar(inside, k < R)
        )


def region_gradient(
    grad_sums: Tensor,
    regions: Regions,
    features: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    pyramid: Pyramid,
) -> list[Tensor]:
    """Write the gradient (C3) of each layer for grad_sums [R, N, ΣC] or [2R, N, ΣC], plus upstream."""
    grad_sums, pivots = grad_sums.contiguous(), _pivots_of(regions)
    grads = [
        grad_sums.new_empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in pyramid.layers
    ]
    read = features if regions.pivots is not None else []
    added = in_dtype_of(grads, upstream) if any(grad is not None for grad in upstream) else []
    towards = [grad if addend is None else addend for grad, addend in zip(grads, added, strict=False)]
    maps = [tensors for tensors in (grads, towards, read) if tensors]
    R = regions.num_regions
    parts, part = split_regions(R, _UNROLLED if pivots is None else _UNROLLED_MOMENTS)
    _, groups = plan_layers(
        access_of_layers(Weights(regions.weights, []), *maps),
        grad_sums.dtype,
        RegionBlocks(0, False, grad_sums.dtype.itemsize),
    )
    channel_starts = starts_of(pyramid.channels)
    for group in groups:
        layers = group.layers
        launch(region_gradient_kernel, group.programs,
            grad_sums, pivots, grad_sums.shape[1], grad_sums.shape[2], group.starts,
            (group.starts, per_layer_table(channel_starts[i] for i in layers),
                *addresses(layers, grads, added, read, regions.weights)),
            group.columns, group.strides, SELECTS=regions.selects, R=R, PARTS=parts, PART=part,
            UPSTREAM=group.units[1] if added else None, FEATURES=group.units[-1] if read else None,
            BLOCK_SHAPES=group.block_shapes, **group.constants,
        )  # fmt: skip
    return grads


def region_weight_gradient(grad_sums: Tensor, regions: Regions, features: Sequence[Tensor]) -> list[Tensor]:
    """Write the gradients (C4) of the weights, [N, R, P_l] in the dtype of grad_sums."""
    grad_sums, pivots = grad_sums.contiguous(), _pivots_of(regions)
    grads = [torch.empty_like(weight, dtype=grad_sums.dtype) for weight in regions.weights]
    R = regions.num_regions
    parts, part = split_regions(R, _MOST_REGIONS)
    plans, groups = plan_layers(access_of_layers(Weights(regions.weights, []), features), grad_sums.dtype)
    channel_starts = starts_of([plan.shape[1] for plan in plans])
    for group in groups:
        layers = group.layers
        shapes = [plans[i].shape for i in layers]
        starts = starts_of([N * ceil_div(P, _WEIGHT_BLOCK[1]) for N, _, P in shapes])
        launch(region_weight_gradient_kernel, starts.pop() * parts,
            grad_sums, pivots, grad_sums.shape[1], grad_sums.shape[2], per_layer_table(starts),
            (per_layer_table(starts), per_layer_table(channel_starts[i] for i in layers),
                *addresses(layers, grads, features, regions.weights)),
            group.columns, group.strides, ALIGN=min(_TOGETHER, *[shape[2] for shape in group.block_shapes]),
            SELECTS=regions.selects, R=R, PARTS=parts, PART=part,
            BLOCK_C=_WEIGHT_BLOCK[0], BLOCK_P=_WEIGHT_BLOCK[1], **group.constants,
        )  # fmt: skip
    return grads


def _pivots_of(regions: Regions) -> Tensor | None:
    return None if regions.pivots is None else regions.pivots.contiguous()
