"""How the kernels of backend `triton` cut all layers of a call into the programs of one launch.

A layer is cut into tiles by its shape and layout alone. Layers whose elements lie alike share a launch: the
addresses and sizes of all of them are arguments of the kernel, so that no table travels to the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "DTYPES",
    "MAX_LAYERS",
    "Group",
    "Plan",
    "as_pointer",
    "chunks",
    "common_unit",
    "group_layers",
    "how_many",
    "launch",
    "layer_of",
    "pick",
    "plan_layer",
    "table",
]

# Layers of a launch; more take one launch for each of as many.
MAX_LAYERS = 16
# Elements of a block: 16 a thread for 8 warps; forward holds two accumulators of it in registers.
_BLOCK = 4096
_WARPS = 8
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

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}


@triton.jit
def layer_of(starts, program):
    """Which layer a program belongs to, by the first programs of all layers (as `table` gives them)."""
    layer = tl.zeros([], tl.int32)
    for i in tl.static_range(1, len(starts)):
        layer += (program >= (starts[i] >> 1) - _OFFSET).to(tl.int32)
    return layer


@triton.jit
def pick(tables, layer):
    """The entry of a layer, known at run time, in each of some tables: a tuple of int64."""
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
    """An address as a pointer of which the compiler knows that it is aligned to ALIGN elements."""
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    BYTES: tl.constexpr = 16 if ALIGN * SIZE > 16 else ALIGN * SIZE  # noqa: FURB136, min() makes a tensor
    # The hint marks the operation that makes the pointer, so there must be one for each alignment.
    return tl.multiple_of((address // BYTES * BYTES).to(tl.pointer_type(DTYPE)), BYTES)


class Plan(NamedTuple):
    """How a layer is cut, and where its elements lie."""

    shape: tuple[int, int, int]  # N, C, P
    units: tuple[str, ...]  # along which "pixels" or "channels" each tensor has stride 1, or "none"
    dims: int  # spatial dimensions that remain when those that follow each other are merged
    sizes: tuple[int, int]  # size_1, size_2
    strides: tuple[tuple[int, int, int, int, int], ...]  # n, c, p, 0 and 1 of each tensor
    block: tuple[int, int, int]  # channels and pixels of a block, and the alignment of rows
    tile_blocks: int  # blocks of pixels in a tile
    tiles: int
    programs: int
    wide: bool


def plan_layer(
    shape: Sequence[int],
    *strides: Sequence[int],
    places: Sequence[tuple[int, int]] = (),
    prefer: str = "pixels",
) -> Plan:
    """The plan for tensors [N, C, *S] of one shape; accesses coalesce for the first strides.

    Args:
        shape: N, C and the spatial sizes.
        strides: those of each tensor.
        places: address and bytes of an element of all that is read or written, masks too.
        prefer: the unit of a map that is contiguous along both, as one of a single pixel or channel is.
    """
    N, C, P = shape[0], shape[1], torch.Size(shape[2:]).numel()
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
    block_c, block_p = _block_of(C, P, "channels" if 0 < first_c < first_p else units[0])
    channel_blocks, pixel_blocks = max(triton.cdiv(C, block_c), 1), triton.cdiv(P, block_p)
    tile_blocks = min(channel_blocks * pixel_blocks // _PROGRAMS, _MAX_TILE_BLOCKS)
    tile_blocks = max(tile_blocks, triton.cdiv(_MIN_TILE_PIXELS, block_p))
    tiles = max(triton.cdiv(pixel_blocks, tile_blocks), 1)
    span = max(
        sum((extent - 1) * abs(step) for extent, step in zip(shape[1:], stride[1:], strict=True))
        for stride in strides
    )
    rows = [C if units[0] == "channels" else P] + [size_2] * (dims > 1)
    for unit, step in zip(units, steps, strict=True):
        unit_step = {"channels": 1, "pixels": 2}.get(unit)
        rows += [extent for i, extent in enumerate(step) if i != unit_step]
    return Plan(
        (N, C, P),
        units,
        dims,
        (size_1, size_2),
        tuple(steps),
        (block_c, block_p, 1 if units[0] == "none" else _alignment(rows, places)),
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


def common_unit(tensors: Sequence[Tensor]) -> str:
    """Along what the maps lie that lie along one thing only; "pixels" if there is no such map."""
    for tensor in tensors:
        C, P = tensor.shape[1], tensor.shape[2:].numel()
        if C > 1 and P > 1 and tensor.stride(1) == 1:
            return "channels"
    return "pixels"


def _block_of(C: int, P: int, unit: str) -> tuple[int, int]:
    if unit == "channels":
        pixels = next(p for p in _PIXELS_OF_CHANNELS[::-1] if _BLOCK // p >= C or p == _PIXELS_OF_CHANNELS[0])
        return _BLOCK // pixels, pixels
    if P <= _FEW_PIXELS:
        return _BLOCK // _FEW_PIXELS, _FEW_PIXELS
    channels = next(c for c in _CHANNELS_OF_PIXELS[::-1] if c >= C or c == _CHANNELS_OF_PIXELS[0])
    return channels, _BLOCK // channels


def _alignment(rows: Sequence[int], places: Sequence[tuple[int, int]]) -> int:
    for elements in _ALIGNMENTS:
        if all(row % elements == 0 for row in rows) and all(
            address % min(elements * size, 16) == 0 for address, size in places
        ):
            return elements
    return 1


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


class Group(NamedTuple):
    """Layers that share a launch, the largest first, and what their kernel is told of them."""

    layers: list[int]
    programs: int
    kinds: tuple[tuple[int, int, int], ...]  # the blocks that occur
    units: tuple[str, ...]
    starts: tuple[int, ...]  # the first program of each layer
    columns: tuple[tuple[int, ...], ...]  # tables of C, P, tile_blocks, kinds, is_byte
    strides: tuple[tuple[int, ...], ...]  # tables of the strides n, c, p (0, 1) of each tensor, and sizes
    constants: dict[str, Any]


def group_layers(
    plans: Sequence[Plan],
    tensors: Sequence[Tensor],
    fg: Sequence[Tensor],
    accumulator: torch.dtype,
    has_bg: bool,
) -> list[Group]:
    """Layers that need the same code share a launch; uint8 masks lie beside masks of one wider dtype."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    wide_masks = [weight.dtype for weight in fg if weight.dtype != torch.uint8]
    for i, plan in enumerate(plans):
        if not plan.programs:
            continue
        mask = fg[i].dtype
        if mask == torch.uint8:
            mask = accumulator if accumulator in wide_masks or not wide_masks else wide_masks[0]
        key = (tensors[i].dtype, mask, plan.units, plan.dims, plan.wide)
        groups.setdefault(key, []).append(i)
    return [
        _group(layers, plans, fg, key, has_bg)
        for key, members in groups.items()
        for layers in chunks(sorted(members, key=lambda i: -torch.Size(plans[i].shape).numel()))
    ]


