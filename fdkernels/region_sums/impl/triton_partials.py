"""The second pass of region_sums on backend `triton`: partial sums in float64, in the order of the tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fdkernels.region_sums.impl.triton_layers import pick, table

__all__ = ["Partials", "add_partials", "region_sums_reduce_kernel"]

# Partial sums that the second pass takes at once: so many tiles, and at most so many in all.
_REDUCE_TILES = (8, 32, 128)
_REDUCE_BLOCK = 8192


@triton.jit
def add_partials(
    partial_ptr, sums_ptr, masses_ptr, row, N, L, total_channels, C, tiles,
    BLOCK_T: tl.constexpr, BLOCK_COLUMN: tl.constexpr,
):  # fmt: skip
    """The second pass for one region and sample (a row) of one layer, in float64 and the order of tiles.

    The pointers are those of the layer: its partial sums, its first channel, its column of masses.
    """
    step = 2 * N.to(tl.int64) * (C + 1)
    row_ptr = partial_ptr + row * (C + 1)
    for start in range(0, C, BLOCK_COLUMN):
        column = start + tl.arange(0, BLOCK_COLUMN)
        total = tl.zeros([BLOCK_T, BLOCK_COLUMN], tl.float64)
        for first in range(0, tiles, BLOCK_T):
            tile = first + tl.arange(0, BLOCK_T)
            total += tl.load(
                row_ptr + (tile.to(tl.int64) * step)[:, None] + column[None, :],
                mask=(tile < tiles)[:, None] & (column < C)[None, :],
                other=0,
            ).to(tl.float64)
        sums = tl.sum(total, axis=0).to(sums_ptr.dtype.element_ty)
        tl.store(sums_ptr + row * total_channels + column, sums, mask=column < C)
    mass = tl.zeros([BLOCK_T], tl.float64)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        mass_ptr = row_ptr + tile.to(tl.int64) * step + C
        mass += tl.load(mass_ptr, mask=tile < tiles, other=0).to(tl.float64)
    tl.store(masses_ptr + row * L, tl.sum(mass, axis=0).to(masses_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["N", "L", "first_layer", "total_channels"])
def region_sums_reduce_kernel(
    partial_ptr, sums_ptr, masses_ptr, N, L, first_layer, total_channels, tables, BLOCKS: tl.constexpr
):
    layers: tl.constexpr = len(tables[0])
    layer = tl.program_id(0) % layers
    row = (tl.program_id(0) // layers).to(tl.int64)  # region and sample
    C, tiles, partial_start, channel_start, kind = pick(tables, layer)
    for i in tl.static_range(len(BLOCKS)):
        if kind == i:
            add_partials(
                partial_ptr + partial_start, sums_ptr + channel_start, masses_ptr + first_layer + layer,
                row, N, L, total_channels, C.to(tl.int32), tiles.to(tl.int32), BLOCKS[i][0], BLOCKS[i][1],
            )  # fmt: skip


class Partials(NamedTuple):
    """The partial sums of all tiles, and what the second pass needs to find those of a layer."""

    partial: Tensor  # for each layer [tiles, 2, N, C + 1], the mass in the last column
    counters: Tensor  # [L] int32, zero
    sums: Tensor  # [2, N, ΣC], to be written
    masses: Tensor  # [2, N, L], to be written
    channels: list[int]
    tiles: list[int]
    partial_starts: list[int]
    channel_starts: list[int]

    def second_pass(
        self, layers: Sequence[int]
    ) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, int], ...]]:
        """Tables of channels, tiles, starts and kinds of some layers, and the blocks that are the kinds."""
        blocks = [_reduce_block(self.tiles[i], self.channels[i]) for i in layers]
        kinds = sorted(set(blocks))
        columns = (self.channels, self.tiles, self.partial_starts, self.channel_starts)
        tables = [table(column[i] for i in layers) for column in columns]
        return (*tables, table(kinds.index(block) for block in blocks)), tuple(kinds)


def _reduce_block(tiles: int, channels: int) -> tuple[int, int]:
    of_tiles = next(most for most in _REDUCE_TILES if tiles <= most or most == _REDUCE_TILES[-1])
    return of_tiles, min(triton.next_power_of_2(max(channels, 1)), _REDUCE_BLOCK // of_tiles)
