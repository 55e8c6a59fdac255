"""region_sums as a user sees it: values, autograd to second order, memory, layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

import fdkernels as fdk
from cases import FEATURE_DTYPES, LAYOUTS, Case, cases, lay_out
from oracles import RESIZES, assert_within, region_sums, unit

# What differentiates twice runs where a finite difference is cheap enough.
DIFFERENTIATED = ("reference", "cpu")


def test_worked_example_with_soft_mask():
    features = torch.tensor([[[1.0, 2.0, 4.0], [-1.0, 0.0, 8.0]]])  # [1, 2, 3]
    mask = torch.tensor([[1.0, 0.5, 0.25]])  # [1, 3]
    sums = fdk.region_sums(features, mask)
    # The foreground holds 1 + 1 + 1 and -1 + 0 + 2, the background 0 + 1 + 3 and 0 + 0 + 6.
    assert sums.fg.tolist() == [[3.0, 1.0]]
    assert sums.bg.tolist() == [[4.0, 6.0]]
    assert sums.fg_mass.tolist() == [1.75]
    assert sums.bg_mass.tolist() == [1.25]


def test_worked_example_with_ignored_pixels_and_a_smaller_layer():
    features = torch.tensor([[[8.0, 1.0]]])  # [1, 1, 2]
    mask = torch.tensor([[1, 0, 255, 1]], dtype=torch.uint8)  # cells (1, 0) and (ignored, 1)
    area = fdk.region_sums(features, mask, ignore_index=255)
    # cells: v·y = ½, v = 1;  v·y = ½, v = ½
    assert (area.fg.item(), area.bg.item()) == (8 * 0.5 + 1 * 0.5, 8 * 0.5)
    assert (area.fg_mass.item(), area.bg_mass.item()) == (1.0, 0.5)
    most = fdk.region_sums(features, mask, ignore_index=255, mask_resize="max")
    assert (most.fg.item(), most.bg.item()) == (9.0, 0.0)
    # nearest-exact takes pixels 1 and 3
    nearest = fdk.region_sums(features, mask, ignore_index=255, mask_resize="nearest")
    assert (nearest.fg.item(), nearest.bg.item()) == (1.0, 8.0)


def sums_and_gradients(case: Case, how: str, backend: str, device: torch.device, ulps: float) -> None:
    """Compares values and, for random upstream gradients, the gradients of features and soft masks."""
    features, mask = case.features(device), case.mask(device)
    options = {"mask_resize": how, "ignore_index": case.ignore_index, "aspect": "any"}
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


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("how", RESIZES)
def test_sums_and_gradients_are_those_of_the_formula(backend, device, ulps, for_all, how):
    @for_all(cases())
    def check(case: Case) -> None:
        assume(how != "max" or not case.has_ties)
        sums_and_gradients(case, how, backend, device, ulps)


@pytest.mark.usefixtures("nan_filled")
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


@given(cases(max_layers=1), st.floats(-4, 4), st.floats(-4, 4))
def test_linear_in_features(case: Case, a: float, b: float):
    (x,) = case.features()
    y = torch.randn_like(x, dtype=torch.float64)
    x, mask = x.double(), case.mask()
    both = fdk.region_sums(a * x + b * y, mask, aspect="any", ignore_index=case.ignore_index)
    of_x, of_y = (fdk.region_sums(z, mask, aspect="any", ignore_index=case.ignore_index) for z in (x, y))
    for k in range(2):
        torch.testing.assert_close(both[k], a * of_x[k] + b * of_y[k], rtol=1e-12, atol=1e-12)


@given(cases(max_layers=1, dtypes=(torch.float64,)))
def test_foreground_and_background_add_up_to_the_plain_sum(case: Case):
    (features,), mask = case.features(), case.mask()
    if case.ignore_index is not None:
        mask = mask.masked_fill(mask == case.ignore_index, 0)
    sums = fdk.region_sums(features, mask, aspect="any")
    plain = features.flatten(2).sum(-1)
    torch.testing.assert_close(sums.fg + sums.bg, plain, rtol=1e-12, atol=1e-12)
    pixels = torch.full_like(sums.fg_mass, features[0, 0].numel())
    torch.testing.assert_close(sums.fg_mass + sums.bg_mass, pixels, rtol=1e-12, atol=0)


@given(cases(), st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_the_sums(case: Case, random):
    order = list(range(case.batch))
    random.shuffle(order)
    features, mask = case.features(), case.mask()
    options = {"ignore_index": case.ignore_index, "aspect": "any"}
    plain = fdk.region_sums(features, mask, **options)
    moved = fdk.region_sums([F[order] for F in features], mask[order], **options)
    for before, after in zip(plain, moved, strict=True):
        for k in range(4):
            torch.testing.assert_close(before[k][order], after[k], rtol=1e-5, atol=1e-5)


@given(cases())
def test_a_list_of_layers_gives_what_single_calls_give(case: Case):
    features, mask = case.features(), case.mask()
    together = fdk.region_sums(features, mask, aspect="any", ignore_index=case.ignore_index)
    assert isinstance(together, list)
    for layer, sums in zip(features, together, strict=True):
        alone = fdk.region_sums(layer, mask, aspect="any", ignore_index=case.ignore_index)
        for k in range(4):
            torch.testing.assert_close(
                sums[k], alone[k].to(sums[k].dtype), rtol=1e-5, atol=1e-5, equal_nan=True
            )


def small_case(kind: str = "soft double grad", ignore: float | None = -1) -> Case:
    return Case(
        ((2, 2, 2, 3), (2, 1, 1, 2)), (2, 2, 3), (torch.float64,), mask_kind=kind, ignore_index=ignore
    )


@pytest.mark.parametrize("backend", DIFFERENTIATED, indirect=True)
@pytest.mark.parametrize("ignore", [None, -1])
@pytest.mark.parametrize("how", ["area", "max", "nearest"])
def test_gradcheck_and_gradgradcheck(backend, how, ignore):
    case = small_case(ignore=ignore)
    # Features that lie in memory in another order than their indices.
    layers = [lay_out(F.detach(), "channels_last").requires_grad_() for F in case.features()]
    ignored = case.mask() == -1
    # At least 1e-3 from the bounds, which finite differences must not cross.
    mask = torch.rand(case.mask_shape, dtype=torch.float64).clamp(1e-3, 1 - 1e-3).requires_grad_()

    def sums(mask: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
        mask = torch.where(ignored, -1.0, mask)
        options = {"mask_resize": how, "ignore_index": ignore, "backend": backend}
        parts = fdk.region_sums(layers, mask, **options)
        return tuple(value for part in parts for value in part)

    assert gradcheck(sums, (mask, *layers), fast_mode=True)
    assert gradgradcheck(sums, (mask, *layers), fast_mode=True)


@pytest.mark.parametrize("backend", DIFFERENTIATED, indirect=True)
def test_full_gradcheck_with_respect_to_features_alone(backend):
    (features, _), mask = small_case().features(), small_case("bool", None).mask()
    assert gradcheck(lambda F: fdk.region_sums(F, mask, backend=backend)[:2], (features,))
    assert gradgradcheck(lambda F: fdk.region_sums(F, mask, backend=backend)[:2], (features,))


def saved_bytes(function) -> int:
    """How many bytes autograd keeps of a call, each memory counted once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


