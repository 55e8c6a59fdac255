"""layer_masks against averages, maxima and samples taken cell by cell."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import Case, cases
from fdkernels.layer_masks import layer_masks
from oracles import RESIZES, resize_mask


def weights(mask, sizes, how, ignore_index=None, dtype=torch.float64):
    """The weights v·y and v·(1-y) of each size, [N, P] of float64."""
    masks = layer_masks(mask, [torch.Size(size) for size in sizes], dtype, how, ignore_index)
    fg = [w.double() for w in masks.fg]
    bg = [w.double() for w in masks.bg] if masks.bg else [1 - w for w in fg]
    return list(zip(fg, bg, strict=True))


@pytest.mark.parametrize("how", RESIZES)
@given(case=cases())
def test_every_size_is_made_from_the_whole_mask(how: str, case: Case):
    mask = case.mask().detach()
    mask = mask if mask.dim() == len(case.shapes[0]) else mask.unsqueeze(1)
    sizes = [shape[2:] for shape in case.shapes]
    for size, (fg, bg) in zip(sizes, weights(mask, sizes, how, case.ignore_index), strict=True):
        y, v = resize_mask(mask.squeeze(1), size, how, case.ignore_index)
        torch.testing.assert_close(fg, v * y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(bg, v * (1 - y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["area", "max"])
@pytest.mark.parametrize(
    ("full", "sizes"),
    [
        # 3 does not divide 4, so that the single cell is not a mean of the means of three overlapping ones.
        ((4,), [(3,), (1,)]),
        ((25,), [(12,), (6,)]),
        ((100,), [(100,), (50,), (25,), (12,), (6,)]),
        ((10, 4), [(5, 4), (5, 3), (1, 1)]),
        ((6, 6), [(6, 3), (3, 6), (3, 3), (2, 3), (1, 3)]),
    ],
    ids=str,
)
def test_a_pyramid_of_uneven_sizes_is_made_from_the_whole_mask(how, full, sizes):
    mask = torch.rand(2, 1, *full, dtype=torch.float64)
    for size, (fg, _) in zip(sizes, weights(mask, sizes, how), strict=True):
        y, _ = resize_mask(mask.squeeze(1), size, how)
        torch.testing.assert_close(fg, y, rtol=1e-12, atol=1e-12)


def test_area_is_the_mean_of_the_valid_pixels_by_hand():
    mask = torch.tensor([[[1, 0, 9, 9, 1, 9]]])
    ((fg, bg),) = weights(mask, [(3,)], "area", ignore_index=9)
    # The cells hold 1 and 0, two ignored pixels, 1 and an ignored one.
    assert fg.tolist() == [[0.5, 0.0, 0.5]]
    assert bg.tolist() == [[0.5, 0.0, 0.0]]


def test_max_is_repeated_two_by_two_pooling_for_exact_factors():
    mask = (torch.rand(2, 1, 16, 24) > 0.8).float()
    levels, pooled = [], mask
    for _ in range(3):
        pooled = torch.nn.functional.max_pool2d(pooled, 2)
        levels.append(pooled)
    made = weights(mask, [level.shape[2:] for level in levels], "max")
    for (fg, bg), level in zip(made, levels, strict=True):
        assert torch.equal(fg, level.flatten(1).double())
        assert torch.equal(bg, 1 - fg)


def test_max_of_a_cell_with_an_ignored_pixel_is_valid_by_hand():
    mask = torch.tensor([[[0, 255, 255, 255, 1, 255]]])
    ((fg, bg),) = weights(mask, [(3,)], "max", ignore_index=255)
    assert fg.tolist() == [[0.0, 0.0, 1.0]]
    assert bg.tolist() == [[1.0, 0.0, 0.0]]


def test_nearest_takes_the_pixel_at_the_centre_of_a_cell_by_hand():
    mask = torch.tensor([[[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]], dtype=torch.float64)
    ((down, _), (up, _)) = weights(mask, [(2,), (12,)], "nearest")
    assert down.tolist() == [[0.2, 0.5]]
    assert up.tolist() == [[x for x in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6) for _ in range(2)]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int64])
def test_a_hard_mask_of_the_layers_size_stays_one_byte_a_pixel(dtype):
    mask = (torch.rand(2, 1, 4, 4) > 0.5).to(dtype)
    masks = layer_masks(mask, [torch.Size((4, 4))], torch.float32, "area", None)
    assert masks.fg[0].dtype == torch.uint8
    assert masks.bg == []


def test_a_byte_mask_of_the_layers_size_is_not_copied():
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    masks = layer_masks(mask, [torch.Size((4, 4))] * 2, torch.float32, "area", None)
    assert {weight.data_ptr() for weight in masks.fg} == {mask.data_ptr()}


@pytest.mark.parametrize("how", RESIZES)
@given(size=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_gradient_of_a_soft_mask_is_that_of_the_cells(how: str, size: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 1, 7, generator=generator, dtype=torch.float64)
    mask[:, :, 2] = -1
    mask.requires_grad_()
    copy = mask.detach().clone().requires_grad_()
    upstream = torch.randn(2, 2, size, generator=generator, dtype=torch.float64)
    ((fg, bg),) = weights(mask, [(size,)], how, ignore_index=-1)
    y, v = resize_mask(copy.squeeze(1), (size,), how, -1)
    (grad,) = torch.autograd.grad((fg, bg), mask, tuple(upstream))
    (wanted,) = torch.autograd.grad((v * y, v * (1 - y)), copy, tuple(upstream))
    torch.testing.assert_close(grad, wanted)
    assert grad[:, :, 2].abs().max() == 0
