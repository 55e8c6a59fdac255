"""Offsets of the elements and weights of a layer, for the kernels of backend `triton`."""

from __future__ import annotations

import triton
import triton.language as tl

from fdkernels.op.triton.launch import as_pointer

__all__ = [
    "load_weight",
    "load_weights",
    "pixel_offsets",
    "sizes_of",
    "strides_of",
    "tile_of",
    "weight_offset",
    "where_scalar",
]


@triton.jit
def pixel_offsets(pixel, size_1, size_2, stride_0, stride_1, stride_p, DIMS: tl.constexpr):
    """The offsets of pixels within a channel, in elements."""
    if DIMS == 1:
        return pixel * stride_p
    offsets = (pixel % size_2) * stride_p
    row = pixel // size_2
    if DIMS == 2:
        return offsets + row * stride_1
    return offsets + (row % size_1) * stride_1 + (row // size_1) * stride_0


@triton.jit
def strides_of(
    strides, FIRST: tl.constexpr, index: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Strides of sample, channel, pixel and the two outer dimensions; the unit stride is a constant."""
    stride_n = strides[FIRST] // ALIGN * ALIGN
    stride_c = 1 if UNIT == "channels" else (strides[FIRST + 1] // ALIGN * ALIGN).to(index)
    stride_p = 1 if UNIT == "pixels" else (strides[FIRST + 2] // ALIGN * ALIGN).to(index)
    stride_0 = 0
    stride_1 = 0
    if DIMS > 1:
        stride_0 = (strides[FIRST + 3] // ALIGN * ALIGN).to(index)
        stride_1 = (strides[FIRST + 4] // ALIGN * ALIGN).to(index)
    return stride_n, stride_c, stride_p, stride_0, stride_1


@triton.jit
def sizes_of(strides, index: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr):
    """The middle and the last spatial size, which follow the strides where there is more than one."""
    size_1 = 1
    size_2 = 1
    if DIMS > 1:
        size_1 = strides[len(strides) - 2].to(index)
        size_2 = (strides[len(strides) - 1] // ALIGN * ALIGN).to(index)
    return size_1, size_2


@triton.jit
def where_scalar(mask, condition):
    """The mask of a block where a scalar condition holds, else False."""
    return (mask & condition) != 0  # the interpreter has integers on the left


@triton.jit
def weight_offset(n, P, is_byte, MASK: tl.constexpr, BYTES: tl.constexpr):
    """The offset of the weights of sample n, in bytes."""
    SIZE: tl.constexpr = 1 if BYTES == "all" else MASK.primitive_bitwidth // 8
    offset = n * P * SIZE
    return tl.where(is_byte, n * P, offset) if BYTES == "some" else offset


@triton.jit
def _of_bytes(stored, DTYPE: tl.constexpr):
    """Weights stored as bytes: 0, 1, or any other for NaN."""
    return tl.where(stored > 1, float("nan"), stored.to(DTYPE))


@triton.jit
def load_weight(
    address, pixel, inside, is_byte, DTYPE: tl.constexpr,
    MASK: tl.constexpr, BYTES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Load a weight [BLOCK_P] from uint8 or a wider dtype; where both occur, one of two loads is masked."""
    if BYTES == "all":
        weight = _of_bytes(tl.load(as_pointer(address, tl.uint8, ALIGN) + pixel, mask=inside, other=0), DTYPE)
    elif BYTES == "none":
        weight = tl.load(as_pointer(address, MASK, ALIGN) + pixel, mask=inside, other=0).to(DTYPE)
    else:
        of_bytes, of_others = where_scalar(inside, is_byte), where_scalar(inside, not is_byte)
        narrow = tl.load(as_pointer(address, tl.uint8, ALIGN) + pixel, mask=of_bytes, other=0)
        wide = tl.load(as_pointer(address, MASK, ALIGN) + pixel, mask=of_others, other=0)
        weight = tl.where(is_byte, _of_bytes(narrow, DTYPE), wide.to(DTYPE))
    return weight


@triton.jit
def load_weights(
    fg, bg, pixel, inside, is_byte, DTYPE: tl.constexpr,
    MASK: tl.constexpr, BYTES: tl.constexpr, ALIGN: tl.constexpr, HAS_BG: tl.constexpr,
):  # fmt: skip
    """Load w_fg, w_bg and v > 0, each [BLOCK_P], 0 outside the layer."""
    w_fg = load_weight(fg, pixel, inside, is_byte, DTYPE, MASK, BYTES, ALIGN)
    if HAS_BG:
        w_bg = load_weight(bg, pixel, inside, is_byte, DTYPE, MASK, BYTES, ALIGN)
        valid = (w_fg != 0) | (w_bg != 0)
    else:
        w_bg = tl.where(inside, 1 - w_fg, 0)
        valid = inside
    return w_fg, w_bg, valid


@triton.jit
def tile_of(program, C, P, tile_blocks, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """The sample, block of channels and tile of a program, and the tile's first and end block of pixels."""
    channel_blocks = tl.maximum(tl.cdiv(C, BLOCK_C), 1)
    pixel_blocks = tl.cdiv(P, BLOCK_P)
    tiles = tl.maximum(tl.cdiv(pixel_blocks, tile_blocks), 1)
    channel_block = program % channel_blocks  # fastest: neighbours share the mask in cache
    tile = ((program // channel_blocks) % tiles).to(P.dtype)
    n = (program // channel_blocks // tiles).to(tl.int64)
    first = tile * tile_blocks
    return n, channel_block, tile, first, tl.minimum(first + tile_blocks, pixel_blocks)