def test_nothing_of_the_features_size_is_kept_for_backward(backend, device):
    features = torch.randn(2, 64, 16, 16, device=device, requires_grad=True)
    mask = torch.randint(0, 2, (2, 1, 16, 16), dtype=torch.uint8, device=device)
    of_sums = 2 * 2 * (64 + 1) * 4  # the results themselves may be kept
    kept = saved_bytes(lambda: fdk.region_sums(features, mask, backend=backend))
    assert kept <= mask.nbytes + of_sums
    kept = saved_bytes(lambda: fdk.region_sums(features, mask, ignore_index=255, backend=backend))
    assert kept <= 2 * mask.numel() * 4 + of_sums < 0.05 * features.nbytes


def test_features_are_kept_only_where_the_mask_asks_for_a_gradient(backend, device):
    features = torch.randn(2, 64, 16, 16, device=device, requires_grad=True)
    mask = torch.rand(2, 1, 16, 16, device=device)
    without = saved_bytes(lambda: fdk.region_sums(features, mask, backend=backend))
    mask.requires_grad_()
    with_mask = saved_bytes(lambda: fdk.region_sums(features, mask, backend=backend))
    assert without <= mask.nbytes + 2 * 2 * (64 + 1) * 4
    assert features.nbytes <= with_mask <= features.nbytes + 8 * mask.nbytes


