"""Every backend of region_sums against float64 truth, through the public function."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume
from torch import Tensor

import fdkernels as fdk
from cases import FEATURE_DTYPES, LAYOUTS, Case, cases
from oracles import assert_within, region_sums, unit

pytestmark = pytest.mark.usefixtures("nan_filled")

RESIZES = ("area", "max", "nearest")


def sums_and_gradients(case: Case, how: str, backend: str, device: torch.device, ulps: float) -> None:
    """Compares values and, for random upstream gradients, the gradients of features and soft masks."""
    features, mask = case.features(device), case.mask(device)
    options = {"mask_resize": how, "ignore_index": case.ignore_index}
    results = fdk.region_sums(features, mask, **options, backend=backend)
    leaves = [F.detach().cpu().double().requires_grad_() for F in features]
    m = mask.detach().cpu()
    m = m.double().requires_grad_() if mask.requires_grad else m
    truths = [region_sums(F, m, how, case.ignore_index) for F in leaves]
    u = unit(*(F.dtype for F in features))
    outputs, wanted, bands = [], [], []
    for result, truth in zip(results, truths, strict=True):
        outputs += [result.fg, result.bg, result.fg_mass, result.bg_mass]
        wanted += truth[:4]
        mass = truth.fg_mass.detach() + truth.bg_mass.detach()
        bands += [u * truth.abs_fg, u * truth.abs_bg, u * mass, u * mass]
    for out, value, band in zip(outputs, wanted, bands, strict=True):
        assert_within(out, value, band, "sums")

    generator = torch.Generator().manual_seed(case.seed)
    upstream = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in wanted]
    inputs = [*features, mask] if mask.requires_grad else features
    kept = [i for i, out in enumerate(outputs) if out.requires_grad]
    grads = torch.autograd.grad(
        [outputs[i] for i in kept],
        inputs,
        [upstream[i].to(device, outputs[i].dtype) for i in kept],
    )
    sources = [*leaves, m] if mask.requires_grad else leaves
    kept = [i for i, value in enumerate(wanted) if value.requires_grad]
    truth_grads = torch.autograd.grad(
        [wanted[i] for i in kept], sources, [upstream[i].to(outputs[i].dtype).double() for i in kept]
    )
    for grad, value, source in zip(grads, truth_grads, inputs, strict=True):
        # (R3) adds two products and (R4) one for each channel and mass, all of the order of the upstream.
        terms = 2 if source is not mask else sum(F.shape[1] for F in features) * 8
        assert grad.dtype == source.dtype
        assert_within(grad, value, u * terms, "gradient", ulps)


@pytest.mark.parametrize("how", RESIZES)
def test_sums_and_gradients_are_those_of_the_formula(backend, device, ulps, for_all, how):
    @for_all(cases())
    def check(case: Case) -> None:
        assume(how != "max" or not case.has_ties)
        sums_and_gradients(case, how, backend, device, ulps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FEATURE_DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_dtype_layout_and_rank(backend, device, ulps, dtype, layout, rank):
    spatial = (5, 3, 4)[:rank]
    shape = (2, 3, *spatial)
    case = Case((shape,), (2, 1, *spatial), (dtype,), (layout,), "soft grad", ignore_index=-1)
    sums_and_gradients(case, "area", backend, device, ulps)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["foreground", "background"])
@pytest.mark.parametrize("ignoring", [False, True], ids=["all-valid", "ignoring"])
def test_a_bad_feature_makes_both_sums_of_its_channel_nan_or_infinite(backend, device, bad, place, ignoring):
    features = torch.ones(2, 3, 4, 4, device=device)
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.uint8, device=device)
    mask[..., :2] = 1
    mask[..., 0, 3] = 255 if ignoring else 0
    features[1, 2, 1, 0 if place == "foreground" else 2] = bad
    sums = fdk.region_sums(features, mask, ignore_index=255, backend=backend)
    for values in (sums.fg, sums.bg):
        assert not values[1, 2].isfinite()
        assert values.flatten()[:5].isfinite().all()
    # Its weight in the other region is 0, and 0 times NaN or Inf is NaN.
    assert (sums.bg if place == "foreground" else sums.fg)[1, 2].isnan()


def test_what_ignored_pixels_hold_has_no_effect(backend, device):
    clean = torch.randn(2, 3, 5, 5, device=device)
    mask = torch.randint(0, 2, (2, 1, 5, 5), device=device)
    mask[..., 2:4, 1:3] = -1
    dirty = clean.clone()
    dirty[..., 2, 1:3] = float("nan")
    dirty[..., 3, 1:3] = float("inf")
    dirty.requires_grad_()
    sums = fdk.region_sums(dirty, mask, ignore_index=-1, backend=backend)
    expected = fdk.region_sums(clean, mask, ignore_index=-1, backend=backend)
    for got, wanted in zip(sums, expected, strict=True):
        assert torch.equal(got, wanted)
    (grad,) = torch.autograd.grad(sums.fg.sum() - sums.bg.sum(), dirty)
    assert torch.equal(grad[..., 2:4, 1:3], torch.zeros_like(grad[..., 2:4, 1:3]))
    assert grad.isfinite().all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_same_bits_twice(backend, device, channels_last):
    features = torch.randn(2, 7, 33, 29, device=device)
    if channels_last:
        features = features.to(memory_format=torch.channels_last)
    mask = torch.rand(2, 33, 29, device=device).requires_grad_()
    features.requires_grad_()

    def run() -> list[Tensor]:
        sums = fdk.region_sums(features, mask, ignore_index=-1, backend=backend)
        scalar = (sums.fg * sums.bg).sum() + (sums.fg_mass * sums.bg_mass).sum()
        return [*sums, *torch.autograd.grad(scalar, (features, mask))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_layers_that_need_no_gradient_are_left_out_of_backward(backend, device):
    layers = [torch.randn(2, c, 4, 4, device=device) for c in (2, 3, 5)]
    layers[0].requires_grad_()
    layers[2].requires_grad_()
    mask = torch.randint(0, 2, (2, 4, 4), device=device).bool()
    parts = fdk.region_sums(layers, mask, backend=backend)
    sum((i + 1) * part.fg.sum() for i, part in enumerate(parts)).backward()
    assert layers[1].grad is None
    for i in (0, 2):
        assert torch.equal(layers[i].grad, (i + 1.0) * mask.unsqueeze(1).expand_as(layers[i]))


@pytest.mark.parametrize("C", [1, 3])
def test_zero_batch_gives_empty_sums_and_gradients(backend, device, C):
    features = torch.randn(0, C, 4, 3, device=device, requires_grad=True)
    sums = fdk.region_sums(features, torch.zeros(0, 4, 3, device=device), backend=backend)
    assert sums.fg.shape == (0, C)
    assert sums.bg_mass.shape == (0,)
    (grad,) = torch.autograd.grad(sums.fg.sum(), features)
    assert grad.shape == features.shape


def test_one_pixel_is_its_own_sum(backend, device):
    features = torch.tensor([[2.0, -3.0]], device=device).reshape(1, 2, 1, 1).requires_grad_()
    sums = fdk.region_sums(features, torch.full((1, 1, 1), 0.25, device=device), backend=backend)
    # 0.25·(2, -3) and 0.75·(2, -3)
    assert sums.fg.tolist() == [[0.5, -0.75]]
    assert sums.bg.tolist() == [[1.5, -2.25]]
    assert (sums.fg_mass.tolist(), sums.bg_mass.tolist()) == ([0.25], [0.75])
