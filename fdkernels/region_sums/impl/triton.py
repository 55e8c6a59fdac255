"""Backend `triton` of region_sums: masked sums (R2) and their gradients (R3), (R4), tile by tile.

`_plan` cuts a layer into tiles. Forward writes the partial sums of every tile and a second kernel
adds them in the order of the tiles; both backward kernels write every element once. So the same
input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdkernels.region_sums.geometry import Geometry, accumulate_dtype

__all__ = ["backward", "forward"]

# Elements of a block: 16 a thread for 8 warps; forward holds two accumulators of it in registers.
_BLOCK = 4096
# Pixels of a block where pixels are contiguous and channels fill it: so few that every warp loads
# its own part of the mask, without barriers to share it, and yet 256 bytes or more of a channel.
_ADJACENT_PIXELS = 128
# Channels of a block where channels are contiguous: 128 bytes or more of each pixel.
_ADJACENT_CHANNELS = 64
# A tile has at least this many pixels, so that its partial sums are about 1 % of what it reads ...
_MIN_TILE_PIXELS = 256
# ... and at most this many blocks: longer chains of additions would lose digits in float32.
_MAX_TILE_BLOCKS = 128
# Programs of one sample from which on tiles grow rather than become more.
_PROGRAMS = 256
# Partial sums that a program of the second pass holds: tiles by columns.
_REDUCE_TILES, _REDUCE_COLUMNS = 64, 32
# Above this many pixels the index of a pixel needs 64 bits.
_WIDE_PIXELS = 2**30

# Integers that decide nothing about alignment: one compilation serves all their values.
_PLAIN = ["N", "layer", "channel_start", "partial_start", "total_channels", "tile_blocks", "size_1"]


@triton.jit
def _pixel_offsets(pixel, size_1, size_2, stride_0, stride_1, stride_2, DIMS: tl.constexpr):
    column = pixel % size_2 if DIMS > 1 else pixel
    offsets = column.to(tl.int64) * stride_2
    if DIMS > 1:
        row = pixel // size_2
        offsets += (row % size_1 if DIMS > 2 else row).to(tl.int64) * stride_1
        if DIMS > 2:
            offsets += (row // size_1).to(tl.int64) * stride_0
    return offsets  # [BLOCK_P] int64


@triton.jit
def _weights(fg_ptr, bg_ptr, pixel, inside, DTYPE: tl.constexpr, HAS_BG: tl.constexpr):
    fg = tl.load(fg_ptr + pixel, mask=inside, other=0).to(DTYPE)
    if HAS_BG:
        bg = tl.load(bg_ptr + pixel, mask=inside, other=0).to(DTYPE)
        valid = (fg != 0) | (bg != 0)
    else:
        bg = tl.where(inside, 1 - fg, 0)
        valid = inside
    return fg, bg, valid  # w_fg, w_bg, v > 0, each [BLOCK_P] and 0 outside of the layer


@triton.jit
def _place(C, P, tile_blocks, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    channel_blocks = tl.maximum(tl.cdiv(C, BLOCK_C), 1)
    pixel_blocks = tl.cdiv(P, BLOCK_P)
    tiles = tl.maximum(tl.cdiv(pixel_blocks, tile_blocks), 1)
    program = tl.program_id(0)
    channel_block = program % channel_blocks  # fastest: neighbours share the mask in cache
    tile = (program // channel_blocks) % tiles
    n = (program // channel_blocks // tiles).to(tl.int64)
    if WIDE:
        tile = tile.to(tl.int64)
    first = tile * tile_blocks
    end = tl.minimum(first + tile_blocks, pixel_blocks)
    return n, channel_block, tile, tiles, first, end


@triton.jit(do_not_specialize=_PLAIN)
def region_sums_forward_kernel(
    features_ptr, fg_ptr, bg_ptr, partial_ptr, layers_ptr,
    N, C, P, layer, channel_start, partial_start, tile_blocks,
    size_1, size_2, stride_n, stride_c, stride_0, stride_1, stride_2,
    DIMS: tl.constexpr, HAS_BG: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, channel_block, tile, tiles, first, end = _place(C, P, tile_blocks, WIDE, BLOCK_C, BLOCK_P)
    if tl.program_id(0) == 0:  # for the second pass, which is one launch for all layers
        layers_ptr += layer * 4
        tl.store(layers_ptr, C)
        tl.store(layers_ptr + 1, channel_start)
        tl.store(layers_ptr + 2, partial_start)
        tl.store(layers_ptr + 3, tiles)

    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    features_ptr += n * stride_n
    channel_offsets = channel.to(tl.int64) * stride_c
    fg_ptr += n * P
    if HAS_BG:
        bg_ptr += n * P

    sum_fg = tl.zeros([BLOCK_C, BLOCK_P], dtype)
    sum_bg = tl.zeros([BLOCK_C, BLOCK_P], dtype)
    mass_fg = tl.zeros([BLOCK_P], dtype)
    mass_bg = tl.zeros([BLOCK_P], dtype)
    for block in range(first, end):
        pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = pixel < P
        offsets = _pixel_offsets(pixel, size_1, size_2, stride_0, stride_1, stride_2, DIMS)
        F = tl.load(
            features_ptr + channel_offsets[:, None] + offsets[None, :],
            mask=(channel < C)[:, None] & inside[None, :],
            other=0,
        ).to(dtype)  # [BLOCK_C, BLOCK_P]
        fg, bg, valid = _weights(fg_ptr, bg_ptr, pixel, inside, dtype, HAS_BG)
        if HAS_BG:
            F = tl.where(valid[None, :], F, 0)
        sum_fg += F * fg[None, :]
        sum_bg += F * bg[None, :]
        mass_fg += fg
        mass_bg += bg

    # Partial sums of a layer: [tiles, 2, N, C + 1], the mass in the last column.
    fg_row = partial_ptr + partial_start + (tile.to(tl.int64) * 2 * N + n) * (C + 1)
    bg_row = fg_row + N.to(tl.int64) * (C + 1)
    tl.store(fg_row + channel, tl.sum(sum_fg, axis=1), mask=channel < C)
    tl.store(bg_row + channel, tl.sum(sum_bg, axis=1), mask=channel < C)
    tl.store(fg_row + C, tl.sum(mass_fg, axis=0), mask=channel_block == 0)
    tl.store(bg_row + C, tl.sum(mass_bg, axis=0), mask=channel_block == 0)


@triton.jit(do_not_specialize=["N", "L", "total_channels", "column_blocks"])
def region_sums_reduce_kernel(
    partial_ptr, layers_ptr, sums_ptr, masses_ptr, N, L, total_channels, column_blocks,
    BLOCK_T: tl.constexpr, BLOCK_COLUMN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = (program % column_blocks) * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
    row = ((program // column_blocks) % (2 * N)).to(tl.int64)  # region and sample
    layer = program // column_blocks // (2 * N)
    layers_ptr += layer * 4
    C, channel_start = tl.load(layers_ptr), tl.load(layers_ptr + 1)
    partial_ptr += tl.load(layers_ptr + 2) + row * (C + 1)
    tiles = tl.load(layers_ptr + 3)
    if (program % column_blocks) * BLOCK_COLUMN <= C:
        total = tl.zeros([BLOCK_T, BLOCK_COLUMN], tl.float64)
        for start in range(0, tiles, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)
            total += tl.load(
                partial_ptr + tile[:, None] * (2 * N * (C + 1)) + column[None, :],
                mask=(tile < tiles)[:, None] & (column <= C)[None, :],
                other=0,
            ).to(tl.float64)
        sums = tl.sum(total, axis=0).to(sums_ptr.dtype.element_ty)  # [BLOCK_COLUMN]
        tl.store(sums_ptr + row * total_channels + channel_start + column, sums, mask=column < C)
        mass_offsets = row * L + layer + tl.zeros([BLOCK_COLUMN], tl.int64)
        tl.store(masses_ptr + mass_offsets, sums, mask=column == C)


@triton.jit(do_not_specialize=_PLAIN)
def region_sums_backward_kernel(
    grad_features_ptr, upstream_ptr, fg_ptr, bg_ptr, grad_sums_ptr,
    N, C, P, channel_start, total_channels, tile_blocks,
    size_1, size_2, stride_n, stride_c, stride_0, stride_1, stride_2,
    upstream_stride_n, upstream_stride_c, upstream_stride_0, upstream_stride_1, upstream_stride_2,
    DIMS: tl.constexpr, HAS_BG: tl.constexpr, HAS_UPSTREAM: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, channel_block, _t, _tiles, first, end = _place(C, P, tile_blocks, WIDE, BLOCK_C, BLOCK_P)
    dtype: tl.constexpr = grad_sums_ptr.dtype.element_ty
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    grad_sums_ptr += n * total_channels + channel_start + channel
    g_fg = tl.load(grad_sums_ptr, mask=channel < C, other=0)
    g_bg = tl.load(grad_sums_ptr + N.to(tl.int64) * total_channels, mask=channel < C, other=0)
    grad_features_ptr += n * stride_n
    channel_offsets = channel.to(tl.int64) * stride_c
    fg_ptr += n * P
    if HAS_BG:
        bg_ptr += n * P
    if HAS_UPSTREAM:
        upstream_ptr += n * upstream_stride_n
        upstream_channel_offsets = channel.to(tl.int64) * upstream_stride_c

    for block in range(first, end):
        pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = pixel < P
        in_block = (channel < C)[:, None] & inside[None, :]
        fg, bg, valid = _weights(fg_ptr, bg_ptr, pixel, inside, dtype, HAS_BG)
        grad = g_fg[:, None] * fg[None, :] + g_bg[:, None] * bg[None, :]  # [BLOCK_C, BLOCK_P]
        if HAS_BG:
            grad = tl.where(valid[None, :], grad, 0)
        if HAS_UPSTREAM:
            upstream_offsets = _pixel_offsets(
                pixel, size_1, size_2, upstream_stride_0, upstream_stride_1, upstream_stride_2, DIMS
            )
            grad += tl.load(
                upstream_ptr + upstream_channel_offsets[:, None] + upstream_offsets[None, :],
                mask=in_block,
                other=0,
            ).to(dtype)
        if grad_features_ptr.dtype.element_ty == tl.bfloat16:
            grad = grad.to(tl.float32)  # the interpreter has no other way to bfloat16
        offsets = _pixel_offsets(pixel, size_1, size_2, stride_0, stride_1, stride_2, DIMS)
        grad_ptr = grad_features_ptr + channel_offsets[:, None] + offsets[None, :]
        tl.store(grad_ptr, grad.to(grad_features_ptr.dtype.element_ty), mask=in_block)


@triton.jit(do_not_specialize=_PLAIN)
def region_sums_mask_backward_kernel(
    grad_fg_ptr, grad_bg_ptr, features_ptr, fg_ptr, bg_ptr, grad_sums_ptr,
    N, C, P, channel_start, total_channels,
    size_1, size_2, stride_n, stride_c, stride_0, stride_1, stride_2,
    DIMS: tl.constexpr, HAS_BG: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    pixel_blocks = tl.cdiv(P, BLOCK_P)
    block = tl.program_id(0) % pixel_blocks
    n = (tl.program_id(0) // pixel_blocks).to(tl.int64)
    if WIDE:
        block = block.to(tl.int64)
    dtype: tl.constexpr = grad_sums_ptr.dtype.element_ty
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < P
    offsets = _pixel_offsets(pixel, size_1, size_2, stride_0, stride_1, stride_2, DIMS)
    features_ptr += n * stride_n
    fg_row = grad_sums_ptr + n * total_channels + channel_start
    bg_row = fg_row + N.to(tl.int64) * total_channels

    grad_fg = tl.zeros([BLOCK_C, BLOCK_P], dtype)
    grad_bg = tl.zeros([BLOCK_C, BLOCK_P], dtype)
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        F = tl.load(
            features_ptr + (channel.to(tl.int64) * stride_c)[:, None] + offsets[None, :],
            mask=(channel < C)[:, None] & inside[None, :],
            other=0,
        ).to(dtype)  # [BLOCK_C, BLOCK_P]
        g_fg = tl.load(fg_row + channel, mask=channel < C, other=0)
        g_bg = tl.load(bg_row + channel, mask=channel < C, other=0)
        if HAS_BG:
            grad_fg += g_fg[:, None] * F
            grad_bg += g_bg[:, None] * F
        else:
            grad_fg += (g_fg - g_bg)[:, None] * F

    total_fg = tl.sum(grad_fg, axis=0)  # [BLOCK_P]
    if HAS_BG:
        _fg, _bg, valid = _weights(fg_ptr + n * P, bg_ptr + n * P, pixel, inside, dtype, HAS_BG)
        total_fg = tl.where(valid, total_fg, 0)
        total_bg = tl.where(valid, tl.sum(grad_bg, axis=0), 0)
        tl.store(grad_bg_ptr + n * P + pixel, total_bg, mask=inside)
    tl.store(grad_fg_ptr + n * P + pixel, total_fg, mask=inside)


class _Plan(NamedTuple):
    """How the kernels cut a layer, and where they find its elements."""

    channel_blocks: int
    pixel_blocks: int
    tile_blocks: int  # blocks of pixels in a tile
    tiles: int
    places: list[int]  # size_1, size_2, then n, c and three spatial strides of each tensor
    constants: dict[str, Any]


def _plan(shape: Sequence[int], *strides: Sequence[int], has_bg: bool) -> _Plan:
    """The plan for tensors [N, C, *S] of one shape; accesses coalesce for the first strides."""
    C, P = shape[1], torch.Size(shape[2:]).numel()
    size, spatial = _merge_dimensions(shape, strides)
    missing = 3 - len(size)
    places = ([1] * missing + size)[1:]
    for stride, merged in zip(strides, spatial, strict=True):
        places += [*stride[:2], *[0] * missing, *merged]

    most_c, most_p = triton.next_power_of_2(max(C, 1)), triton.next_power_of_2(max(P, 1))
    if C > 1 and (not size or 0 < strides[0][1] < spatial[0][-1]):
        block_c = min(most_c, _ADJACENT_CHANNELS)
        block_p = min(most_p, _BLOCK // block_c)
    else:
        block_p = min(most_p, max(_ADJACENT_PIXELS, _BLOCK // 2 // most_c))
        block_c = min(most_c, _BLOCK // block_p)
    channel_blocks, pixel_blocks = max(triton.cdiv(C, block_c), 1), triton.cdiv(P, block_p)
    tile_blocks = min(channel_blocks * pixel_blocks // _PROGRAMS, _MAX_TILE_BLOCKS)
    tile_blocks = max(tile_blocks, triton.cdiv(_MIN_TILE_PIXELS, block_p))
    constants = {
        "DIMS": max(len(size), 1),
        "HAS_BG": has_bg,
        "WIDE": P > _WIDE_PIXELS,
        "BLOCK_C": block_c,
        "BLOCK_P": block_p,
        "num_warps": min(max(block_c * block_p // 256, 1), 8),
    }
    tiles = max(triton.cdiv(pixel_blocks, tile_blocks), 1)
    return _Plan(channel_blocks, pixel_blocks, tile_blocks, tiles, places, constants)


def _merge_dimensions(
    shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[list[int], list[list[int]]]:
    """The spatial sizes and strides in as few dimensions as the strides of all tensors allow."""
    size: list[int] = []
    spatial: list[list[int]] = [[] for _ in strides]
    for extent, *steps in zip(shape[2:], *(stride[2:] for stride in strides), strict=True):
        if extent == 1:
            continue
        merges = bool(size) and all(
            merged[-1] == extent * step for merged, step in zip(spatial, steps, strict=True)
        )
        size.append(extent * size.pop() if merges else extent)
        for merged, step in zip(spatial, steps, strict=True):
            if merges:
                merged.pop()
            merged.append(step)
    return size, spatial


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run the kernel on the device of its first argument; an empty batch has no programs."""
    if programs > 0:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, enable_fp_fusion=True, **constants)


