"""Backward on backend `triton`: the gradients of features (R3) and of weights (R4), one launch each.

Each element is written once. An element of the gradient is written where the upstream gradient is read; a
mask is read once for the channels of a block, mostly from the cache.
"""

from __future__ import annotations

import itertools
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
    where_scalar,
)
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

__all__ = ["gradient", "in_dtype_of", "mask_gradient", "starts_of"]

# Channels and pixels of a block of the gradient of masks.
_MASK_BLOCK = (32, 128)


@triton.jit
def _write_tile(
    grad_sums_ptr, scale, program, N, total_channels, features, upstream, fg, bg, C, P, tile_blocks,
    is_byte, strides,
    DTYPE: tl.constexpr, MASK: tl.constexpr, BYTES: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr,
    WIDE: tl.constexpr, HAS_BG: tl.constexpr, UPSTREAM: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile and BLOCK_C channels."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    dtype: tl.constexpr = grad_sums_ptr.dtype.element_ty
    ALIGN_ROW: tl.constexpr = 1 if UNIT == "channels" else ALIGN  # of the weights of a sample
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
    grad_ptr = as_pointer(features, DTYPE, ALIGN) + n * stride_n
    row_bytes = weight_offset(n, P, is_byte, MASK, BYTES)
    if UPSTREAM is not None:
        u_n, u_c, u_p, u_0, u_1 = strides_of(strides, 3 if DIMS == 1 else 5, index, UPSTREAM, DIMS, ALIGN)
        upstream_ptr = as_pointer(upstream, DTYPE, ALIGN) + n * u_n
        upstream_channel_offsets = channel.to(index) * u_c
        has_upstream = upstream != 0

    grad_sums_ptr += n * total_channels + channel
    g_fg = scale * tl.load(grad_sums_ptr, mask=channel < C, other=0)
    g_bg = scale * tl.load(grad_sums_ptr + N.to(tl.int64) * total_channels, mask=channel < C, other=0)
    for block in range(first, end):
        pixel = block * BLOCK_P + tl.arange(0, BLOCK_P).to(index)
        inside = pixel < P
        in_block = (channel < C)[:, None] & inside[None, :]
        w_fg, w_bg, valid = load_weights(
            fg + row_bytes, bg + row_bytes, pixel, inside, is_byte, dtype, MASK, BYTES, ALIGN_ROW, HAS_BG
        )
        grad = g_fg[:, None] * w_fg[None, :] + g_bg[:, None] * w_bg[None, :]  # [BLOCK_C, BLOCK_P]
        if HAS_BG:
            grad = tl.where(valid[None, :], grad, 0)
        if UPSTREAM is not None:
            offsets = pixel_offsets(pixel, size_1, size_2, u_0, u_1, u_p, DIMS)
            grad += tl.load(
                upstream_ptr + (upstream_channel_offsets[:, None] + offsets[None, :]),
                mask=where_scalar(in_block, has_upstream),
                other=0,
            ).to(dtype)
        if tl.bfloat16 == DTYPE:
            grad = grad.to(tl.float32)  # the interpreter has no other way to bfloat16
        offsets = pixel_offsets(pixel, size_1, size_2, stride_0, stride_1, stride_p, DIMS)
        tl.store(grad_ptr + (channel_offsets[:, None] + offsets[None, :]), grad.to(DTYPE), mask=in_block)


@triton.jit(do_not_specialize=["N", "total_channels", "factor_stride"])
def gradient_kernel(
    grad_sums_ptr, factor_ptr, N, total_channels, factor_stride, starts, tables, columns, strides,
    DTYPE: tl.constexpr, MASK: tl.constexpr, BYTES: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr,
    WIDE: tl.constexpr, HAS_BG: tl.constexpr, BLOCK_SHAPES: tl.constexpr, UPSTREAM: tl.constexpr,
):  # fmt: skip
    """The gradient (R3) of all layers; a program writes a tile of one."""
    program = tl.program_id(0)
    layer = layer_of(starts, program)
    start, index, channel_start, features, upstream, fg, bg = entry_of_layer(tables, layer)
    C, P, tile_blocks, block_shape, is_byte = entry_of_layer(columns, layer)
    places = entry_of_layer(strides, layer)
    scale = tl.full((), 1, grad_sums_ptr.dtype.element_ty)
    if factor_ptr is not None:
        scale = tl.load(factor_ptr + index * factor_stride)
    for i in tl.static_range(len(BLOCK_SHAPES)):
        if block_shape == i:
            _write_tile(
                grad_sums_ptr + channel_start, scale, program - start.to(tl.int32), N, total_channels,
                features, upstream, fg, bg, C, P, tile_blocks, is_byte != 0, places,
                DTYPE, MASK, BYTES, UNIT, DIMS, WIDE, HAS_BG, UPSTREAM,
                BLOCK_SHAPES[i][0], BLOCK_SHAPES[i][1], BLOCK_SHAPES[i][2],
            )  # fmt: skip


@triton.jit(do_not_specialize=["N", "total_channels"])
def mask_gradient_kernel(
    grad_sums_ptr, N, total_channels, starts, tables, columns, strides,
    DTYPE: tl.constexpr, MASK: tl.constexpr, BYTES: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr,
    WIDE: tl.constexpr, HAS_BG: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The gradients (R4) of the weights of all layers; a program writes a run of pixels."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    dtype: tl.constexpr = grad_sums_ptr.dtype.element_ty
    program = tl.program_id(0)
    layer = layer_of(starts, program)
    start, channel_start, grad_fg, grad_bg, features, fg, bg = entry_of_layer(tables, layer)
    C, P, _tile_blocks, _kind, is_byte = entry_of_layer(columns, layer)
    strides = entry_of_layer(strides, layer)
    program -= start.to(tl.int32)
    C = C.to(tl.int32)
    P = P.to(index)
    stride_n, stride_c, stride_p, stride_0, stride_1 = strides_of(strides, 0, index, UNIT, DIMS, ALIGN)
    size_1, size_2 = sizes_of(strides, index, DIMS, ALIGN)
    pixel_blocks = tl.cdiv(P, BLOCK_P)
    n = (program // pixel_blocks).to(tl.int64)
    pixel = (program % pixel_blocks).to(index) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < P
    offsets = pixel_offsets(pixel, size_1, size_2, stride_0, stride_1, stride_p, DIMS)
    features_ptr = as_pointer(features, DTYPE, ALIGN) + n * stride_n
    fg_row = grad_sums_ptr + n * total_channels + channel_start
    bg_row = fg_row + N.to(tl.int64) * total_channels

    total_fg = tl.zeros([BLOCK_C, BLOCK_P], dtype)
    total_bg = tl.zeros([BLOCK_C, BLOCK_P], dtype)
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        F = tl.load(
            features_ptr + ((channel.to(index) * stride_c)[:, None] + offsets[None, :]),
            mask=(channel < C)[:, None] & inside[None, :],
            other=0,
        ).to(dtype)  # [BLOCK_C, BLOCK_P]
        g_fg = tl.load(fg_row + channel, mask=channel < C, other=0)
        g_bg = tl.load(bg_row + channel, mask=channel < C, other=0)
        if HAS_BG:
            total_fg += g_fg[:, None] * F
            total_bg += g_bg[:, None] * F
        else:
            total_fg += (g_fg - g_bg)[:, None] * F

    pixel_fg = tl.sum(total_fg, axis=0)  # [BLOCK_P]
    if HAS_BG:
        byte = is_byte != 0
        row_bytes = weight_offset(n, P, byte, MASK, BYTES)
        _fg, _bg, valid = load_weights(
            fg + row_bytes, bg + row_bytes,
            pixel, inside, byte, dtype, MASK, BYTES, 1, HAS_BG,
        )  # fmt: skip
        pixel_fg = tl.where(valid, pixel_fg, 0)
        pixel_bg = tl.where(valid, tl.sum(total_bg, axis=0), 0)
        tl.store(as_pointer(grad_bg, dtype, 1) + n * P + pixel, pixel_bg, mask=inside)
    tl.store(as_pointer(grad_fg, dtype, 1) + n * P + pixel, pixel_fg, mask=inside)


def gradient(
    grad_sums: Tensor,
    factor: Tensor | None,
    weights: Weights,
    upstream: Sequence[Tensor | None],
    pyramid: Pyramid,
) -> list[Tensor]:
    """Write the gradient (R3) of each layer, for g = grad_sums [2, N, ΣC] times factor [L], plus upstream."""
    grad_sums = grad_sums.contiguous()
    grads = [
        grad_sums.new_empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in pyramid.layers
    ]
    added = in_dtype_of(grads, upstream) if any(grad is not None for grad in upstream) else []
    towards = [grad if addend is None else addend for grad, addend in zip(grads, added, strict=False)]
    maps = (grads, towards) if added else (grads,)
    _, groups = plan_layers(access_of_layers(weights, *maps), grad_sums.dtype)
    channel_starts = starts_of(pyramid.channels)
    stride = 0 if factor is None else factor.stride(0)
    for group in groups:
        layers = group.layers
        launch(gradient_kernel, group.programs,
            grad_sums, factor, grad_sums.shape[1], grad_sums.shape[2], stride, group.starts,
            (group.starts, per_layer_table(layers), per_layer_table(channel_starts[i] for i in layers),
                *addresses(layers, grads, added, weights.fg, weights.bg)),
            group.columns, group.strides,
            HAS_BG=bool(weights.bg), BLOCK_SHAPES=group.block_shapes,
            UPSTREAM=group.units[1] if added else None, **group.constants,
        )  # fmt: skip
    return grads


def mask_gradient(grad_sums: Tensor, weights: Weights, features: Sequence[Tensor]) -> Weights:
    """Write the gradients (R4) of the weights [N, P], in the dtype of grad_sums [2, N, ΣC]."""
    grad_sums = grad_sums.contiguous()
    grad_fg = [torch.empty_like(weight, dtype=grad_sums.dtype) for weight in weights.fg]  # [N, P]
    grad_bg = [torch.empty_like(grad) for grad in grad_fg[: len(weights.bg)]]
    plans, groups = plan_layers(access_of_layers(weights, features), grad_sums.dtype)
    channel_starts = starts_of([plan.shape[1] for plan in plans])
    for group in groups:
        layers = group.layers
        starts = starts_of([plans[i].shape[0] * ceil_div(plans[i].shape[2], _MASK_BLOCK[1]) for i in layers])
        launch(mask_gradient_kernel, starts.pop(),
            grad_sums, grad_sums.shape[1], grad_sums.shape[2], per_layer_table(starts),
            (per_layer_table(starts), per_layer_table(channel_starts[i] for i in layers),
                *addresses(layers, grad_fg, grad_bg, features, weights.fg, weights.bg)),
            group.columns, group.strides, ALIGN=min(shape[2] for shape in group.block_shapes),
            HAS_BG=bool(weights.bg), BLOCK_C=_MASK_BLOCK[0], BLOCK_P=_MASK_BLOCK[1], **group.constants,
        )  # fmt: skip
    return Weights(grad_fg, grad_bg)


def in_dtype_of(grads: Sequence[Tensor], upstream: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Upstream gradients [N, C_l, *S_l] in the dtypes of the gradients that they are added to."""
    return [
        addend if addend is None else addend.to(grad.dtype)
        for grad, addend in zip(grads, upstream, strict=True)
    ]


def starts_of(sizes: Sequence[int]) -> list[int]:
    """The start of each of some parts laid end to end, and the end of the last one."""
    return list(itertools.accumulate(sizes, initial=0))
