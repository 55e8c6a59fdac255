"""Backend `triton` of region_sums: masked sums (R2) and their gradients (R3), (R4), tile by tile.

All layers that lie alike share a launch (`triton_layers`). Forward writes the partial sums of every tile and
a second pass adds them in the order of the tiles; both backward kernels write every element once. So the same
input gives the same bits. An element of the features moves once forward and once backward; a mask is read
once for the 32 channels (64 where channels are contiguous) of a block, mostly from the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdkernels.region_sums.geometry import Geometry, accumulate_dtype
from fdkernels.region_sums.impl.triton_access import (
    load_weights,
    pixel_offsets,
    place,
    sizes_of,
    strides_of,
    weight_offset,
)
from fdkernels.region_sums.impl.triton_layers import (
    Layer,
    as_pointer,
    ceil_div,
    describe,
    launch,
    layer_of,
    pick,
    plan_layers,
    power_of_2,
    table,
)
from fdkernels.region_sums.impl.triton_partials import (
    Partials,
    plan_second_pass,
    region_sums_reduce_kernel,
)

__all__ = ["backward", "forward", "sum_tiles", "write_gradients"]

# Channels and pixels of a block of the gradient of masks.
_MASK_BLOCK = (32, 128)


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
    n, channel_block, tile, first, end = place(program, C, P, tile_blocks, BLOCK_C, BLOCK_P)
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
def region_sums_forward_kernel(
    partial_ptr, counters_ptr, N, counters, starts, tables, columns, strides,
    DTYPE: tl.constexpr, MASK: tl.constexpr, BYTES: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr,
    WIDE: tl.constexpr, HAS_BG: tl.constexpr, KINDS: tl.constexpr, BLOCK_COUNTER: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program == 0:  # for layer_losses, which counts there the samples whose sums are finished
        counter = tl.arange(0, BLOCK_COUNTER)
        tl.store(counters_ptr + counter, tl.zeros_like(counter), mask=counter < counters)
    layer = layer_of(starts, program)
    start, partial_start, features, fg, bg = pick(tables, layer)
    C, P, tile_blocks, kind, is_byte = pick(columns, layer)
    places = pick(strides, layer)
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            _sum_tile(
                partial_ptr + partial_start, program - start.to(tl.int32), N,
                features, fg, bg, C, P, tile_blocks, is_byte != 0, places,
                DTYPE, MASK, BYTES, UNIT, DIMS, WIDE, HAS_BG, KINDS[i][0], KINDS[i][1], KINDS[i][2],
            )  # fmt: skip


@triton.jit
def _write_tile(
    slopes_ptr, scale, program, N, total_channels, features, upstream, fg, bg, C, P, tile_blocks,
    is_byte, strides,
    DTYPE: tl.constexpr, MASK: tl.constexpr, BYTES: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr,
    WIDE: tl.constexpr, HAS_BG: tl.constexpr, UPSTREAM: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile and BLOCK_C channels."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    dtype: tl.constexpr = slopes_ptr.dtype.element_ty
    ALIGN_ROW: tl.constexpr = 1 if UNIT == "channels" else ALIGN  # of the weights of a sample
    if UNIT == "channels":
        C = C // ALIGN * ALIGN
    else:
        P = P // ALIGN * ALIGN
    C = C.to(tl.int32)
    P = P.to(index)
    n, channel_block, _tile, first, end = place(program, C, P, tile_blocks.to(tl.int32), BLOCK_C, BLOCK_P)
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

    slopes_ptr += n * total_channels + channel
    g_fg = scale * tl.load(slopes_ptr, mask=channel < C, other=0)
    g_bg = scale * tl.load(slopes_ptr + N.to(tl.int64) * total_channels, mask=channel < C, other=0)
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
                mask=in_block & has_upstream,
                other=0,
            ).to(dtype)
        if tl.bfloat16 == DTYPE:
            grad = grad.to(tl.float32)  # the interpreter has no other way to bfloat16
        offsets = pixel_offsets(pixel, size_1, size_2, stride_0, stride_1, stride_p, DIMS)
        tl.store(grad_ptr + (channel_offsets[:, None] + offsets[None, :]), grad.to(DTYPE), mask=in_block)


@triton.jit(do_not_specialize=["N", "total_channels", "grad_stride"])
def region_sums_backward_kernel(
    slopes_ptr, grad_loss_ptr, N, total_channels, grad_stride, starts, tables, columns, strides,
    DTYPE: tl.constexpr, MASK: tl.constexpr, BYTES: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr,
    WIDE: tl.constexpr, HAS_BG: tl.constexpr, KINDS: tl.constexpr, UPSTREAM: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    layer = layer_of(starts, program)
    start, index, channel_start, features, upstream, fg, bg = pick(tables, layer)
    C, P, tile_blocks, kind, is_byte = pick(columns, layer)
    places = pick(strides, layer)
    scale = tl.full((), 1, slopes_ptr.dtype.element_ty)
    if grad_loss_ptr is not None:
        scale = tl.load(grad_loss_ptr + index * grad_stride)
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            _write_tile(
                slopes_ptr + channel_start, scale, program - start.to(tl.int32), N, total_channels,
                features, upstream, fg, bg, C, P, tile_blocks, is_byte != 0, places,
                DTYPE, MASK, BYTES, UNIT, DIMS, WIDE, HAS_BG, UPSTREAM, KINDS[i][0], KINDS[i][1], KINDS[i][2],
            )  # fmt: skip


@triton.jit(do_not_specialize=["N", "total_channels"])
def region_sums_mask_backward_kernel(
    grad_sums_ptr, N, total_channels, starts, tables, columns, strides,
    DTYPE: tl.constexpr, MASK: tl.constexpr, BYTES: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr,
    WIDE: tl.constexpr, HAS_BG: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    dtype: tl.constexpr = grad_sums_ptr.dtype.element_ty
    program = tl.program_id(0)
    layer = layer_of(starts, program)
    start, channel_start, grad_fg, grad_bg, features, fg, bg = pick(tables, layer)
    C, P, _tile_blocks, _kind, is_byte = pick(columns, layer)
    strides = pick(strides, layer)
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


def sum_tiles(features: Sequence[Tensor], fg: Sequence[Tensor], bg: Sequence[Tensor]) -> Partials:
    """The first pass of (R2): one launch for all layers that lie alike."""
    dtype = accumulate_dtype(features)
    N, L = features[0].shape[0], len(features)
    plans, groups = plan_layers(_describe(fg, bg, features), dtype, bool(bg))
    second_pass = plan_second_pass(
        tuple(plan.shape[1] for plan in plans), tuple(plan.tiles for plan in plans), N
    )
    sums = features[0].new_empty((2, N, second_pass.total_channels), dtype=dtype)
    masses = sums.new_empty((2, N, L))
    partial = sums.new_empty(second_pass.size)
    counters = sums.new_empty(L, dtype=torch.int32)
    for group in groups:
        layers = group.layers
        partial_starts = table(second_pass.starts[i] for i in layers)
        launch(region_sums_forward_kernel, group.programs,
            partial, counters, N, L, group.starts,
            (group.starts, partial_starts, *_addresses(layers, features, fg, bg)),
            group.columns, group.strides,
            KINDS=group.kinds, BLOCK_COUNTER=power_of_2(L), **group.constants,
        )  # fmt: skip
    return Partials(partial, counters, sums, masses, second_pass)


def forward(features: Sequence[Tensor], fg: Sequence[Tensor], bg: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums [2, N, ΣC] and masses [2, N, L] by (R2): a launch for the tiles and one for the second pass."""
    partial, _, sums, masses, second_pass = sum_tiles(features, fg, bg)
    _, N, L = masses.shape
    for layers, tables, blocks in second_pass.launches:
        launch(region_sums_reduce_kernel, len(layers) * 2 * N,
            partial, sums, masses, N, L, layers[0], sums.shape[2], tables, BLOCKS=blocks, num_warps=8,
        )  # fmt: skip
    return sums, masses


