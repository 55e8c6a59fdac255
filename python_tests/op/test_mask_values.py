"""Values of a mask that are no weights become NaN where they reach a layer, alike in every language."""

from __future__ import annotations

import math

import pytest
import torch

import fdkernels as fdk
from fdkernels import checks
from fdkernels.conventions import get_convention
from fdkernels.op.pyramid import Weights, describe
from fdkernels.op.weights import weights_of
from oracles import CONVENTIONS, RESIZES, resize_mask

pytestmark = pytest.mark.usefixtures("nan_filled")

NAN = math.nan
NO_WEIGHTS = {
    torch.uint8: (2, 16, 129, 254, 255),
    torch.int8: (2, -1, -128, 127),
    torch.int16: (2, -1, 255, 256, 257),
    torch.int32: (2, -1, 255, 65536, 65537),
    torch.int64: (2, -1, 255, 256, 257, 2**32 + 1),
    torch.float16: (255, 2, -1, 1.01, -0.01, NAN, math.inf),
    torch.bfloat16: (255, 2, -1, 1.01, -0.01, NAN),
    torch.float32: (255, 2, -1, 1.01, -0.01, 1.0001, -0.0001, NAN, -math.inf),
    torch.float64: (255, 2, -1, 1.01, -0.01, 1.0001, -0.0001, NAN),
}
# What rounding puts outside: up to 2^-16, in 16 bits up to 2^-8.
TAKEN = {
    torch.float16: (1.0039, -0.0039),
    torch.bfloat16: (-0.0039,),
    torch.float32: (1 + 1e-7, -1e-7, 1.000015, -0.000015),
    torch.float64: (1 + 1e-7, -1e-7, 1.000015, -0.000015),
}
SIZES = [(9, 12), (3, 4), (2, 5), (11, 13)]  # the mask's own, whole factors, cells that overlap, a larger one


@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize("ignore_index", [None, 100])
@pytest.mark.parametrize("mask_dtype", NO_WEIGHTS, ids=lambda dtype: str(dtype)[6:])
def test_what_is_no_weight_is_nan_in_the_cells_that_hold_it_and_nowhere_else(
    language, mask_dtype, ignore_index, how
):
    kernels, device = language
    dtype = torch.float64 if mask_dtype == torch.float64 else torch.float32
    values = NO_WEIGHTS[mask_dtype]
    mask = (torch.arange(len(values) + 1)[:, None] + torch.arange(9 * 12)) % 5 < 2  # a sample for each value
    mask = mask.view(-1, 9, 12).to(mask_dtype)
    if mask_dtype in TAKEN:
        mask[-1].view(-1)[::2] = torch.tensor(TAKEN[mask_dtype], dtype=mask_dtype).repeat(54)[:54]
    if ignore_index is not None:
        mask[:, :3, 6:] = ignore_index  # whole cells and parts of some
    clean, bad = mask.double().clone(), torch.zeros_like(mask, dtype=torch.float64) - 1
    for n, value in enumerate(values):
        pixel = (n, 4 + n % 5, 2 * n % 12)
        mask[pixel], clean[pixel], bad[pixel] = value, 0, 1
    made = kernels.masks(mask.unsqueeze(1).to(device), list(map(torch.Size, SIZES)), dtype, how, ignore_index)
    for index, size in enumerate(SIZES):
        y, v = resize_mask(clean, size, how, ignore_index)
        reached, _ = resize_mask(bad, size, "nearest" if how == "nearest" else "max")
        assert how == "nearest" or (reached > 0).any()
        for kind, of_region in (("fg", v * y), ("bg", v * (1 - y))):
            if kind == "bg" and ignore_index is None:
                continue
            weight = getattr(made, kind)[index].cpu()
            number = weight.double()
            if weight.dtype == torch.uint8:
                assert set(number.unique().tolist()) <= {0, 1, 255}
                number = number.masked_fill(number > 1, NAN)
            wanted = of_region.masked_fill(reached > 0, NAN)
            within = 1e-12 if dtype == torch.float64 else 1e-6
            torch.testing.assert_close(number, wanted, rtol=within, atol=within, equal_nan=True)


@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_check_of_the_values_has_the_bounds_of_the_kernels(mask_dtype):
    """What `mask_check` takes has weights that are numbers, and the other way round."""
    cpu = pytest.importorskip("fdkernels.op.cpu", exc_type=ImportError)
    for value in (0, 1, *NO_WEIGHTS[mask_dtype], *TAKEN[mask_dtype]):
        mask = torch.tensor([[[0, value, 1, 100]]], dtype=mask_dtype)
        weights = cpu.masks(mask, [torch.Size((4,))], torch.float64, "area", 100)
        assert cpu.mask_check(mask, 100)(mask) == (not weights.fg[0].isnan().any())