def forward(features: Sequence[Tensor], fg: Sequence[Tensor], bg: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums [2, N, ΣC] and masses [2, N, L] by (R2)."""
    N, L = features[0].shape[0], len(features)
    channels = [layer.shape[1] for layer in features]
    plans = [_plan(layer.shape, layer.stride(), has_bg=bool(bg)) for layer in features]
    partials = [2 * N * plan.tiles * (C + 1) for plan, C in zip(plans, channels, strict=True)]
    sums = features[0].new_empty((2, N, sum(channels)), dtype=accumulate_dtype(features))
    masses = sums.new_empty((2, N, L))
    partial = sums.new_empty(sum(partials))
    layers = sums.new_empty((L, 4), dtype=torch.int64)
    for i, plan in enumerate(plans):
        _launch(region_sums_forward_kernel, N * plan.channel_blocks * plan.tiles,
            features[i], fg[i], bg[i] if bg else None, partial, layers,
            N, channels[i], fg[i].shape[1], i, sum(channels[:i]), sum(partials[:i]),
            plan.tile_blocks, *plan.places, **plan.constants,
        )  # fmt: skip
    column_blocks = triton.cdiv(max(channels) + 1, _REDUCE_COLUMNS)
    most_tiles = triton.next_power_of_2(max(plan.tiles for plan in plans))
    _launch(region_sums_reduce_kernel, column_blocks * 2 * N * L,
        partial, layers, sums, masses, N, L, sum(channels), column_blocks,
        BLOCK_T=min(most_tiles, _REDUCE_TILES), BLOCK_COLUMN=_REDUCE_COLUMNS,
    )  # fmt: skip
    return sums, masses


def backward(
    grad_sums: Tensor,
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    features: Sequence[Tensor],
    geometry: Sequence[Geometry],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The gradients (R3) for the layers of `geometry` and (R4) for the masks of `features`."""
    grad_sums = grad_sums.contiguous()  # [2, N, ΣC]
    N, total_channels = grad_sums.shape[1:]
    grad_features, grad_fg, grad_bg = [], [], []
    channel_start = 0
    for i, (shape, stride, dtype) in enumerate(geometry):
        grad_features.append(grad_sums.new_empty_strided(shape, stride, dtype=dtype))
        addend = upstream[i] if upstream else None
        plan = _plan(shape, stride, stride if addend is None else addend.stride(), has_bg=bool(bg))
        _launch(region_sums_backward_kernel, N * plan.channel_blocks * plan.tiles,
            grad_features[i], addend, fg[i], bg[i] if bg else None, grad_sums,
            N, shape[1], fg[i].shape[1], channel_start, total_channels, plan.tile_blocks,
            *plan.places, HAS_UPSTREAM=addend is not None, **plan.constants,
        )  # fmt: skip
        channel_start += shape[1]

    channel_start = 0
    for i, layer in enumerate(features):
        grad_fg.append(torch.empty_like(fg[i], dtype=grad_sums.dtype))  # [N, P]
        if bg:
            grad_bg.append(torch.empty_like(grad_fg[i]))
        plan = _plan(layer.shape, layer.stride(), has_bg=bool(bg))
        _launch(region_sums_mask_backward_kernel, N * plan.pixel_blocks,
            grad_fg[i], grad_bg[i] if bg else None, layer, fg[i], bg[i] if bg else None, grad_sums,
            N, layer.shape[1], fg[i].shape[1], channel_start, total_channels,
            *plan.places, **plan.constants,
        )  # fmt: skip
        channel_start += layer.shape[1]
    return grad_features, grad_fg, grad_bg