def allocated_bytes(function) -> int:
    """How many bytes torch allocates on the CPU while `function` runs, freed or not."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_is_copied(backend, layout, dtype):
    values = lay_out(torch.randn(2, 128, 16, 16).to(dtype), layout).requires_grad_()
    mask = torch.rand(2, 1, 16, 16) > 0.5
    size = values.numel() * values.element_size()
    assert allocated_bytes(lambda: values.detach().clone()) >= size  # a copy would be seen
    sums: list[fdk.RegionSums] = []
    forward = allocated_bytes(lambda: sums.append(fdk.region_sums(values, mask, backend=backend)))
    assert forward < 0.1 * size
    loss = (sums[0].fg * sums[0].bg).sum()
    backward = allocated_bytes(lambda: torch.autograd.grad(loss, values))
    assert size <= backward < 1.1 * size  # the gradient itself, once


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("rank", [2, 3])
def test_the_gradient_of_dense_features_has_their_strides(backend, device, rank, layout):
    features = lay_out(torch.randn(2, 3, *(5, 4, 6)[:rank]).to(device), layout).requires_grad_()
    mask = torch.rand(2, *features.shape[2:], device=device)
    (grad,) = torch.autograd.grad(fdk.region_sums(features, mask, backend=backend).fg.sum(), features)
    assert grad.stride() == features.stride()


@pytest.mark.parametrize("layout", ["sliced", "strided", "expanded"])
def test_the_gradient_of_other_features_is_dense(backend, device, layout):
    features = lay_out(torch.randn(2, 3, 5, 4).to(device), layout).requires_grad_()
    mask = torch.rand(2, 5, 4, device=device)
    (grad,) = torch.autograd.grad(fdk.region_sums(features, mask, backend=backend).fg.sum(), features)
    assert torch.equal(grad, mask.unsqueeze(1).expand_as(grad))
    assert grad.is_contiguous()


def test_mixed_dtypes_accumulate_in_the_widest_and_keep_their_own_gradient():
    layers = [
        torch.randn(2, 1, 3).half().requires_grad_(),
        torch.randn(2, 2, 3).double().requires_grad_(),
    ]
    sums = fdk.region_sums(layers, torch.rand(2, 3))
    assert all(value.dtype == torch.float64 for part in sums for value in part)
    sum(part.fg.sum() for part in sums).backward()
    assert [layer.grad.dtype for layer in layers] == [torch.float16, torch.float64]


def test_half_precision_is_accumulated_in_float32():
    # 4096 + 1 is 4096 in float16: a sum in half precision would stop growing.
    features = torch.ones(1, 1, 5000, dtype=torch.float16)
    sums = fdk.region_sums(features, torch.ones(1, 5000))
    assert sums.fg.dtype == torch.float32
    assert sums.fg.item() == 5000


def test_under_no_grad_nothing_is_recorded():
    features = torch.randn(2, 3, 4, requires_grad=True)
    with torch.no_grad():
        assert not fdk.region_sums(features, torch.rand(2, 4)).fg.requires_grad
    with torch.inference_mode():
        assert not fdk.region_sums(features.detach(), torch.rand(2, 4)).fg.requires_grad
