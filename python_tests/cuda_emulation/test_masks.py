"""The CUDA kernel of the masks, run on the CPU, against the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cuda_emulation.build import Emulation
from cuda_emulation.calls import HERE
from cuda_emulation.pyramids import dtype_name, unwritten
from fdkernels.conventions import MASK_RESIZES
from fdkernels.op import reference
from fdkernels.op.pyramid import Weights, weight_dtype

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("contiguous", "sliced", "transposed", "expanded")
# Of 12, 10, 9 pixels: whole factors, cells that overlap, more cells than pixels, one cell, the full size.
SIZES = {
    1: [(6,), (5,), (17,), (1,), (12,)],
    2: [(6, 5), (5, 7), (24, 13), (1, 1), (12, 10), (3, 10)],
    3: [(6, 5, 3), (5, 4, 7), (13, 10, 18), (1, 1, 1), (12, 10, 9)],
}


def make_mask(shape: Sequence[int], dtype: torch.dtype, ignore: float | None) -> Tensor:
    """[N, 1, *S0], a third of it ignored and in large parts."""
    values = torch.rand(shape, dtype=torch.float64)
    mask = (values if dtype.is_floating_point else values < 0.4).to(dtype)
    if ignore is not None:
        ignored = torch.rand(shape) < 0.2
        ignored[0, ..., : shape[-1] // 2] = True
        mask.masked_fill_(ignored, ignore)
    return mask


def lay_out(mask: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return mask.transpose(2, -1).contiguous().transpose(2, -1)
    if layout == "expanded":
        return mask[:1, ..., :1].expand(mask.shape)
    if layout == "sliced":
        room = torch.zeros([2 * size + 1 for size in mask.shape], dtype=mask.dtype)
        return room[tuple(slice(1, None, 2) for _ in mask.shape)].copy_(mask)
    return mask


def run(
    emulated: Emulation,
    mask: Tensor,
    sizes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    resize: str,
    ignore: float | None,
) -> Weights:
    """Weights that were NaN, or 77 where they are bytes, with more of it around them."""
    packing, masks = emulated.packing, emulated.mask_packing
    shapes = [torch.Size(size) for size in sizes]
    _, words = masks.empty_weights(mask, shapes, dtype, resize, ignore)
    outputs = []
    for pointer in ("fg",) if ignore is None else ("fg", "bg"):
        for index, size in enumerate(shapes):
            kind = weight_dtype(mask.dtype, size == mask.shape[2:], dtype, resize)
            if kind == torch.uint8:
                room = torch.full((mask.shape[0] * size.numel() + 32,), 77, dtype=kind)
                outputs.append((room, room[16:-16].view(mask.shape[0], -1)))
            else:
                outside = unwritten((mask.shape[0], size.numel()), kind)
                outputs.append((outside, outside.tensor))
            start = index * emulated.module.mask_size_words
            words[start + emulated.module.mask_size_fields[pointer]] = outputs[-1][1].data_ptr()
    emulated.module.cuda_masks(
        *masks.arguments(mask, ignore),
        resize=masks.RESIZES[resize],
        accumulate=packing.DTYPES[dtype],
        sizes=words,
        **HERE,
    )
    for room, _ in outputs:
        if isinstance(room, Tensor):
            assert (room[:16] == 77).all()
            assert (room[-16:] == 77).all()
        else:
            room.assert_untouched()
    weights = [weight for _, weight in outputs]
    return Weights(weights[: len(shapes)], weights[len(shapes) :])


def check(
    emulated: Emulation,
    mask: Tensor,
    sizes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    resize: str,
    ignore: float | None,
) -> None:
    shapes = [torch.Size(size) for size in sizes]
    got = run(emulated, mask, sizes, dtype, resize, ignore)
    assert len(got.bg) == (0 if ignore is None else len(shapes))
    mask = mask.to(dtype) if mask.dtype == torch.float64 else mask  # 1 - y is of the rounded y
    for index, size in enumerate(shapes):
        wanted = reference.masks(mask, [size], torch.float64, resize, ignore)
        kind = weight_dtype(mask.dtype, size == mask.shape[2:], dtype, resize)
        for value, (truth,) in zip(
            (got.fg[index], *got.bg[index : index + 1]), filter(len, wanted), strict=True
        ):
            assert value.dtype == kind
            band = 6 * torch.finfo(dtype).eps if kind == dtype else 0.0
            assert ((value.double() - truth.double()).abs() <= band * truth.double().abs()).all()


@pytest.mark.parametrize("resize", MASK_RESIZES)
@pytest.mark.parametrize("mask_dtype", [*INTEGERS, *FLOATS], ids=dtype_name)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_mask_dtype_and_resize(emulated, rank, mask_dtype, resize):
    shape = (3, 1, *(12, 10, 9)[:rank])
    ignored = {torch.bool: 1, torch.uint8: 255, torch.int8: -1}.get(mask_dtype, 7)
    for ignore in (None, ignored):
        mask = make_mask(shape, mask_dtype, ignore)
        for dtype in (torch.float32, torch.float64):
            check(emulated, mask, SIZES[rank], dtype, resize, ignore)


@pytest.mark.parametrize("resize", MASK_RESIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [2, 3])
def test_masks_of_any_strides(emulated, rank, layout, resize):
    for mask_dtype in (torch.uint8, torch.float32):
        mask = lay_out(make_mask((2, 1, *(12, 10, 9)[:rank]), mask_dtype, 5), layout)
        check(emulated, mask, SIZES[rank], torch.float32, resize, 5)


@pytest.mark.parametrize("ignore", [None, 255])
@pytest.mark.parametrize(("full", "size"), [(26, 11), (28, 23), (52, 22), (24, 8)])
def test_nearest_takes_the_pixel_that_holds_the_centre(emulated, full, size, ignore):
    """At the first three sizes a position rounded to float32 falls on the pixel before."""
    pixels = [(2 * cell + 1) * full // (2 * size) for cell in range(size)]
    mask = make_mask((2, 1, full, full), torch.uint8, ignore)
    stripes = mask.new_zeros(1, 1, full)
    stripes[..., ::2] = 1  # neighbours differ
    fg, _ = run(emulated, stripes, [(size,)], torch.float32, "nearest", None)
    assert fg[0].tolist() == [[1 - pixel % 2 for pixel in pixels]]
    check(emulated, mask, [(size, size), (size, full)], torch.float32, "nearest", ignore)


def test_a_value_is_ignored_as_the_mask_rounds_it(emulated):
    for mask_dtype in FLOATS:
        mask = torch.full((1, 1, 4), 0.3, dtype=mask_dtype)
        fg, bg = run(emulated, mask, [(2,)], torch.float64, "area", 0.3)
        assert fg[0].tolist() == bg[0].tolist() == [[0, 0]]


@pytest.mark.parametrize("resize", ["area", "max"])
def test_a_cell_of_many_pixels_takes_a_block(emulated, resize):
    for ignore in (None, 255):
        mask = make_mask((2, 1, 160, 128), torch.float32, ignore)
        check(emulated, mask, [(1, 1), (2, 1), (40, 32)], torch.float64, resize, ignore)


def test_a_nan_reaches_its_cells(emulated):
    mask = torch.zeros(1, 1, 4, 4)
    mask[0, 0, 1, 2] = math.nan
    for resize in ("area", "max"):
        fg, _ = run(emulated, mask, [(2, 2), (1, 1)], torch.float32, resize, None)
        assert fg[0].isnan().tolist() == [[False, True, False, False]]
        assert fg[1].isnan().all()


def test_no_sample_and_no_pixel_launch_nothing(emulated, launches):
    run(emulated, torch.zeros(0, 1, 4, 4), [(2, 2)], torch.float32, "area", None)
    run(emulated, torch.zeros(2, 1, 4, 4), [(0, 2)], torch.float32, "area", None)
    assert launches.count() == 0


def test_more_sizes_than_a_launch_takes(emulated, launches):
    mask = make_mask((1, 1, 40), torch.uint8, None)
    check(emulated, mask, [(size,) for size in range(1, 41)], torch.float32, "area", None)
    assert launches.count() == 2


def test_the_same_bits_in_any_order_of_blocks(emulated, launches):
    mask = make_mask((2, 1, 65, 63), torch.float32, 9)
    results = []
    for order in (0, -1, 1, 2):
        launches.order(order)
        fg, bg = run(emulated, mask, [(32, 31), (7, 9), (1, 1)], torch.float32, "area", 9)
        results.append(fg + bg)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_mask_and_sizes(emulated, data):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    full = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    extents = st.tuples(*(st.integers(1, 2 * size) for size in full))
    sizes = data.draw(st.lists(extents, min_size=1, max_size=4))
    mask_dtype = data.draw(st.sampled_from((torch.uint8, torch.int32, torch.bfloat16, torch.float32)))
    ignore = data.draw(st.sampled_from((None, 3)))
    mask = make_mask((data.draw(st.integers(1, 3)), 1, *full), mask_dtype, ignore)
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64)))
    check(emulated, mask, sizes, dtype, data.draw(st.sampled_from(MASK_RESIZES)), ignore)
