"""The second pass over partial sums, in float64 and the order of the tiles, for backend `triton`."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fdkernels.op.triton.launch import (
    WARPS,
    ceil_div,
    chunks,
    entry_of_layer,
    launch,
    layer_of,
    per_layer_table,
    power_of_2,
)

__all__ = ["Partials", "add_partials", "plan_second_pass"]

# Partial sums that the second pass takes at once: so many tiles, and at most so many in all.
_REDUCE_TILES = (8, 32, 128)
_REDUCE_BLOCK = 8192

Tables = tuple[tuple[int, ...], ...]


@triton.jit
def add_partials(
    partial_ptr, sums_ptr, masses_ptr, row, N, L, total_channels, C, tiles,
    BLOCK_T: tl.constexpr, BLOCK_COLUMN: tl.constexpr,
):  # fmt: skip
    """The second pass for one region and sample (a row) of one layer, in float64 and the order of tiles.

    The pointers point to the layer: its partial sums, its first channel, its column of masses.
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


@triton.jit
def _add_columns(
    partial_ptr, sums_ptr, masses_ptr, block, rows, mass_rows, L, total_channels, C, tiles,
    BLOCK_T: tl.constexpr, BLOCK_COLUMN: tl.constexpr,
):  # fmt: skip
    """The second pass for BLOCK_COLUMN of the rows·(C + 1) numbers that each tile of a layer has."""
    size = rows.to(tl.int64) * (C + 1)
    place = block.to(tl.int64) * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
    row, column = place // (C + 1), place % (C + 1)
    of_sums = (place < size) & (column < C)
    of_masses = (column == C) & (row < mass_rows)
    total = tl.zeros([BLOCK_T, BLOCK_COLUMN], tl.float64)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        total += tl.load(
            partial_ptr + (tile.to(tl.int64) * size)[:, None] + place[None, :],
            mask=(tile < tiles)[:, None] & (of_sums | of_masses)[None, :],
            other=0,
        ).to(tl.float64)
    added = tl.sum(total, axis=0).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + row * total_channels + column, added, mask=of_sums)
    tl.store(masses_ptr + row * L, added, mask=of_masses)


@triton.jit(do_not_specialize=["rows", "mass_rows", "L", "first_layer", "total_channels"])
def second_pass_kernel(
    partial_ptr, sums_ptr, masses_ptr, rows, mass_rows, L, first_layer, total_channels, starts, tables,
    BLOCK_SHAPES: tl.constexpr,
):  # fmt: skip
    """The second pass of the sums of all layers; a program adds up the tiles of some."""
    program = tl.program_id(0)
    layer = layer_of(starts, program)
    start, C, tiles, partial_start, channel_start, block_shape = entry_of_layer(tables, layer)
    for i in tl.static_range(len(BLOCK_SHAPES)):
        if block_shape == i:
            _add_columns(
                partial_ptr + partial_start, sums_ptr + channel_start, masses_ptr + first_layer + layer,
                program - start.to(tl.int32), rows, mass_rows, L, total_channels, C, tiles.to(tl.int32),
                BLOCK_SHAPES[i][0], BLOCK_SHAPES[i][1],
            )  # fmt: skip


class SecondPass(NamedTuple):
    """The layout of the partial sums of all layers, and the launches that add them up."""

    starts: list[int]  # of the partial sums of each layer
    size: int
    channel_starts: list[int]  # the first channel of each layer
    total_channels: int
    launches: list[tuple[list[int], Tables, tuple[tuple[int, int], ...]]]  # layers, tables, blocks
    of_columns: list[tuple[int, int, Tables, tuple[tuple[int, int], ...]]]  # first layer, programs, the same

    def run(self, partial: Tensor, sums: Tensor, masses: Tensor) -> None:
        """Add the partial sums to sums [rows, N, ΣC] and masses [R, N, L], which the first R rows have."""
        R, N, L = masses.shape
        for first_layer, programs, tables, blocks in self.of_columns:
            launch(second_pass_kernel, programs,
                partial, sums, masses, sums.shape[0] * N, R * N, L, first_layer, self.total_channels,
                tables[0], tables, BLOCK_SHAPES=blocks, num_warps=WARPS,
            )  # fmt: skip


class Partials(NamedTuple):
    """The partial sums of all tiles, and the outputs of the second pass."""

    partial: Tensor  # for each layer [tiles, 2, N, C + 1], the mass in the last column
    counters: Tensor  # [L] int32, zero
    sums: Tensor  # [2, N, ΣC], to be written
    masses: Tensor  # [2, N, L], to be written
    second_pass: SecondPass


@functools.lru_cache(maxsize=256)
def plan_second_pass(channels: tuple[int, ...], tiles: tuple[int, ...], rows: int) -> SecondPass:
    """Plan the second pass over layers with these channels and tiles, and rows of a region and sample."""
    columns = [rows * (C + 1) for C in channels]
    sizes = [t * size for t, size in zip(tiles, columns, strict=True)]
    *starts, size = itertools.accumulate(sizes, initial=0)
    *channel_starts, total_channels = itertools.accumulate(channels, initial=0)
    launches, of_columns = [], []
    for layers in chunks(range(len(channels))):
        of_layers = [[values[i] for i in layers] for values in (channels, tiles, starts, channel_starts)]
        blocks = [_reduce_block(tiles[i], channels[i]) for i in layers]
        launches.append((layers, *_tables(of_layers, blocks)))
        blocks = [_reduce_block(tiles[i], columns[i]) for i in layers]
        programs = [ceil_div(columns[i], block[1]) for i, block in zip(layers, blocks, strict=True)]
        *first_programs, end = itertools.accumulate(programs, initial=0)
        of_columns.append((layers[0], end, *_tables([first_programs, *of_layers], blocks)))
    return SecondPass(starts, size, channel_starts, total_channels, launches, of_columns)


def _tables(
    columns: list[list[int]], blocks: list[tuple[int, int]]
) -> tuple[Tables, tuple[tuple[int, int], ...]]:
    """Tables of these columns and of the number of each layer's block, and the blocks that occur."""
    block_shapes = sorted(set(blocks))
    numbers = [block_shapes.index(block) for block in blocks]
    return tuple(per_layer_table(column) for column in [*columns, numbers]), tuple(block_shapes)


def _reduce_block(tiles: int, channels: int) -> tuple[int, int]:
    of_tiles = next(most for most in _REDUCE_TILES if tiles <= most or most == _REDUCE_TILES[-1])
    return of_tiles, min(power_of_2(channels), _REDUCE_BLOCK // of_tiles)
