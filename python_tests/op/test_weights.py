"""`weights_of`: the weights of all layers, made once a size, and differentiable where the mask is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fdkernels as fdk
from cases import Case, cases
from fdkernels.op.pyramid import accumulate_dtype
from fdkernels.op.weights import weights_of
from kernel_launches import recorded_calls
from oracles import RESIZES, resize_mask


@pytest.mark.parametrize("how", RESIZES)
def test_the_weights_of_every_layer_are_those_of_its_size(backend, device, for_all, how):
    @for_all(cases())
    def check(case: Case) -> None:
        features, mask = case.features(device), case.mask(device)
        mask = mask if mask.dim() == features[0].dim() else mask.unsqueeze(1)
        sizes, dtype = [layer.shape[2:] for layer in features], accumulate_dtype(features)
        weights = weights_of(mask, sizes, dtype, how, case.ignore_index, backend)
        within = 1e-12 if dtype == torch.float64 else 1e-6
        for index, size in enumerate(sizes):
            y, v = resize_mask(mask.detach().cpu().squeeze(1), size, how, case.ignore_index)
            fg = weights.fg[index].cpu().double()
            torch.testing.assert_close(fg, v * y, rtol=within, atol=within, check_dtype=False)
            bg = weights.bg[index].cpu().double() if weights.bg else 1 - fg
            torch.testing.assert_close(bg, v * (1 - y), rtol=within, atol=within)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.float32], ids=lambda d: str(d)[6:])
def test_a_mask_that_kernels_read_is_not_copied_at_its_own_size(backend, device, mask_dtype):
    mask = torch.ones(2, 1, 4, 4, dtype=mask_dtype, device=device)
    with fdk.debug(), recorded_calls(backend) as calls:  # so that values are checked on every device
        weights = weights_of(mask, [torch.Size((4, 4))] * 2, torch.float32, "area", None, backend)
    assert calls.names == []
    assert {weight.data_ptr() for weight in weights.fg} == {mask.data_ptr()}


@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.float16, torch.float64], ids=lambda d: str(d)[6:])
def test_a_mask_that_kernels_do_not_read_is_converted_at_its_own_size(backend, device, mask_dtype):
    mask = torch.ones(2, 1, 4, 4, dtype=mask_dtype, device=device)
    with recorded_calls(backend) as calls:
        (fg,), bg = weights_of(mask, [torch.Size((4, 4))], torch.float32, "area", None, backend)
    assert calls.names == ["masks"]
    assert fg.dtype == (torch.float32 if mask_dtype.is_floating_point else torch.uint8)
    assert torch.equal(fg.double(), torch.ones_like(fg).double())
    assert list(bg) == []


def test_all_sizes_are_made_in_one_call_and_each_once(backend, device):
    mask = torch.rand(2, 1, 4, 4, device=device)
    sizes = [torch.Size(size) for size in ((4, 4), (2, 2), (3, 3), (2, 2))]
    for ignore_index, made in ((None, 2), (7, 3)):
        with fdk.debug(), recorded_calls(backend) as calls:  # so that values are checked on every device
            weights = weights_of(mask, sizes, torch.float32, "area", ignore_index, backend)
        ((name, arguments, _),) = calls.calls
        assert name == "masks"
        assert len(arguments[1]) == made
        assert weights.fg[1] is weights.fg[3]
        assert len({weight.data_ptr() for weight in weights.fg}) == 3
        assert len(weights.bg) == (0 if ignore_index is None else 4)


@pytest.mark.parametrize("how", RESIZES)
@given(size=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_gradient_of_a_soft_mask_is_that_of_the_cells(how: str, size: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 1, 7, generator=generator, dtype=torch.float64)
    mask[:, :, 2] = -1
    mask.requires_grad_()
    copy = mask.detach().clone().requires_grad_()
    upstream = torch.randn(2, 2, size, generator=generator, dtype=torch.float64)
    (fg,), (bg,) = weights_of(mask, [torch.Size((size,))], torch.float64, how, -1)
    y, v = resize_mask(copy.squeeze(1), (size,), how, -1)
    (grad,) = torch.autograd.grad((fg, bg), mask, tuple(upstream))
    (wanted,) = torch.autograd.grad((v * y, v * (1 - y)), copy, tuple(upstream))
    torch.testing.assert_close(grad, wanted)
    assert grad[:, :, 2].abs().max() == 0


def test_a_soft_mask_that_asks_for_no_gradient_is_made_by_the_backend(backend, device):
    mask = torch.rand(2, 1, 6, device=device)
    for asks in (False, True):
        with recorded_calls(backend) as calls:
            weights = weights_of(
                mask.requires_grad_(asks), [torch.Size((3,))], torch.float32, "area", None, backend
            )
        assert calls.names == ([] if asks else ["masks"])
        assert weights.fg[0].requires_grad == asks
