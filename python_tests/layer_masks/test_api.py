"""layer_masks against averages, maxima and samples taken cell by cell."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import Case, cases
from fdkernels.layer_masks import LayerMasks, layer_masks
from fdkernels.layer_masks.rule import weight_dtype
from oracles import RESIZES, resize_mask

LAYOUTS = ("contiguous", "transposed", "strided")


def weights(backend, device, mask, sizes, how, ignore_index=None, dtype=torch.float64):
    """The weights v·y and v·(1-y) of each size, [N, P] of float64 on the CPU."""
    sizes = [torch.Size(size) for size in sizes]
    masks = layer_masks(mask.to(device), sizes, dtype, how, ignore_index, backend)
    masks = LayerMasks([w.cpu() for w in masks.fg], [w.cpu() for w in masks.bg])
    fg = [w.double() for w in masks.fg]
    bg = [w.double() for w in masks.bg] if masks.bg else [1 - w for w in fg]
    return list(zip(fg, bg, strict=True))


@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_size_is_made_from_the_whole_mask(backend, device, for_all, how, dtype):
    within = 1e-12 if dtype == torch.float64 else 1e-6

    @for_all(cases(), st.sampled_from(LAYOUTS))
    def check(case: Case, layout: str) -> None:
        mask = case.mask().detach()
        mask = mask if mask.dim() == len(case.shapes[0]) else mask.unsqueeze(1)
        sizes = [shape[2:] for shape in case.shapes]
        strided = relaid(mask, layout)
        made = weights(backend, device, strided, sizes, how, case.ignore_index, dtype)
        for size, (fg, bg) in zip(sizes, made, strict=True):
            y, v = resize_mask(mask.squeeze(1), size, how, case.ignore_index)
            torch.testing.assert_close(fg, v * y, rtol=within, atol=within)
            torch.testing.assert_close(bg, v * (1 - y), rtol=within, atol=within)


def relaid(mask, layout):
    """The same mask with other strides."""
    if layout == "transposed":
        return mask.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        room = torch.ones([2 * s + 2 for s in mask.shape], dtype=mask.dtype)
        return room[tuple(slice(1, 1 + 2 * s, 2) for s in mask.shape)].copy_(mask)
    return mask


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
def test_a_pyramid_of_uneven_sizes_is_made_from_the_whole_mask(backend, device, how, full, sizes):
    mask = torch.rand(2, 1, *full, dtype=torch.float64)
    for size, (fg, _) in zip(sizes, weights(backend, device, mask, sizes, how), strict=True):
        y, _ = resize_mask(mask.squeeze(1), size, how)
        torch.testing.assert_close(fg, y, rtol=1e-12, atol=1e-12)


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


def test_nearest_takes_the_pixel_at_the_centre_of_a_cell_by_hand(backend, device):
    mask = torch.tensor([[[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]], dtype=torch.float64)
    ((down, _), (up, _)) = weights(backend, device, mask, [(2,), (12,)], "nearest")
    assert down.tolist() == [[0.2, 0.5]]
    assert up.tolist() == [[x for x in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6) for _ in range(2)]]


@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize("ignore_index", [None, 7])
@pytest.mark.parametrize(
    "mask_dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float32], ids=str
)
def test_weights_have_the_dtype_of_the_rule(backend, device, mask_dtype, ignore_index, how):
    mask = (torch.rand(2, 1, 4, 4, device=device) > 0.5).to(mask_dtype)
    ignore_index = None if mask_dtype == torch.bool else ignore_index
    sizes = [torch.Size((4, 4)), torch.Size((2, 2))]
    masks = layer_masks(mask, sizes, torch.float64, how, ignore_index, backend)
    for size, weight in zip(sizes * 2, masks.fg + masks.bg, strict=False):
        assert weight.is_contiguous()
        if mask_dtype == torch.float32 and size == (4, 4) and ignore_index is None:
            assert weight.dtype == torch.float64
        assert weight.dtype == weight_dtype(mask_dtype, size == (4, 4), torch.float64, how)
    assert len(masks.bg) == (0 if ignore_index is None else 2)


def test_the_rule_keeps_bytes_where_every_weight_is_zero_or_one():
    kinds = [(torch.bool, True, "area"), (torch.int64, False, "max"), (torch.uint8, False, "nearest")]
    assert {weight_dtype(kind, full, torch.float32, how) for kind, full, how in kinds} == {torch.uint8}
    kinds = [(torch.bool, False, "area"), (torch.float32, True, "area"), (torch.float64, False, "max")]
    assert {weight_dtype(kind, full, torch.float32, how) for kind, full, how in kinds} == {torch.float32}


def test_a_byte_mask_of_the_layers_size_is_not_copied(backend, device):
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool, device=device)
    masks = layer_masks(mask, [torch.Size((4, 4))] * 2, torch.float32, "area", None, backend)
    assert {weight.data_ptr() for weight in masks.fg} == {mask.data_ptr()}


def test_a_size_is_made_once(backend, device):
    mask = torch.rand(2, 1, 4, 4, device=device)
    sizes = [torch.Size((2, 2)), torch.Size((3, 3)), torch.Size((2, 2))]
    masks = layer_masks(mask, sizes, torch.float32, "area", None, backend)
    assert masks.fg[0] is masks.fg[2]
    assert masks.fg[0].data_ptr() != masks.fg[1].data_ptr()


@pytest.mark.parametrize("how", RESIZES)
def test_a_nan_of_the_mask_reaches_the_weights(backend, device, how):
    mask = torch.tensor([[[0.0, math.nan, 1.0, 0.5, 0.5, 0.5]]])
    ((fg, _),) = weights(backend, device, mask, [(2,)], how)
    assert fg.isnan().tolist() == [[True, False]]


def test_nearest_takes_the_later_of_two_pixels_whose_border_is_the_centre(backend, device):
    """As exact arithmetic does for every size; positions in float32 would sometimes take the earlier one."""
    for out in range(1, 64, 2):
        total = 2 * 7 * out + 2 * out if out % 3 else 4 * out + 2
        mask = torch.arange(total, dtype=torch.float64).view(1, 1, total)
        ((fg, _),) = weights(backend, device, mask, [(out,)], "nearest")
        assert fg.tolist() == [[(2 * i + 1) * total // (2 * out) for i in range(out)]]


@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize("ignore_index", [None, 255])
def test_the_op_passes_opcheck(backend, device, interpreted, how, ignore_index):
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not interpreted:  # tracing NumPy takes long and says nothing about kernels
        tests.append("test_aot_dispatch_dynamic")
    mask = torch.randint(0, 2, (2, 1, 6, 4), dtype=torch.uint8, device=device)
    arguments = (mask, [6, 4, 3, 2, 5, 5], torch.float32, how, ignore_index, backend)
    torch.library.opcheck(torch.ops.fdkernels.layer_masks.default, arguments, test_utils=tests)


def test_a_batch_without_samples_has_weights_without_rows(backend, device):
    mask = torch.zeros(0, 1, 4, 4, device=device)
    masks = layer_masks(mask, [torch.Size((2, 2))], torch.float32, "area", 7, backend)
    assert [list(weight.shape) for weight in masks.fg + masks.bg] == [[0, 4], [0, 4]]


@pytest.mark.parametrize("how", RESIZES)
@given(size=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_gradient_of_a_soft_mask_is_that_of_the_cells(backend, device, how: str, size: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 1, 7, generator=generator, dtype=torch.float64)
    mask[:, :, 2] = -1
    mask.requires_grad_()
    copy = mask.detach().clone().requires_grad_()
    upstream = torch.randn(2, 2, size, generator=generator, dtype=torch.float64)
    ((fg, bg),) = weights(backend, device, mask, [(size,)], how, ignore_index=-1)
    y, v = resize_mask(copy.squeeze(1), (size,), how, -1)
    (grad,) = torch.autograd.grad((fg, bg), mask, tuple(upstream))
    (wanted,) = torch.autograd.grad((v * y, v * (1 - y)), copy, tuple(upstream))
    torch.testing.assert_close(grad, wanted)
    assert grad[:, :, 2].abs().max() == 0
