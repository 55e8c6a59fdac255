"""Backend `triton` of layer_masks: one launch for all sizes, with the numbers of the reference."""

from __future__ import annotations

import math
import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fdkernels.layer_masks.impl import reference
from fdkernels.layer_masks.impl import triton as backend
from kernel_launches import recorded_launches

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are counted by the interpreter"
    ),
    pytest.mark.usefixtures("nan_filled"),
]

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]
HOW = ["area", "max", "nearest"]
SIZES = [(6, 10), (4, 5), (7, 11)]  # the mask's own, cells that overlap, a larger one


def mask_of(dtype, *shape, ignore_index=None):
    """A mask with strides that no dimension has to itself."""
    mask = torch.rand(2, 1, *shape, dtype=torch.float64)
    mask = (mask if dtype.is_floating_point else (mask > 0.5).double()).to(dtype)
    if ignore_index is not None:
        mask = mask.masked_fill(torch.rand(mask.shape) < 0.3, ignore_index)
    return mask.transpose(0, -1).contiguous().transpose(0, -1)


def assert_same(mask, sizes, how, ignore_index, dtype=torch.float32):
    sizes = [torch.Size(size) for size in sizes]
    with recorded_launches() as names:
        made = backend.forward(mask, sizes, dtype, how, ignore_index)
    assert names == ["layer_masks_forward_kernel"]
    for mine, theirs in zip(made, reference.forward(mask, sizes, dtype, how, ignore_index), strict=True):
        for weight, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-7, equal_nan=True)
    return made


@pytest.mark.parametrize(
    ("dtype", "how"),
    [(dtype, HOW[i % 3]) for i, dtype in enumerate(DTYPES)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_a_mask_of_any_dtype_comes_to_all_sizes_in_one_launch(dtype, how):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert_same(mask_of(dtype, 6, 10), SIZES, how, None, wide)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("dtype", "ignore_index"),
    [(torch.uint8, 255), (torch.int64, -1), (torch.float16, 0.1), (torch.float64, 0.1)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_ignored_pixels_are_found_in_the_mask_s_own_dtype(dtype, ignore_index, how):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mask = mask_of(dtype, 6, 10, ignore_index=ignore_index)
    mask[0, :, :3] = ignore_index  # whole cells
    assert_same(mask, SIZES, how, ignore_index, wide)


@pytest.mark.parametrize("how", ["area", "max"])
def test_cells_longer_than_a_row_of_lanes_and_of_three_dimensions(how):
    assert_same(mask_of(torch.float32, 150), [(2,), (4,)], how, None)
    assert_same(mask_of(torch.int32, 4, 5, 6, ignore_index=-1), [(2, 5, 3), (3, 2, 4)], how, -1)


@pytest.mark.parametrize("ignore_index", [None, -1])
@pytest.mark.parametrize("how", HOW)
def test_a_nan_reaches_the_cells_that_hold_it(how, ignore_index):
    mask = mask_of(torch.float32, 4, 4)
    mask[0, 0, 1, 3] = math.nan
    (fg, same), _ = assert_same(mask, [(2, 2), (4, 4)], how, ignore_index)
    assert fg.isnan().sum() == 1
    assert same.isnan().sum() == 1


@pytest.mark.parametrize("how", HOW)
def test_positions_of_64_bits_give_the_same(how, monkeypatch):
    mask = mask_of(torch.int16, 6, 10, ignore_index=-1)
    narrow = assert_same(mask, SIZES, how, -1)
    monkeypatch.setattr(backend, "_WIDE", 0)
    wide = assert_same(mask, SIZES, how, -1)
    assert all(
        torch.equal(a, b)
        for one, other in zip(narrow, wide, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_more_sizes_than_a_launch_holds_take_two():
    sizes = [torch.Size([size]) for size in range(1, 18)]
    mask = mask_of(torch.uint8, 9)
    with recorded_launches() as names:
        fg, _ = backend.forward(mask, sizes, torch.float32, "area", None)
    assert len(names) == 2
    for weight, other in zip(fg, reference.forward(mask, sizes, torch.float32, "area", None)[0], strict=True):
        torch.testing.assert_close(weight, other)


def test_an_empty_batch_has_empty_weights():
    fg, bg = backend.forward(torch.ones(0, 1, 4), [torch.Size([2])], torch.float32, "area", 3)
    assert [weight.shape for weight in (*fg, *bg)] == [(0, 2), (0, 2)]
