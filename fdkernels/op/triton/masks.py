"""The weights of all sizes in one launch, for backend `triton`.

A program makes the weights of some cells of one size. Along the last dimension adjacent lanes read adjacent
pixels of a cell, so that a row of cells is read in the order of memory; the other dimensions of a cell are
a loop. Each size is made from the whole mask: that reads the mask once a size, from the cache, where a
chain of poolings would take a launch a size. At the mask's own size a cell is a pixel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdkernels.checks import mask_tolerance
from fdkernels.op.pyramid import NO_WEIGHT, Weights, weight_dtype
from fdkernels.op.triton.access import where_scalar
from fdkernels.op.triton.launch import (
    DTYPES,
    all_some_none,
    as_pointer,
    ceil_div,
    chunks,
    entry_of_layer,
    launch,
    layer_of,
    per_layer_table,
    power_of_2,
)

__all__ = ["masks"]

# Pixels that a program looks at in one step: cells by pixels of a cell's row.
_LANES = 1024
# Pixels of a cell's row that lie side by side in lanes; longer rows take several steps.
_MAX_ROW = 32
_WARPS = 8
# The block shape of the mask's own size.
_SAME = 0
# From here on products of sizes and offsets in a sample need 64 bits.
_WIDE = 2**30
_NO_WEIGHT = tl.constexpr(NO_WEIGHT)
_SAME_SHAPE = tl.constexpr(_SAME)


@triton.jit
def _bounds(i, full, size, pixels, MODE: tl.constexpr, EXACT: tl.constexpr):
    """First pixel and end of cell i along one dimension, by (M2) or (M5).

    Where EXACT, every cell has so many `pixels`, and there is nothing to divide.
    """
    if MODE == "nearest":
        first = (2 * i + 1) * full // (2 * size)
        end = first + 1
    elif EXACT:
        first = i * pixels
        end = first + pixels
    else:
        first = i * full // size
        end = ((i + 1) * full + size - 1) // size
    return first, end


@triton.jit
def _ratio(a, b):
    # The plain division of float32 is not rounded to nearest.
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def _weight_of(value, inside, DTYPE: tl.constexpr, IGNORE: tl.constexpr, TOLERANCE: tl.constexpr):
    """The weight (M3) of pixels, NaN for what is none, and which of those inside are valid."""
    valid = inside
    if IGNORE is not None:
        if value.dtype == tl.float64:
            valid = inside & (value != tl.full((), IGNORE, tl.float64))
        else:
            valid = inside & (value.to(tl.float32) != IGNORE)
    if value.dtype.is_floating():
        compared = value if value.dtype == tl.float64 else value.to(tl.float32)
        is_weight = (compared >= -TOLERANCE) & (compared <= 1 + TOLERANCE)
    else:
        is_weight = (value == 0) | (value == 1)
    return tl.where(is_weight, value.to(DTYPE), float("nan")), valid


@triton.jit
def _store_weight(address, offsets, inside, weight, is_byte, DTYPE: tl.constexpr, BYTES: tl.constexpr):
    """Store weights as bytes, where the size is one of bytes, or as numbers."""
    if BYTES != "none":
        byte = tl.where(weight != weight, _NO_WEIGHT, weight).to(tl.uint8)
        tl.store(as_pointer(address, tl.uint8, 1) + offsets, byte, mask=where_scalar(inside, is_byte))
    if BYTES != "all":
        tl.store(as_pointer(address, DTYPE, 1) + offsets, weight, mask=where_scalar(inside, not is_byte))


@triton.jit
def _copy_pixels(
    mask_ptr, program, fg, bg, pixels, is_byte,
    DTYPE: tl.constexpr, IGNORE: tl.constexpr, TOLERANCE: tl.constexpr, BYTES: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The weights of LANES pixels at the mask's own size."""
    at = program.to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = at < pixels
    weight, valid = _weight_of(tl.load(mask_ptr + at, mask=inside, other=0), inside, DTYPE, IGNORE, TOLERANCE)
    _store_weight(fg, at, inside, tl.where(valid, weight, 0), is_byte, DTYPE, BYTES)
    if IGNORE is not None:
        _store_weight(bg, at, inside, tl.where(valid, 1 - weight, 0), is_byte, DTYPE, BYTES)


