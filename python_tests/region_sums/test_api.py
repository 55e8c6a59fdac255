"""region_sums as a user sees it: values, autograd to second order, registered ops, memory, layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

import fdkernels as fdk
from cases import LAYOUTS, Case, cases, lay_out

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


@given(cases(max_layers=1), st.floats(-4, 4), st.floats(-4, 4))
def test_linear_in_features(case: Case, a: float, b: float):
    (x,) = case.features()
    y = torch.randn_like(x, dtype=torch.float64)
    x, mask = x.double(), case.mask()
    both = fdk.region_sums(a * x + b * y, mask, ignore_index=case.ignore_index)
    of_x, of_y = (fdk.region_sums(z, mask, ignore_index=case.ignore_index) for z in (x, y))
    for k in range(2):
        torch.testing.assert_close(both[k], a * of_x[k] + b * of_y[k], rtol=1e-12, atol=1e-12)


@given(cases(max_layers=1, dtypes=(torch.float64,)))
def test_foreground_and_background_add_up_to_the_plain_sum(case: Case):
    (features,), mask = case.features(), case.mask()
    if case.ignore_index is not None:
        mask = mask.masked_fill(mask == case.ignore_index, 0)
    sums = fdk.region_sums(features, mask)
    plain = features.flatten(2).sum(-1)
    torch.testing.assert_close(sums.fg + sums.bg, plain, rtol=1e-12, atol=1e-12)
    pixels = torch.full_like(sums.fg_mass, features[0, 0].numel())
    torch.testing.assert_close(sums.fg_mass + sums.bg_mass, pixels, rtol=1e-12, atol=0)


@given(cases(), st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_the_sums(case: Case, random):
    order = list(range(case.batch))
    random.shuffle(order)
    features, mask = case.features(), case.mask()
    plain = fdk.region_sums(features, mask, ignore_index=case.ignore_index)
    moved = fdk.region_sums([F[order] for F in features], mask[order], ignore_index=case.ignore_index)
    for before, after in zip(plain, moved, strict=True):
        for k in range(4):
            torch.testing.assert_close(before[k][order], after[k], rtol=1e-5, atol=1e-5)


@given(cases())
def test_a_list_of_layers_gives_what_single_calls_give(case: Case):
    features, mask = case.features(), case.mask()
    together = fdk.region_sums(features, mask, ignore_index=case.ignore_index)
    assert isinstance(together, list)
    for layer, sums in zip(features, together, strict=True):
        alone = fdk.region_sums(layer, mask, ignore_index=case.ignore_index)
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


def op_arguments(ignore: float | None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Features of two layers and their weights [N, P]."""
    features = [torch.randn(2, 3, 4, 2), torch.randn(2, 1, 2, 2)]
    fg = [torch.rand(2, 8), torch.rand(2, 4)]
    bg = [] if ignore is None else [torch.rand(2, 8), torch.rand(2, 4)]
    return features, fg, bg


@pytest.mark.parametrize("ignore", [None, -1])
def test_forward_op_passes_opcheck(backend, device, ignore):
    features, fg, bg = ([t.to(device) for t in part] for part in op_arguments(ignore))
    torch.library.opcheck(torch.ops.fdkernels.region_sums_forward.default, (features, fg, bg, backend))


@pytest.mark.parametrize("ignore", [None, -1])
@pytest.mark.parametrize("kind", ["features", "upstream", "masks"])
def test_backward_op_passes_opcheck(backend, device, interpreted, kind, ignore):
    features, fg, bg = ([t.to(device) for t in part] for part in op_arguments(ignore))
    grad_sums = torch.randn(2, 2, 4, device=device, requires_grad=True)
    geometry = []
    for layer in features:
        geometry += [layer.dim(), 0, *layer.shape, *layer.stride()]
    upstream, belongs_to = ([torch.randn_like(features[1])], [1]) if kind == "upstream" else ([], [])
    arguments = (
        (grad_sums, fg, bg, [], [], features, [], backend)
        if kind == "masks"
        else (grad_sums, fg, bg, upstream, belongs_to, [], geometry, backend)
    )
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if interpreted:
        tests = tests[:-1]  # tracing NumPy takes long and says nothing about kernels
    torch.library.opcheck(torch.ops.fdkernels.region_sums_backward.default, arguments, test_utils=tests)


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
    kept = saved_bytes(lambda: fdk.region_sums(features, mask, backend=backend))
    assert kept <= mask.nbytes
    kept = saved_bytes(lambda: fdk.region_sums(features, mask, ignore_index=255, backend=backend))
    assert kept <= 2 * mask.numel() * 4 < 0.04 * features.nbytes


def test_features_are_kept_only_where_the_mask_asks_for_a_gradient(backend, device):
    features = torch.randn(2, 64, 16, 16, device=device, requires_grad=True)
    mask = torch.rand(2, 1, 16, 16, device=device)
    without = saved_bytes(lambda: fdk.region_sums(features, mask, backend=backend))
    mask.requires_grad_()
    with_mask = saved_bytes(lambda: fdk.region_sums(features, mask, backend=backend))
    assert without <= mask.nbytes
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
