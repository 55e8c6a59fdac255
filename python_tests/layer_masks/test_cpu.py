"""What only the CPU kernel of layer_masks has: pixels copied as they are, values looked at in place."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fdkernels as fdk
from fdkernels.layer_masks import layer_masks

pytestmark = pytest.mark.skipif(fdk.backends()["cpu"] is not None, reason=str(fdk.backends()["cpu"]))

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_valid(mask: Tensor, ignore_index: float) -> bool:
    from fdkernels.layer_masks.impl import cpu

    return cpu.has_valid_values(mask, ignore_index)


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("ignore_index", [None, 1, 7])
@pytest.mark.parametrize("how", ["area", "max", "nearest"])
@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "transposed"])
def test_the_full_size_holds_the_pixels_as_they_are(dtype, ignore_index, how, turned):
    values = torch.randint(2, (3, 1, 33, 70)).to(dtype)
    if dtype.is_floating_point:
        values = (torch.rand(3, 1, 33, 70)).to(dtype)
        values[:, :, ::3] = 1
    if ignore_index == 7 and dtype != torch.bool:
        values[:, :, ::2, ::5] = 7
    mask = values.mT.contiguous().mT if turned else values
    fg, bg = layer_masks(mask, [mask.shape[2:]], torch.float32, how, ignore_index, "cpu")
    y, valid = values.double().flatten(1), torch.ones(3, 33 * 70)
    if ignore_index is not None:
        valid = (values != ignore_index).double().flatten(1)
    torch.testing.assert_close(fg[0].double(), y * valid, rtol=1e-6, atol=0)
    if ignore_index is not None:
        torch.testing.assert_close(bg[0].double(), (1 - y) * valid, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", INTEGERS[1:] + FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "transposed"])
def test_one_pixel_of_another_value_is_seen(dtype, turned):
    mask = torch.randint(2, (2, 1, 19, 300)).to(dtype)
    mask[0, 0, 3, 5] = 9
    mask = mask.mT.contiguous().mT if turned else mask
    assert is_valid(mask, 9)
    assert not is_valid(mask, 8)
    wrong = [2, 8] if dtype == torch.uint8 else [2, -1]
    if dtype.is_floating_point:
        wrong += [1.25, -0.25, math.nan, math.inf]
    for value in wrong:
        bad = mask.clone()
        bad[1, 0, 18, 299] = value
        assert not is_valid(bad, 9), value


def test_soft_values_are_valid():
    assert is_valid(torch.rand(2, 1, 5, 5), 255)
    assert is_valid(torch.zeros(2, 1, 5, 5, dtype=torch.bool), 1)
