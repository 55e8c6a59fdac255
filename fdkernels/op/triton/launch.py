"""Cuts the layers of a call into the programs of one launch, for backend `triton`.

A layer is cut into tiles by its shape and layout alone. Layers with the same memory layout share a launch:
the addresses and sizes of all of them are arguments of the kernel, so that no table is copied to the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdkernels.op.pyramid import Weights

__all__ = [
    "DTYPES",
    "MAX_LAYERS",
    "WARPS",
    "BlockRule",
    "Group",
    "LayerAccess",
    "Plan",
    "access_of_layers",
    "addresses",
    "all_some_none",
    "as_pointer",
    "ceil_div",
    "chunks",
    "entry_of_layer",
    "launch",
    "layer_of",
    "per_layer_table",
    "plan_layers",
    "power_of_2",
]

# Layers of a launch; more take one launch for each of as many.
MAX_LAYERS = 16
# Elements of a block: 16 a thread for 8 warps; forward holds two accumulators of it in registers.
_BLOCK = 4096
WARPS = 8
# Channels of a block where pixels are contiguous; fewer only for layers that have no more. Its 128 pixels are
# so few that every warp loads its own part of the mask: with 256 there were two barriers in the loop.
_CHANNELS_OF_PIXELS = (32, 4, 1)
# Pixels of a block where channels are contiguous: few, so that it holds 128 bytes or more of each.
_PIXELS_OF_CHANNELS = (64, 256, 1024)
# Pixels of a block for a layer of fewer pixels, whose pixels are contiguous.
_FEW_PIXELS = 32
# A tile has at least this many pixels, so that its partial sums are about 1 % of what it reads ...
_MIN_TILE_PIXELS = 256
# ... and at most this many blocks: longer chains of additions would lose digits in float32.
_MAX_TILE_BLOCKS = 128
# Programs of one sample from which on tiles grow rather than become more.
_PROGRAMS = 256
# From this distance on between elements of a sample their offsets need 64 bits.
_WIDE = 2**30
# Multiples that sizes and strides may have in elements; 16 makes every access one of 16 bytes.
_ALIGNMENTS = (16, 4)

# Triton compiles anew for every pattern of ones, multiples of 16 and numbers beyond 32 bits among the
# integers of a tuple, which `do_not_specialize` does not reach. Odd numbers of this size are all alike.
_OFFSET = tl.constexpr(1 << 61)
_ODD = 2 * _OFFSET.value + 1

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}


@triton.jit
def layer_of(starts, program):
    """The layer that a program works on, from the first program of each layer (a `per_layer_table`)."""
    layer = tl.zeros([], tl.int32)
    for i in tl.static_range(1, len(starts)):
        layer += (program >= (starts[i] >> 1) - _OFFSET).to(tl.int32)
    return layer


@triton.jit
def entry_of_layer(tables, layer):
    """The entry of a layer, known at run time, in each table: a tuple of int64."""
    values = ()
    for i in tl.static_range(len(tables)):
        value = tl.cast(tables[i][0], tl.int64)
        for j in tl.static_range(1, len(tables[i])):
            if layer == j:
                value = tl.cast(tables[i][j], tl.int64)
        values = values + ((value >> 1) - _OFFSET,)  # noqa: RUF005, kernels know no unpacking
    return values


@triton.jit
def as_pointer(address, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Cast an address to a pointer that the compiler knows to be aligned to ALIGN elements."""
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    BYTES: tl.constexpr = 16 if ALIGN * SIZE > 16 else ALIGN * SIZE  # noqa: FURB136, min() makes a tensor
    # The hint marks the operation that makes the pointer, so there must be one for each alignment.
    return tl.multiple_of((address // BYTES * BYTES).to(tl.pointer_type(DTYPE)), BYTES)


class Plan(NamedTuple):
    """How a layer is cut, and the strides of its elements."""

    shape: tuple[int, int, int]  # N, C, P
    units: tuple[str, ...]  # along which "pixels" or "channels" each tensor has stride 1, or "none"
    dims: int  # spatial dimensions that remain when those that follow each other are merged
    sizes: tuple[int, int]  # size_1, size_2
    strides: tuple[tuple[int, int, int, int, int], ...]  # n, c, p, 0 and 1 of each tensor
    block: tuple[int, ...]  # channels and pixels of a block, the alignment of rows, what a rule adds
    tile_blocks: int  # blocks of pixels in a tile
    tiles: int
    programs: int
    wide: bool


class LayerAccess(NamedTuple):
    """Decides how a layer is cut, and which others share its launch."""

    shape: tuple[int, ...]  # N, C and the spatial sizes
    # Of each tensor that is read or written; accesses coalesce for the first.
    strides: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    mask: torch.dtype
    aligned: bool  # whether each tensor begins at a multiple of 16 bytes


class BlockRule(Protocol):
    """How other kernels than those of two regions cut layers; hashable, as plans are cached by it."""

    @property
    def tile_pixels(self) -> int:
        """The pixels that a tile has at least."""

    def block(self, C: int, P: int, unit: str, itemsize: int, alignment: int) -> tuple[int, ...]:
        """`Plan.block` of a layer of such sizes, contiguous along this unit."""


def _access_of(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> LayerAccess:
    """Describe the maps [N, C, *S] and the weights [N, P] of a layer, the foreground's first."""
    first = tensors[0]
    return LayerAccess(
        tuple(first.shape),
        tuple(tensor.stride() for tensor in tensors),
        first.dtype,
        weights[0].dtype,
        all(tensor.data_ptr() % 16 == 0 for tensor in (*tensors, *weights)),
    )


@functools.lru_cache(maxsize=256)
def plan_layers(
    layers: tuple[LayerAccess, ...], accumulator: torch.dtype, rule: BlockRule | None = None
) -> tuple[list[Plan], list[Group]]:
    """Plan each layer, and group those that share a launch; cached."""
    prefer = _common_unit(layers)
    plans = [_plan_layer(layer, prefer, rule) for layer in layers]
    return plans, _group_layers(layers, plans, accumulator)


def _common_unit(layers: Sequence[LayerAccess]) -> str:
    """The axis that is contiguous in every map with exactly one contiguous axis; "pixels" if none is."""
    several = (layer for layer in layers if layer.shape[1] > 1 and math.prod(layer.shape[2:]) > 1)
    return "channels" if any(layer.strides[0][1] == 1 for layer in several) else "pixels"


def _plan_layer(layer: LayerAccess, prefer: str, rule: BlockRule | None) -> Plan:
    """Plan a layer; a map that is contiguous along both pixels and channels takes the preferred unit."""
    shape, strides = layer.shape, layer.strides
    N, C, P = shape[0], shape[1], math.prod(shape[2:])
    size, spatial = _merge_dimensions(shape, strides)
    dims = max(len(size), 1)
    missing = 3 - len(size)
    size_1, size_2 = ([1] * missing + size)[1:]
    steps = []
    for stride, merged in zip(strides, spatial, strict=True):
        outer, middle, inner = [0] * missing + merged
        steps.append((stride[0] if N > 1 else 0, stride[1] if C > 1 else 0, inner, outer, middle))
    first_c, first_p = steps[0][1:3]
    units = tuple(_unit_of(C, P, step, prefer) for step in steps)
    rows = [C if units[0] == "channels" else P] + [size_2] * (dims > 1)
    for unit, step in zip(units, steps, strict=True):
        unit_step = {"channels": 1, "pixels": 2}.get(unit)
        rows += [extent for i, extent in enumerate(step) if i != unit_step]
    alignment = _alignment(rows) if layer.aligned and units[0] != "none" else 1
    block: tuple[int, ...]
    if rule is None:
        block = (*_block_of(C, P, "channels" if 0 < first_c < first_p else units[0]), alignment)
    else:
        block = rule.block(C, P, units[0], layer.dtype.itemsize, alignment)
    block_c, block_p = block[:2]
    channel_blocks, pixel_blocks = max(ceil_div(C, block_c), 1), ceil_div(P, block_p)
    tile_blocks = min(channel_blocks * pixel_blocks // _PROGRAMS, _MAX_TILE_BLOCKS)
    tile_blocks = max(tile_blocks, ceil_div(rule.tile_pixels if rule else _MIN_TILE_PIXELS, block_p))
    tiles = max(ceil_div(pixel_blocks, tile_blocks), 1)
    span = max(
        sum((extent - 1) * abs(step) for extent, step in zip(shape[1:], stride[1:], strict=True))
        for stride in strides
    )
    return Plan(
        (N, C, P),
        units,
        dims,
        (size_1, size_2),
        tuple(steps),
        block,
        tile_blocks,
        tiles,
        N * channel_blocks * tiles,
        max(span, P) + _BLOCK > _WIDE,
    )


def _unit_of(C: int, P: int, step: Sequence[int], prefer: str) -> str:
    units = [
        unit
        for unit, size, along in (("pixels", P, step[2]), ("channels", C, step[1]))
        if size == 1 or along == 1
    ]
    return prefer if prefer in units else [*units, "none"][0]


def _block_of(C: int, P: int, unit: str) -> tuple[int, int]:
    if unit == "channels":
        pixels = next(p for p in _PIXELS_OF_CHANNELS[::-1] if _BLOCK // p >= C or p == _PIXELS_OF_CHANNELS[0])
        return _BLOCK // pixels, pixels
    if P <= _FEW_PIXELS:
        return _BLOCK // _FEW_PIXELS, _FEW_PIXELS
    channels = next(c for c in _CHANNELS_OF_PIXELS[::-1] if c >= C or c == _CHANNELS_OF_PIXELS[0])
    return channels, _BLOCK // channels


def _alignment(rows: Sequence[int]) -> int:
    return next((elements for elements in _ALIGNMENTS if not any(row % elements for row in rows)), 1)


def _merge_dimensions(
    shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[list[int], list[list[int]]]:
    """Merge the spatial dimensions as far as the strides of all tensors allow: sizes and strides."""
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


class Group(NamedTuple):
    """Layers that share a launch, the largest first, and the arguments of their kernel."""

    layers: list[int]
    programs: int
    block_shapes: tuple[tuple[int, ...], ...]  # the blocks that occur
    units: tuple[str, ...]
    starts: tuple[int, ...]  # the first program of each layer
    columns: tuple[tuple[int, ...], ...]  # tables of C, P, tile_blocks, block_shapes, is_byte
    strides: tuple[tuple[int, ...], ...]  # tables of the strides n, c, p (0, 1) of each tensor, and sizes
    constants: dict[str, Any]


def _group_layers(
    layers: Sequence[LayerAccess], plans: Sequence[Plan], accumulator: torch.dtype
) -> list[Group]:
    """Group the layers that need the same code; uint8 weights go with weights of one wider dtype."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    wide_masks = [layer.mask for layer in layers if layer.mask != torch.uint8]
    for i, (layer, plan) in enumerate(zip(layers, plans, strict=True)):
        if not plan.programs:
            continue
        mask = layer.mask
        if mask == torch.uint8:
            mask = accumulator if accumulator in wide_masks or not wide_masks else wide_masks[0]
        key = (layer.dtype, mask, plan.units, plan.dims, plan.wide)
        groups.setdefault(key, []).append(i)
    return [
        _group(part, layers, plans, key)
        for key, members in groups.items()
        for part in chunks(sorted(members, key=lambda i: -math.prod(plans[i].shape)))
    ]


def per_layer_table(values: Iterable[int]) -> tuple[int, ...]:
    """Encode non-negative integers, one for each layer, as kernels take them."""
    return tuple(2 * value + _ODD for value in values)


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def power_of_2(number: int) -> int:
    """The smallest power of two that is not less than the number, at least 1."""
    return 1 << max(number - 1, 0).bit_length()


def all_some_none(flags: Sequence[int]) -> str:
    """Say whether flags are set for all layers, some or none; kernels leave out what none needs."""
    return "all" if all(flags) else "some" if any(flags) else "none"


def chunks(layers: Sequence[int]) -> list[list[int]]:
    """Split layers into lists of at most `MAX_LAYERS`."""
    return [list(layers[start : start + MAX_LAYERS]) for start in range(0, len(layers), MAX_LAYERS)]


def _group(
    members: list[int],
    layers: Sequence[LayerAccess],
    plans: Sequence[Plan],
    key: tuple[Any, ...],
) -> Group:
    dtype, mask, units, dims, wide = key
    chosen = [plans[i] for i in members]
    starts, programs = [], 0
    for plan in chosen:
        starts.append(programs)
        programs += plan.programs
    block_shapes = sorted({plan.block for plan in chosen})
    is_byte = [int(layers[i].mask == torch.uint8) for i in members]
    used = 3 if dims == 1 else 5
    columns: list[Any] = [
        *zip(
            *[(p.shape[1], p.shape[2], p.tile_blocks, block_shapes.index(p.block)) for p in chosen],
            strict=True,
        ),
        is_byte,
    ]
    strides = [
        [plan.strides[tensor][step] for plan in chosen]
        for tensor in range(len(units))
        for step in range(used)
    ]
    sizes = [] if dims == 1 else [[plan.sizes[i] for plan in chosen] for i in range(2)]
    tables = [tuple(per_layer_table(column) for column in part) for part in (columns, strides + sizes)]
    constants = {
        "DTYPE": DTYPES[dtype],
        "MASK": DTYPES[mask],
        "BYTES": all_some_none(is_byte),
        "UNIT": units[0],
        "DIMS": dims,
        "WIDE": wide,
        "num_warps": WARPS,
    }
    return Group(
        members,
        programs,
        tuple(block_shapes),
        units,
        per_layer_table(starts),
        tables[0],
        tables[1],
        constants,
    )


def launch(kernel: Any, programs: int, tensor: Tensor, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the device of `tensor`, its first argument, of any shape; not for 0 programs."""
    if programs > 0:
        with torch.cuda.device_of(tensor):
            kernel[(programs,)](tensor, *arguments, enable_fp_fusion=True, **constants)


def access_of_layers(weights: Weights, *maps: Sequence[Tensor]) -> tuple[LayerAccess, ...]:
    """Describe each layer by the maps [N, C, *S] and weights [N, P] that kernels access of it."""
    both = zip(weights.fg, weights.bg, strict=True) if weights.bg else zip(weights.fg, strict=True)
    return tuple(_access_of(tensors, of_layer) for *tensors, of_layer in zip(*maps, both, strict=False))


def addresses(layers: Sequence[int], *columns: Sequence[Tensor | None]) -> list[tuple[int, ...]]:
    """Tabulate the addresses of columns of tensors, of any shape, for these layers; 0 where there is none."""
    chosen = [[column[i] if column else None for i in layers] for column in columns]
    return [
        per_layer_table(0 if tensor is None else tensor.data_ptr() for tensor in column) for column in chosen
    ]