def table(values: Iterable[int]) -> tuple[int, ...]:
    """Integers of 0 and more, one for each layer, as kernels take them."""
    return tuple(2 * (value + _OFFSET.value) + 1 for value in values)


def how_many(flags: Sequence[int]) -> str:
    """Whether flags are set for all layers, for some or for none; kernels leave out what none needs."""
    return "all" if all(flags) else "some" if any(flags) else "none"


def chunks(layers: Sequence[int]) -> list[list[int]]:
    """At most `MAX_LAYERS` layers at a time."""
    return [list(layers[start : start + MAX_LAYERS]) for start in range(0, len(layers), MAX_LAYERS)]


def _group(
    layers: list[int], plans: Sequence[Plan], fg: Sequence[Tensor], key: tuple[Any, ...], has_bg: bool
) -> Group:
    dtype, mask, units, dims, wide = key
    chosen = [plans[i] for i in layers]
    starts, programs = [], 0
    for plan in chosen:
        starts.append(programs)
        programs += plan.programs
    kinds = sorted({plan.block for plan in chosen})
    is_byte = [int(fg[i].dtype == torch.uint8) for i in layers]
    used = 3 if dims == 1 else 5
    columns: list[Any] = [
        *zip(*[(p.shape[1], p.shape[2], p.tile_blocks, kinds.index(p.block)) for p in chosen], strict=True),
        is_byte,
    ]
    strides = [
        [plan.strides[tensor][step] for plan in chosen]
        for tensor in range(len(units))
        for step in range(used)
    ]
    sizes = [] if dims == 1 else [[plan.sizes[i] for plan in chosen] for i in range(2)]
    tables = [tuple(table(column) for column in part) for part in (columns, strides + sizes)]
    constants = {
        "DTYPE": DTYPES[dtype],
        "MASK": DTYPES[mask],
        "BYTES": how_many(is_byte),
        "UNIT": units[0],
        "DIMS": dims,
        "WIDE": wide,
        "HAS_BG": has_bg,
        "num_warps": _WARPS,
    }
    return Group(layers, programs, tuple(kinds), units, table(starts), tables[0], tables[1], constants)


def launch(kernel: Any, programs: int, tensor: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run the kernel on the device of `tensor`, its first argument; an empty batch has no programs."""
    if programs > 0:
        with torch.cuda.device_of(tensor):
            kernel[(programs,)](tensor, *arguments, enable_fp_fusion=True, **constants)