@triton.jit
def _make_cells(
    mask_ptr, program, fg, bg, sizes, rows, is_byte,
    full_0, full_1, full_2, stride_n, stride_0, stride_1, stride_2,
    DTYPE: tl.constexpr, MODE: tl.constexpr, IGNORE: tl.constexpr, TOLERANCE: tl.constexpr,
    BYTES: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr, ROW: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """The weights of a block of cells at another size."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    size_0 = sizes[0].to(index)
    size_1 = sizes[1].to(index)
    size_2 = sizes[2].to(index)
    full_0 = full_0.to(index)
    full_1 = full_1.to(index)
    full_2 = full_2.to(index)
    cells = size_0 * size_1 * size_2
    blocks = tl.cdiv(cells, CELLS)
    n = (program // blocks).to(tl.int64)
    cell = (program % blocks).to(index) * CELLS + tl.arange(0, CELLS)
    inside = cell < cells
    row = cell // size_2
    z_first, z_end = _bounds(row // size_1, full_0, size_0, rows[0], MODE, EXACT)
    y_first, y_end = _bounds(row % size_1, full_1, size_1, rows[1], MODE, EXACT)
    x_first, x_end = _bounds(cell % size_2, full_2, size_2, rows[2], MODE, EXACT)
    mask_ptr += n * stride_n
    fg += n * cells * (1 if is_byte else DTYPE.primitive_bitwidth // 8)
    bg += n * cells * (1 if is_byte else DTYPE.primitive_bitwidth // 8)

    HAS_BG: tl.constexpr = IGNORE is not None
    # Of max-pooling -1 marks what is not valid; it stays only where a whole cell holds nothing else.
    LOWEST: tl.constexpr = -1.0 if HAS_BG else float("-inf")
    best = tl.full([CELLS, ROW], LOWEST, DTYPE)
    sum_fg = tl.zeros([CELLS, ROW], DTYPE)
    sum_bg = tl.zeros([CELLS, ROW], DTYPE)
    for dz in range(rows[0]):
        for dy in range(rows[1]):
            for start in range(0, rows[2], ROW):
                z = z_first + dz
                y = y_first + dy
                x = x_first[:, None] + start + tl.arange(0, ROW)[None, :]  # [CELLS, ROW]
                in_cell = (inside & (z < z_end) & (y < y_end))[:, None] & (x < x_end[:, None])
                offsets = (z * stride_0 + y * stride_1)[:, None] + x * stride_2
                value = tl.load(mask_ptr + offsets, mask=in_cell, other=0)
                weight, valid = _weight_of(value, in_cell, DTYPE, IGNORE, TOLERANCE)
                if MODE == "max":
                    # A NaN is the largest number, as in torch.
                    larger = (weight > best) | (weight != weight)
                    best = tl.where(valid & larger, weight, best)
                else:
                    sum_fg += tl.where(valid, weight, 0)
                    if HAS_BG:
                        sum_bg += tl.where(valid, 1 - weight, 0)

    if MODE == "max":
        has_nan = tl.max((best != best).to(tl.int32), axis=1) > 0
        w_fg = tl.max(tl.where(best != best, 0, best), axis=1)  # [CELLS]
        w_bg = w_fg
        if HAS_BG:
            w_bg = tl.where(w_fg == LOWEST, 0, 1 - w_fg)
            w_fg = tl.where(w_fg == LOWEST, 0, w_fg)
        w_fg = tl.where(has_nan, float("nan"), w_fg)
        w_bg = tl.where(has_nan, float("nan"), w_bg)
    else:
        pixels = ((z_end - z_first) * (y_end - y_first) * (x_end - x_first)).to(DTYPE)
        w_fg = _ratio(tl.sum(sum_fg, axis=1), pixels)
        w_bg = _ratio(tl.sum(sum_bg, axis=1), pixels)
    _store_weight(fg, cell, inside, w_fg, is_byte, DTYPE, BYTES)
    if HAS_BG:
        _store_weight(bg, cell, inside, w_bg, is_byte, DTYPE, BYTES)


@triton.jit(do_not_specialize=["pixels", "full_0", "full_1", "full_2", "stride_n"])
def masks_kernel(
    mask_ptr, starts, tables, all_sizes, all_rows, pixels,
    full_0, full_1, full_2, stride_n, stride_0, stride_1, stride_2,
    DTYPE: tl.constexpr, MODE: tl.constexpr, IGNORE: tl.constexpr, TOLERANCE: tl.constexpr,
    BYTES: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_SHAPES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The weights (M3) to (M5) of all sizes; a program makes a block of cells of one."""
    program = tl.program_id(0)
    layer = layer_of(starts, program)
    start, fg, bg, block_shape, is_byte = entry_of_layer(tables, layer)
    sizes = entry_of_layer(all_sizes, layer)
    rows = entry_of_layer(all_rows, layer)
    for i in tl.static_range(len(BLOCK_SHAPES)):
        if block_shape == i:
            if BLOCK_SHAPES[i] == _SAME_SHAPE:
                _copy_pixels(
                    mask_ptr, program - start.to(tl.int32), fg, bg, pixels, is_byte != 0,
                    DTYPE, IGNORE, TOLERANCE, BYTES, LANES,
                )  # fmt: skip
            else:
                _make_cells(
                    mask_ptr, program - start.to(tl.int32), fg, bg, sizes, rows, is_byte != 0,
                    full_0, full_1, full_2, stride_n, stride_0, stride_1, stride_2,
                    DTYPE, MODE, IGNORE, TOLERANCE, BYTES, WIDE, EXACT,
                    BLOCK_SHAPES[i], LANES // BLOCK_SHAPES[i],
                )  # fmt: skip


def masks(
    mask: Tensor,
    sizes: Sequence[torch.Size],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
) -> Weights:
    """Resize a mask [N, 1, *S0] to the weights (M3) to (M5) [N, P] of each size, in one launch."""
    N, full = mask.shape[0], mask.shape[2:]
    fg = [
        mask.new_empty((N, size.numel()), dtype=weight_dtype(mask.dtype, size == full, dtype, mask_resize))
        for size in sizes
    ]
    bg = [] if ignore_index is None else [torch.empty_like(weight) for weight in fg]
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    ignore = None
    if ignore_index is not None:  # as the mask can hold it
        ignore = float(ignore_index)
        if mask.dtype.is_floating_point:
            ignore = torch.tensor(ignore, dtype=mask.dtype, device="cpu").item()
    missing = 3 - len(full)
    all_full = (*[1] * missing, *full)
    all_sizes = [(*[1] * missing, *size) for size in sizes]
    all_rows = [
        tuple(_longest(*pair, mask_resize) for pair in zip(all_full, s, strict=True)) for s in all_sizes
    ]
    reach = [2 * (s + 1) * (f + 1) for size in all_sizes for s, f in zip(size, all_full, strict=True)]
    reach += [fg_l.shape[1] + _LANES for fg_l in fg] + [_span(mask)]
    wide = max(reach) >= _WIDE
    exact = all(f % s == 0 for size in all_sizes for s, f in zip(size, all_full, strict=True))
    shapes_of = [
        _SAME if size == full and mask.is_contiguous() else min(power_of_2(row[2]), _MAX_ROW)
        for size, row in zip(sizes, all_rows, strict=True)
    ]
    for layers in chunks(sorted(range(len(sizes)), key=lambda i: -math.prod(all_sizes[i]))):
        block_shapes = sorted({shapes_of[i] for i in layers})
        programs = [_programs(fg[i], shapes_of[i]) for i in layers]
        starts = list(itertools.accumulate(programs, initial=0))
        columns = [
            starts[:-1],
            [fg[i].data_ptr() for i in layers],
            [bg[i].data_ptr() if bg else 0 for i in layers],
            [block_shapes.index(shapes_of[i]) for i in layers],
            [int(fg[i].dtype == torch.uint8) for i in layers],
        ]
        launch(masks_kernel, starts[-1],
            mask, per_layer_table(starts[:-1]), tuple(per_layer_table(column) for column in columns),
            *(tuple(per_layer_table(of[i][dim] for i in layers) for dim in range(3))
                for of in (all_sizes, all_rows)),
            mask.numel(), *all_full, mask.stride(0), *[0] * missing, *mask.stride()[2:],
            DTYPE=DTYPES[dtype], MODE=mask_resize, IGNORE=ignore, TOLERANCE=mask_tolerance(mask.dtype),
            BYTES=all_some_none(columns[4]), WIDE=wide, EXACT=exact,
            BLOCK_SHAPES=tuple(block_shapes), LANES=_LANES, num_warps=_WARPS,
        )  # fmt: skip
    return Weights(fg, bg)


def _programs(fg: Tensor, block_shape: int) -> int:
    """The programs that make weights [N, P]; at the mask's own size they know no samples."""
    if block_shape == _SAME:
        return ceil_div(fg.numel(), _LANES)
    return fg.shape[0] * ceil_div(fg.shape[1], _LANES // block_shape)


def _span(mask: Tensor) -> int:
    """From the first to the last pixel of a sample."""
    return sum((size - 1) * stride for size, stride in zip(mask.shape[2:], mask.stride()[2:], strict=True))


def _longest(full: int, size: int, mask_resize: str) -> int:
    """The most pixels that a cell has along a dimension."""
    if mask_resize == "nearest":
        return 1
    if full % size == 0:
        return full // size
    # Cells overlap where their ends are rounded outwards.
    return min(full, (full - 1) // size + 2)