def test_the_tolerance_is_a_number_that_every_dtype_of_comparison_holds():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tolerance = checks.mask_tolerance(dtype)
        assert torch.tensor(tolerance, dtype=torch.float32).item() == tolerance
        assert torch.tensor(1 + tolerance, dtype=torch.float32).item() == 1 + tolerance
        assert tolerance < 0.01


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ignore_index", [None, 7])
def test_bytes_beyond_1_are_nan_in_everything_of_their_sample(language, dtype, layout, ignore_index):
    """Sums, masses, loss, slopes and gradient of the sample, and those of the other sample are numbers."""
    kernels, device = language
    features = torch.rand(2, 34, 5, 7, device=device).to(dtype)
    if layout == "channels_last":
        features = features.to(memory_format=torch.channels_last)
    fg = (torch.arange(70, device=device).view(2, 35) % 3 == 0).to(torch.uint8)
    bg = [] if ignore_index is None else [1 - fg]
    for value in (16, 255):
        fg[0, 33] = value
        for weight in bg:
            weight[0, 33] = value
        weights, pyramid = Weights([fg], bg), describe([features])
        options = get_convention("definition4").options("none", "mean", 1e-12)
        out = kernels.sums([features], weights, pyramid, options, None, True)
        (grad,) = kernels.gradient(out.slopes, None, weights, [], pyramid)
        assert out.losses.isnan().all()
        by_sample = [numbers.transpose(0, 1) for numbers in (out.sums, out.masses, out.slopes)]
        for numbers in (*by_sample, grad):
            assert numbers[0].isnan().all()
            assert numbers[1].isfinite().all()


@pytest.fixture
def unchecked(monkeypatch):
    """No value of a tensor may be read, as on a GPU."""
    monkeypatch.setattr(checks, "values_are_readable", lambda tensor: False)


def wrong_masks():
    binary = (torch.arange(2 * 64).view(2, 8, 8) % 7 < 3).long()
    void = binary.clone()
    void[1, 2:4, 5] = 255
    classes = torch.arange(2 * 64).view(2, 8, 8) // 10 % 4
    return {"0 and 255": binary * 255, "255 as ignore": void, "class indices": classes}


@pytest.mark.parametrize("kind", wrong_masks())
@pytest.mark.parametrize("mask_dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16], ids=str)
def test_the_loss_of_a_wrong_mask_is_nan_where_values_are_not_checked(
    unchecked, backend, device, kind, mask_dtype
):
    mask = wrong_masks()[kind].to(mask_dtype).to(device)
    for size in (8, 4):  # the mask's own, whose bytes are read in place, and one that is made
        features = torch.rand(2, 3, size, size, device=device)
        assert fdk.feature_discrepancy_loss(features, mask, backend=backend).isnan()


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_is_nan_under_a_wrong_mask(unchecked, backend, device, convention):
    mask = wrong_masks()["255 as ignore"].to(device)
    layers = [torch.rand(2, 3, size, size, device=device) for size in (8, 4)]
    for reduction in ("mean", "sum", "none"):
        loss = fdk.feature_discrepancy_loss(
            layers, mask, convention=convention, reduction=reduction, backend=backend
        )
        assert loss.isnan().any()


def test_a_right_mask_has_its_loss_where_values_are_not_checked(unchecked, backend, device):
    mask = wrong_masks()["255 as ignore"].to(device)
    features = torch.rand(2, 3, 8, 8, device=device)
    loss = fdk.feature_discrepancy_loss(features, mask, ignore_index=255, backend=backend)
    assert loss.isfinite()


@pytest.mark.parametrize("mask_dtype", [torch.uint8, torch.float32], ids=str)
def test_only_bytes_and_checked_values_are_read_in_place(unchecked, backend, device, mask_dtype):
    mask = torch.ones(2, 1, 4, 4, dtype=mask_dtype, device=device)
    weights = weights_of(mask, [torch.Size((4, 4))], torch.float32, "area", None, backend)
    assert (weights.fg[0].data_ptr() == mask.data_ptr()) == (mask_dtype == torch.uint8)


def test_a_mask_that_asks_for_a_gradient_gives_none_to_what_is_no_weight():
    mask = torch.tensor([[[0.5, 2.0, 1 + 1e-6]]], dtype=torch.float64, requires_grad=True)
    (fg,), _ = weights_of(mask, [torch.Size((3,))], torch.float64, "area", None)
    assert fg.isnan().tolist() == [[False, True, False]]
    (grad,) = torch.autograd.grad(fg.nansum(), mask)
    assert grad.tolist() == [[[1, 0, 1]]]