def write_gradients(
    slopes: Tensor,
    grad_loss: Tensor | None,
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    geometry: Sequence[Geometry],
) -> list[Tensor]:
    """The gradients (R3) for g = slopes [2, N, ΣC], times grad_loss [L] where given, in one launch."""
    slopes = slopes.contiguous()
    grads = [slopes.new_empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in geometry]
    added = _in_dtype_of(grads, upstream) if any(grad is not None for grad in upstream) else []
    towards = [grad if addend is None else addend for grad, addend in zip(grads, added, strict=False)]
    maps = (grads, towards) if added else (grads,)
    plans, groups = plan_layers(_describe(fg, bg, *maps), slopes.dtype, bool(bg))
    channel_starts = _starts([plan.shape[1] for plan in plans])
    stride = 0 if grad_loss is None else grad_loss.stride(0)
    for group in groups:
        layers = group.layers
        launch(region_sums_backward_kernel, group.programs,
            slopes, grad_loss, slopes.shape[1], slopes.shape[2], stride, group.starts,
            (group.starts, table(layers), table(channel_starts[i] for i in layers),
                *_addresses(layers, grads, added, fg, bg)),
            group.columns, group.strides,
            KINDS=group.kinds, UPSTREAM=group.units[1] if added else None, **group.constants,
        )  # fmt: skip
    return grads


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
    grad_features = write_gradients(grad_sums, None, fg, bg, upstream, geometry)
    grad_fg = [torch.empty_like(fg[i], dtype=grad_sums.dtype) for i in range(len(features))]  # [N, P]
    grad_bg = [torch.empty_like(grad) for grad in grad_fg[: len(bg)]]
    plans, groups = plan_layers(_describe(fg, bg, features), grad_sums.dtype, bool(bg))
    channel_starts = _starts([plan.shape[1] for plan in plans])
    for group in groups:
        layers = group.layers
        starts = _starts([plans[i].shape[0] * ceil_div(plans[i].shape[2], _MASK_BLOCK[1]) for i in layers])
        launch(region_sums_mask_backward_kernel, starts.pop(),
            grad_sums, grad_sums.shape[1], grad_sums.shape[2], table(starts),
            (table(starts), table(channel_starts[i] for i in layers),
                *_addresses(layers, grad_fg, grad_bg, features, fg, bg)),
            group.columns, group.strides, ALIGN=min(kind[2] for kind in group.kinds),
            BLOCK_C=_MASK_BLOCK[0], BLOCK_P=_MASK_BLOCK[1], **group.constants,
        )  # fmt: skip
    return grad_features, grad_fg, grad_bg


def _in_dtype_of(grads: Sequence[Tensor], upstream: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [
        addend if addend is None else addend.to(grad.dtype)
        for grad, addend in zip(grads, upstream, strict=True)
    ]


def _describe(fg: Sequence[Tensor], bg: Sequence[Tensor], *maps: Sequence[Tensor]) -> tuple[Layer, ...]:
    """Each layer by the maps and weights that the kernels touch."""
    weights = zip(fg, bg, strict=True) if bg else zip(fg, strict=True)
    return tuple(describe(tensors, of_layer) for *tensors, of_layer in zip(*maps, weights, strict=False))


def _addresses(layers: Sequence[int], *columns: Sequence[Tensor | None]) -> list[tuple[int, ...]]:
    """A table of addresses for each column; 0 where a layer has no such tensor."""
    chosen = [[column[i] if column else None for i in layers] for column in columns]
    return [table(0 if tensor is None else tensor.data_ptr() for tensor in column) for column in chosen]


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each of some parts begins that lie one after the other, and where the last one ends."""
    return list(itertools.accumulate(sizes, initial=0))
