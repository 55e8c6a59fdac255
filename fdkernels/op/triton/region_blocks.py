"""How the kernels of any number of regions cut layers, and load the weights of a region."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fdkernels.op.triton.access import load_weight, weight_offset, where_scalar
from fdkernels.op.triton.launch import WARPS, ceil_div, power_of_2

__all__ = ["RegionBlocks", "append", "load_region", "split_regions", "valid_pixels"]

# Registers of 32 bits of a thread for accumulators, and for pivots, which are loaded before the loop. Two
# programs on a multiprocessor leave 128 to a thread; loads in flight and addresses need as many.
_REGISTERS = 64
# Pixels of a block: so few (fewer than threads) that every warp loads its own part of the weights of each
# region; a load of more is shared through memory, with two barriers a region.
_PIXELS = 128
# Channels of a block where pixels are contiguous: 4096 elements, 16 a thread, for the 32 channels of most
# layers. Fewer where a layer has no more, but not so few that a thread has less than 16 bytes to load.
_CHANNELS_OF_PIXELS = (32, 8)
# The same where channels are contiguous; at 64 of them, 128 bytes or more of a pixel, pixels are halved.
_CHANNELS_OF_CHANNELS = (64, 8)
# Pixels of a block for a layer of fewer pixels, whose pixels are contiguous.
_FEW_PIXELS = 32
# A tile writes a partial sum for each row and channel: 3 % of the elements that it reads at most.
_TILE_PIXELS_OF_ROW = 32
_MIN_TILE_PIXELS = 256


def split_regions(R: int, most: int) -> tuple[int, int]:
    """Into how many parts of at most so many R regions are split, and the regions of each but the last."""
    parts = max(ceil_div(R, most), 1)
    return parts, ceil_div(R, parts)


class RegionBlocks(NamedTuple):
    """The `BlockRule` of kernels that hold accumulators for each region.

    A block has four numbers: channels, pixels, alignment and `fold`, the pixels that one thread loads of a
    channel. They are added before they are accumulated, so that an accumulator has one element for them all:
    4 registers a thread for a row of sums over most blocks.
    """

    regions: int  # for which a program holds accumulators
    has_moments: bool
    itemsize: int  # of an accumulator in bytes

    @property
    def tile_pixels(self) -> int:
        """The pixels that a tile has at least."""
        return max(_MIN_TILE_PIXELS, _TILE_PIXELS_OF_ROW * self.regions * (2 if self.has_moments else 1))

    def block(self, C: int, P: int, unit: str, itemsize: int, alignment: int) -> tuple[int, ...]:
        """Channels, pixels, alignment and fold for a layer; where registers run out, a thread gets less."""
        of_channels = unit == "channels"
        least, most = sorted(_CHANNELS_OF_CHANNELS if of_channels else _CHANNELS_OF_PIXELS)
        channels, pixels = min(max(power_of_2(C), least), most), _PIXELS
        if of_channels and channels == most:
            pixels //= 2
        elif not of_channels and P <= _FEW_PIXELS:
            channels, pixels = 4 * channels, _FEW_PIXELS
        alignment = min(alignment, 16 // itemsize)
        of_region = (3 if self.has_moments else 1) * self.itemsize // 4  # registers for an element
        while True:
            elements = max(channels * pixels // (32 * WARPS), 1)  # of a thread
            fold = min(alignment, elements)
            if of_channels:
                fold = elements // fold
            held = elements // fold
            if self.regions * held * of_region <= _REGISTERS or held == 1:
                return channels, pixels, alignment, fold
            if of_channels and alignment > 1:
                alignment //= 2
            else:
                channels //= 2


@triton.jit
def append(values, value):
    """A tuple and one value more."""
    return values + (value,)  # noqa: RUF005, kernels know no unpacking


@triton.jit
def load_region(
    address, n, k, P, pixel, inside, is_byte, DTYPE: tl.constexpr,
    MASK: tl.constexpr, BYTES: tl.constexpr, ALIGN: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Load the weight of region k, [BLOCK_P], 0 outside the layer and from region R on."""
    row_bytes = weight_offset(n * R + k, P, is_byte, MASK, BYTES)
    if PARTS > 1:
        inside = where_scalar(inside, k < R)
    return load_weight(address + row_bytes, pixel, inside, is_byte, DTYPE, MASK, BYTES, ALIGN)


@triton.jit
def valid_pixels(
    address, n, P, pixel, inside, is_byte, DTYPE: tl.constexpr,
    MASK: tl.constexpr, BYTES: tl.constexpr, ALIGN: tl.constexpr,
    R: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Whether any region has a weight other than 0, [BLOCK_P]."""
    valid = pixel < 0
    for part in range(PARTS):
        for j in tl.static_range(PART):
            w = load_region(
                address, n, part * PART + j, P, pixel, inside, is_byte, DTYPE, MASK, BYTES, ALIGN, R, PARTS
            )
            valid = valid | (w != 0)
    return valid
