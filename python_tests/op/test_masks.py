"""`masks` of every backend against averages, maxima and samples taken cell by cell."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import fdkernels as fdk
from cases import NEAREST_SIZES, Case, cases
from fdkernels.op.kernels import kernels_of
from fdkernels.op.pyramid import weight_dtype
from oracles import RESIZES, resize_mask

pytestmark = pytest.mark.usefixtures("nan_filled")

LAYOUTS = ("contiguous", "transposed", "strided", "turned")
MASK_DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


def weights(backend, device, mask, sizes, how, ignore_index=None, dtype=torch.float64):
    """The weights v·y and v·(1-y) of each size, [N, P] of float64 on the CPU."""
    sizes = [torch.Size(size) for size in sizes]
    made = kernels_of(backend).masks(mask.to(device), sizes, dtype, how, ignore_index)
    assert len(made.bg) == (0 if ignore_index is None else len(sizes))
    fg = [w.cpu().double() for w in made.fg]
    bg = [w.cpu().double() for w in made.bg] if made.bg else [1 - w for w in fg]
    return list(zip(fg, bg, strict=True))


def relaid(mask, layout):
    """The same mask with other strides."""
    if layout == "transposed":
        return mask.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "turned":
        return mask.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        room = torch.ones([2 * s + 2 for s in mask.shape], dtype=mask.dtype)
        return room[tuple(slice(1, 1 + 2 * s, 2) for s in mask.shape)].copy_(mask)
    return mask


def assert_truth(made, mask, sizes, how, ignore_index, within):
    """`made` is what cells of the mask [N, 1, *S0] give, one by one."""
    for size, (fg, bg) in zip(sizes, made, strict=True):
        y, v = resize_mask(mask.squeeze(1), size, how, ignore_index)
        torch.testing.assert_close(fg, v * y, rtol=within, atol=within, equal_nan=True)
        torch.testing.assert_close(bg, v * (1 - y), rtol=within, atol=within, equal_nan=True)


@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_size_is_made_from_the_whole_mask(backend, device, for_all, how, dtype):
    within = 1e-12 if dtype == torch.float64 else 1e-6

    @for_all(cases(), st.sampled_from(LAYOUTS))
    def check(case: Case, layout: str) -> None:
        mask = case.mask().detach()
        mask = mask if mask.dim() == len(case.shapes[0]) else mask.unsqueeze(1)
        sizes = [shape[2:] for shape in case.shapes]
        made = weights(backend, device, relaid(mask, layout), sizes, how, case.ignore_index, dtype)
        assert_truth(made, mask, sizes, how, case.ignore_index, within)


@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_a_mask_of_any_dtype_is_resized(backend, device, mask_dtype, how):
    mask = torch.rand(2, 1, 6, 10, dtype=torch.float64)
    mask = (mask if mask_dtype.is_floating_point else (mask > 0.5).double()).to(mask_dtype)
    sizes = [(6, 10), (4, 5), (7, 11)]  # the mask's own, cells that overlap, a larger one
    dtype = torch.float64 if mask_dtype == torch.float64 else torch.float32
    made = weights(backend, device, relaid(mask, "turned"), sizes, how, dtype=dtype)
    assert_truth(made, mask, sizes, how, None, 1e-6)


@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize(
    ("mask_dtype", "ignore_index"),
    [(torch.bool, 1), (torch.uint8, 255), (torch.int64, -1), (torch.float16, 0.1), (torch.float64, 0.1)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_ignored_pixels_are_found_in_the_masks_own_dtype(backend, device, mask_dtype, ignore_index, how):
    mask = torch.rand(2, 1, 6, 10, dtype=torch.float64)
    mask = (mask if mask_dtype.is_floating_point else (mask > 0.5).double()).to(mask_dtype)
    mask = mask.masked_fill(torch.rand(mask.shape) < 0.3, ignore_index)
    mask[0, :, :3] = ignore_index  # whole cells
    held = torch.tensor(ignore_index, dtype=mask_dtype).item()  # the number as the mask rounds it
    sizes = [(6, 10), (4, 5), (7, 11)]
    dtype = torch.float64 if mask_dtype == torch.float64 else torch.float32
    made = weights(backend, device, mask, sizes, how, ignore_index, dtype)
    assert_truth(made, mask, sizes, how, held, 1e-6)


def ignorable(mask_dtype):
    """Of weights and of no weights, the values that a mask of that dtype can hold."""
    if mask_dtype == torch.bool:
        return [None, 0, 1]
    return [None, 0, 1, 7] if mask_dtype == torch.uint8 else [None, 0, 1, 7, -1]


@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize(
    ("mask_dtype", "ignore_index"),
    [(dtype, value) for dtype in MASK_DTYPES for value in ignorable(dtype)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_a_hard_mask_of_any_dtype_is_resized(backend, device, mask_dtype, ignore_index, how):
    """Kernels may take it for bytes; one value between, in the last pixel, makes it a soft one."""
    mask = (torch.rand(2, 1, 4, 8) < 0.5).to(mask_dtype)
    if ignore_index is not None:
        mask[torch.rand(mask.shape) < 0.2] = ignore_index
    sizes = [(4, 8), (2, 4), (1, 1), (3, 5)]
    made = weights(backend, device, relaid(mask, "strided"), sizes, how, ignore_index)
    assert_truth(made, mask, sizes, how, ignore_index, 1e-12)
    if mask_dtype.is_floating_point:
        mask[mask == 0] *= -1  # -0.0 is 0, too
        mask[-1, -1, -1, -1] = 0.25
        made = weights(backend, device, mask, sizes, how, ignore_index)
        assert_truth(made, mask, sizes, how, ignore_index, 1e-12)


@pytest.mark.parametrize("ignore_index", [None, 9])
def test_a_cell_may_have_more_pixels_than_16_bits_count(backend, device, ignore_index):
    mask = torch.ones(1, 1, 256, 256, dtype=torch.uint8)
    mask[..., 0, 0] = 0
    sizes = [(1, 1), (2, 1)]
    made = weights(backend, device, mask, sizes, "area", ignore_index)
    assert_truth(made, mask, sizes, "area", ignore_index, 1e-12)


@pytest.mark.parametrize("how", ["area", "max"])
@pytest.mark.parametrize(
    ("full", "sizes"),
    [
        # 3 does not divide 4, so that the single cell is not a mean of the means of three overlapping ones.
        ((4,), [(3,), (1,)]),
        ((25,), [(12,), (6,)]),
        ((100,), [(100,), (50,), (25,), (12,), (6,)]),
        ((150,), [(2,), (4,)]),
        ((10, 4), [(5, 4), (5, 3), (1, 1)]),
        ((6, 6), [(6, 3), (3, 6), (3, 3), (2, 3), (1, 3)]),
        ((4, 5, 6), [(2, 5, 3), (3, 2, 4)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("ignore_index", [None, -1])
def test_a_pyramid_of_uneven_sizes_is_made_from_the_whole_mask(
    backend, device, how, full, sizes, ignore_index
):
    mask = torch.rand(2, 1, *full, dtype=torch.float64)
    if ignore_index is not None:
        mask = mask.masked_fill(torch.rand(mask.shape) < 0.3, ignore_index)
    made = weights(backend, device, mask, sizes, how, ignore_index)
    assert_truth(made, mask, sizes, how, ignore_index, 1e-12)


def pixels_at_centres(full: tuple[int, ...], size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The pixel that holds the centre of each cell, in plain integers, the later one of two at a border."""
    along = [
        [(2 * cell + 1) * pixels // (2 * cells) for cell in range(cells)]
        for pixels, cells in zip(full, size, strict=True)
    ]
    return list(itertools.product(*along))


def by_float32(full: tuple[int, ...], size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The same as a formula in float32 has it."""
    along = [
        ((torch.arange(cells, dtype=torch.float32) + 0.5) * (torch.tensor(float(pixels)) / cells))
        .floor()
        .long()
        .tolist()
        for pixels, cells in zip(full, size, strict=True)
    ]
    return list(itertools.product(*along))


@pytest.mark.parametrize(("full", "size"), NEAREST_SIZES, ids=str)
def test_nearest_takes_the_pixel_that_integers_name(language, full, size):
    """At sizes where positions in float32 name another pixel; here each pixel holds its share of the way."""
    kernels, device = language
    wanted = pixels_at_centres(full, size)
    assert wanted != by_float32(full, size), "the sizes do not tell the two formulas apart"
    strides = [math.prod(full[dim + 1 :]) for dim in range(len(full))]
    numbers = [sum(i * step for i, step in zip(pixel, strides, strict=True)) for pixel in wanted]
    pixels = math.prod(full)
    mask = torch.arange(pixels, dtype=torch.float64).view(1, 1, *full) / pixels
    made = kernels.masks(mask.to(device), [torch.Size(size)], torch.float64, "nearest", None)
    assert made.fg[0].tolist() == [[number / pixels for number in numbers]]


@pytest.mark.parametrize(("full", "size"), NEAREST_SIZES, ids=str)
def test_nearest_takes_that_pixel_of_a_hard_mask_in_the_public_function(backend, device, full, size):
    """Neighbouring pixels differ, so that the sums of the foreground betray a cell that took a neighbour."""
    mask = torch.zeros(1, *full, dtype=torch.bool)
    for pixel in itertools.product(*(range(extent) for extent in full)):
        mask[(0, *pixel)] = sum(pixel) % 2 == 1
    cells = torch.arange(1, math.prod(size) + 1, dtype=torch.float64)  # so that cells do not cancel
    sums = fdk.region_sums(
        cells.view(1, 1, *size).to(device),
        mask.to(device),
        mask_resize="nearest",
        aspect="any",
        backend=backend,
    )
    odd = [sum(pixel) % 2 for pixel in pixels_at_centres(full, size)]
    assert sums.fg_mass.item() == sum(odd)
    assert sums.fg.item() == sum(number for number, is_odd in enumerate(odd, start=1) if is_odd)


@pytest.mark.parametrize("ignore_index", [None, 9])
def test_nearest_takes_the_later_of_two_pixels_whose_border_is_the_centre(backend, device, ignore_index):
    # The centres of the cells are the borders 1, 3 and 5 of the six pixels.
    mask = torch.tensor([[[0, 1, 0, 1, 0, 1]]], dtype=torch.uint8)
    ((fg, bg),) = weights(backend, device, mask, [(3,)], "nearest", ignore_index)
    assert (fg.tolist(), bg.tolist()) == ([[1, 1, 1]], [[0, 0, 0]])


def test_nearest_takes_the_pixel_at_the_centre_of_a_cell_by_hand(backend, device):
    mask = torch.tensor([[[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]], dtype=torch.float64)
    ((down, _), (up, _)) = weights(backend, device, mask, [(2,), (12,)], "nearest")
    assert down.tolist() == [[0.2, 0.5]]
    assert up.tolist() == [[x for x in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6) for _ in range(2)]]


def test_area_is_the_mean_of_the_valid_pixels_by_hand(backend, device):
    mask = torch.tensor([[[1, 0, 9, 9, 1, 9]]])
    ((fg, bg),) = weights(backend, device, mask, [(3,)], "area", ignore_index=9)
    # The cells hold 1 and 0, two ignored pixels, 1 and an ignored one.
    assert fg.tolist() == [[0.5, 0.0, 0.5]]
    assert bg.tolist() == [[0.5, 0.0, 0.0]]


def test_max_is_repeated_two_by_two_pooling_for_exact_factors(backend, device):
    mask = (torch.rand(2, 1, 16, 24) > 0.8).float()
    levels, pooled = [], mask
    for _ in range(3):
        pooled = torch.nn.functional.max_pool2d(pooled, 2)
        levels.append(pooled)
    made = weights(backend, device, mask, [level.shape[2:] for level in levels], "max")
    for (fg, bg), level in zip(made, levels, strict=True):
        assert torch.equal(fg, level.flatten(1).double())
        assert torch.equal(bg, 1 - fg)


def test_max_of_a_cell_with_an_ignored_pixel_is_valid_by_hand(backend, device):
    mask = torch.tensor([[[0, 255, 255, 255, 1, 255]]])
    ((fg, bg),) = weights(backend, device, mask, [(3,)], "max", ignore_index=255)
    assert fg.tolist() == [[0.0, 0.0, 1.0]]
    assert bg.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize("ignore_index", [None, -1])
def test_a_nan_of_the_mask_reaches_the_cells_that_hold_it_alone(backend, device, how, ignore_index):
    mask = torch.rand(2, 1, 4, 4)
    mask[0, 0, 1, 3] = math.nan
    (fg, _), (same, _) = weights(backend, device, mask, [(2, 2), (4, 4)], how, ignore_index)
    assert fg.isnan().sum() == same.isnan().sum() == 1
    assert fg[0, 1].isnan()
    assert same[0, 7].isnan()


@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize("ignore_index", [None, 7])
@pytest.mark.parametrize(
    "mask_dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float32], ids=str
)
def test_weights_have_the_dtype_of_the_rule_and_are_contiguous(
    backend, device, mask_dtype, ignore_index, how
):
    mask = (torch.rand(2, 1, 4, 4, device=device) > 0.5).to(mask_dtype)
    ignore_index = None if mask_dtype == torch.bool else ignore_index
    sizes = [torch.Size((4, 4)), torch.Size((2, 2))]
    made = kernels_of(backend).masks(mask, sizes, torch.float64, how, ignore_index)
    for size, weight in zip(sizes * 2, [*made.fg, *made.bg], strict=False):
        assert weight.is_contiguous()
        assert weight.dtype == weight_dtype(mask_dtype, size == (4, 4), torch.float64, how)
    assert len(made.bg) == (0 if ignore_index is None else 2)


def test_the_rule_keeps_bytes_where_every_weight_is_zero_or_one():
    kinds = [(torch.bool, True, "area"), (torch.int64, False, "max"), (torch.uint8, False, "nearest")]
    assert {weight_dtype(kind, full, torch.float32, how) for kind, full, how in kinds} == {torch.uint8}
    kinds = [(torch.bool, False, "area"), (torch.float32, True, "area"), (torch.float64, False, "max")]
    assert {weight_dtype(kind, full, torch.float32, how) for kind, full, how in kinds} == {torch.float32}


@pytest.mark.parametrize("ignore_index", [None, 7])
def test_a_batch_without_samples_has_weights_without_rows(backend, device, ignore_index):
    mask = torch.zeros(0, 1, 4, 4, device=device)
    made = kernels_of(backend).masks(mask, [torch.Size((2, 2))], torch.float32, "area", ignore_index)
    assert {tuple(weight.shape) for weight in (*made.fg, *made.bg)} == {(0, 4)}


@pytest.mark.parametrize("how", RESIZES)
def test_the_same_bits_twice(backend, device, how):
    mask = torch.rand(2, 1, 17, 23, device=device)
    sizes = [torch.Size(size) for size in ((17, 23), (8, 11), (5, 5))]
    runs: list[list[Tensor]] = []
    for _ in range(2):
        fg, bg = kernels_of(backend).masks(mask, sizes, torch.float32, how, 0.5)
        runs.append([*fg, *bg])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
