"""NormAct: the numbers of the normalisation and the activation that it takes the place of."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fdkernels as fdk
from cases import lay_out

needs_kernels = pytest.mark.skipif(
    fdk.backends()["cpu"] is not None, reason=f"backend 'cpu': {fdk.backends()['cpu']}"
)

NORMS = {
    "batch-1d": (nn.BatchNorm1d, (3, 4, 9)),
    "batch-2d": (nn.BatchNorm2d, (3, 5, 7, 6)),
    "batch-3d": (nn.BatchNorm3d, (2, 4, 3, 5, 6)),
    "instance-1d": (nn.InstanceNorm1d, (3, 4, 9)),
    "instance-2d": (nn.InstanceNorm2d, (3, 5, 7, 6)),
    "instance-3d": (nn.InstanceNorm3d, (2, 4, 3, 5, 6)),
}
ACTIVATIONS = {"none": None, "relu": nn.ReLU(inplace=True), "leaky": nn.LeakyReLU(0.1)}
# Of the output and of gradients, over the largest number: one rounding of the dtype, and of float32 sums.
BANDS = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def make_norm(kind: str, affine: bool = True, tracks: bool = True, dtype=torch.float32) -> nn.Module:
    norm_class, shape = NORMS[kind]
    norm = norm_class(shape[1], affine=affine, track_running_stats=tracks)
    with torch.no_grad():
        if affine:
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
        if tracks:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return norm.to(torch.float64 if dtype == torch.float64 else torch.float32)


def pair(norm: nn.Module, activation: nn.Module | None, first: bool) -> nn.Sequential:
    parts = [norm] if activation is None else [norm, copy.deepcopy(activation)]
    return nn.Sequential(*(reversed(parts) if first else parts))


def run(module: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output and gradients of the input and the parameters."""
    leaf = x.detach().requires_grad_()
    # An in-place activation must not take the leaf itself.
    y = module(leaf.view_as(leaf) if isinstance(module, fdk.NormAct) else leaf * 1)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *module.parameters()], upstream)]


def assert_in_band(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    for got, want in zip(found, wanted, strict=True):
        scale = want.double().abs().max().clamp(min=1)
        assert ((got.double() - want.double()).abs().max() / scale).item() <= BANDS[dtype]


@needs_kernels
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("first", [False, True], ids=["behind", "before"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", NORMS)
def test_output_gradients_and_running_statistics_are_those_of_the_pair(kind, activation, first, training):
    shape = NORMS[kind][1]
    for dtype in BANDS:
        for layout in ("contiguous", "channels_last"):
            wide = torch.float64 if dtype != torch.float64 else dtype
            norm = make_norm(kind, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            fused = fdk.NormAct(copy.deepcopy(norm), ACTIVATIONS[activation], first).train(training)
            # The truth in float64 of the same numbers.
            plain = pair(copy.deepcopy(norm).to(wide), ACTIVATIONS[activation], first).train(training)
            x, upstream = (lay_out((2 * torch.randn(shape) + 1).to(dtype), layout) for _ in range(2))
            wanted = run(plain, x.to(wide), upstream.to(wide))
            found = run(fused, x, upstream)
            assert found[0].stride() == x.stride()
            assert found[0].dtype == found[1].dtype == dtype
            assert_in_band(found, wanted, dtype)
            truth = next(module for module in plain if module.state_dict())
            for name, buffer in fused.named_buffers():
                torch.testing.assert_close(
                    buffer, getattr(truth, name).to(buffer.dtype), rtol=2e-6, atol=2e-6
                )


@pytest.mark.parametrize("first", [False, True], ids=["behind", "before"])
@pytest.mark.parametrize("kind", ["batch-2d", "instance-3d"])
def test_the_same_in_triton(kind, first):
    if reason := fdk.backends()["triton"]:
        pytest.skip(f"backend 'triton': {reason}")
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    norm = make_norm(kind).to(device)
    plain = pair(copy.deepcopy(norm).double(), nn.ReLU(), first)
    x, upstream = (lay_out(torch.randn(NORMS[kind][1]).to(device), "channels_last") for _ in "xg")
    for training in (True, False):
        fused = fdk.NormAct(norm, nn.ReLU(), first).train(training)
        wanted = run(plain.train(training), x.double(), upstream.double())
        with fdk.use_backend("triton"):
            assert_in_band(run(fused, x, upstream), wanted, torch.float32)
    truth = next(module for module in plain if module.state_dict())
    for name, buffer in fused.named_buffers():
        torch.testing.assert_close(buffer, getattr(truth, name).to(buffer.dtype), rtol=2e-6, atol=2e-6)


@needs_kernels
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["batch-2d", "instance-2d"])
def test_statistics_follow_over_several_batches_and_in_evaluation(kind, affine, tracks, momentum):
    norm = make_norm(kind, affine, tracks)
    norm.momentum = momentum
    fused = fdk.NormAct(copy.deepcopy(norm), nn.ReLU())
    plain = nn.Sequential(norm, nn.ReLU())
    for training in (True, True, False, True):
        x = torch.randn(NORMS[kind][1]) + 3
        torch.testing.assert_close(fused.train(training)(x), plain.train(training)(x), rtol=1e-5, atol=1e-5)
    assert fused.state_dict().keys() == norm.state_dict().keys()
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(value, norm.state_dict()[name], rtol=1e-5, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", ["batch-2d", "instance-2d"])
def test_gradcheck_and_gradgradcheck(kind, first):
    for activation in (None, nn.LeakyReLU(0.2)):
        module = fdk.NormAct(make_norm(kind, tracks=False, dtype=torch.float64), activation, first)
        x = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True)

        def output(x: Tensor, weight: Tensor, bias: Tensor, module: nn.Module = module) -> Tensor:
            module.weight, module.bias = None, None
            del module.weight, module.bias
            module.weight, module.bias = weight, bias
            return module(x)

        parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
        assert torch.autograd.gradcheck(output, (x, *parameters))
        assert torch.autograd.gradgradcheck(output, (x, *parameters))


@needs_kernels
def test_a_large_mean_costs_no_digits():
    x = torch.randn(4, 3, 40, 40) + 1e4
    fused, plain = fdk.NormAct(nn.BatchNorm2d(3)), nn.BatchNorm2d(3).double()
    for layout in ("contiguous", "channels_last"):
        given_x = lay_out(x, layout)
        torch.testing.assert_close(fused(given_x).double(), plain(given_x.double()), rtol=0, atol=2e-3)


@needs_kernels
@given(
    batch=st.integers(1, 4),
    channels=st.sampled_from([1, 2, 3, 16, 17, 64, 130, 600]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    layout=st.sampled_from(["contiguous", "channels_last"]),
    instance=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(batch, channels, size, layout, instance, seed):
    if size[0] * size[1] * (1 if instance else batch) == 1:
        return  # torch refuses it
    torch.manual_seed(seed)
    norm = (nn.InstanceNorm2d if instance else nn.BatchNorm2d)(channels, affine=True).double()
    x, upstream = (lay_out(torch.randn(batch, channels, *size, dtype=torch.float64), layout) for _ in "xg")
    wanted = run(nn.Sequential(copy.deepcopy(norm), nn.ReLU()), x, upstream)
    assert_in_band(run(fdk.NormAct(norm, nn.ReLU()), x, upstream), wanted, torch.float64)


@needs_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_for_any_number_of_threads(layout):
    x, upstream = (lay_out(torch.randn(2, 24, 120, 110), layout) for _ in "xg")
    module, found = fdk.NormAct(nn.BatchNorm2d(24), nn.ReLU()), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(module, x, upstream))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_kernels
def test_nan_and_infinity_pass_as_in_torch():
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(2, 3, 4, 4)
        x[0, 1, 2, 3] = bad
        for training in (True, False):
            plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).train(training)
            fused = fdk.NormAct(copy.deepcopy(plain[0]), nn.ReLU()).train(training)
            torch.testing.assert_close(fused(x), plain(x), equal_nan=True)


def test_what_the_kernels_do_not_take_runs_in_torch():
    fused, plain = fdk.NormAct(nn.BatchNorm2d(4), nn.ReLU()), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(3, 4, 6, 5)
    for given_x in (x[:, :, ::2], x[..., 1:], x.permute(0, 1, 3, 2), x[:1].expand(3, 4, 6, 5)):
        torch.testing.assert_close(fused(given_x), plain(given_x))
    with fdk.use_backend("reference"):
        torch.testing.assert_close(fused(x), plain(x))
    line = fdk.NormAct(nn.BatchNorm1d(4), nn.ReLU())
    torch.testing.assert_close(line(x[..., 0, 0]), torch.relu(nn.BatchNorm1d(4)(x[..., 0, 0])))
    torch.testing.assert_close(fused.state_dict(), {**plain[0].state_dict()})


def test_compiled_whole_and_under_a_transform():
    fused, plain = fdk.NormAct(nn.BatchNorm2d(4), nn.ReLU()), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(3, 4, 6, 5)
    torch.testing.assert_close(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), plain(x))
    evaluated = fused.eval()
    jvp = torch.func.jvp(evaluated, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(jvp, torch.func.jvp(plain.eval(), (x,), (torch.ones_like(x),))[1])


def test_autocast_gives_the_dtype_of_the_pair():
    fused, plain = fdk.NormAct(nn.BatchNorm2d(4), nn.ReLU()), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(3, 4, 6, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == plain(x).dtype


def test_errors_are_those_of_wrong_shapes_and_kinds():
    module = fdk.NormAct(nn.BatchNorm2d(3), nn.ReLU())
    with pytest.raises(ValueError, match=r"x must have 4 dimensions, got shape \[2, 3, 4\]"):
        module(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match=r"x must have 3 channels, got shape \[2, 5, 4, 4\]"):
        module(torch.randn(2, 5, 4, 4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        module(torch.randn(1, 3, 1, 1))
    with pytest.raises(TypeError, match=r"norm must be a BatchNorm or an InstanceNorm.*got GroupNorm"):
        fdk.NormAct(nn.GroupNorm(1, 3))
    with pytest.raises(TypeError, match=r"norm must be.*got SyncBatchNorm"):
        fdk.NormAct(nn.SyncBatchNorm(3))
    with pytest.raises(TypeError, match=r"activation must be an nn.ReLU.*got GELU"):
        fdk.NormAct(nn.BatchNorm2d(3), nn.GELU())
    with pytest.raises(TypeError, match=r"slope is not negative"):
        fdk.NormAct(nn.BatchNorm2d(3), nn.LeakyReLU(-0.1))


def test_copies_pickles_and_checkpoints():
    norm = nn.BatchNorm2d(3)
    module = fdk.NormAct(norm, nn.ReLU())
    assert module.weight is norm.weight
    x = torch.randn(2, 3, 4, 4)
    module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other.eval()(x), module.eval()(x))
        module.train()
    early = {name: value for name, value in norm.state_dict().items() if name != "num_batches_tracked"}
    fresh = fdk.NormAct(nn.BatchNorm2d(3), nn.ReLU())
    fresh.load_state_dict(early)
    torch.testing.assert_close(fresh.running_mean, norm.running_mean)
    assert "BatchNorm2d, 3" in repr(module)
    assert "activation=relu" in repr(module)


@needs_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_pixels_cost_no_digits(layout):
    """Torch's own normalisation, channels_last, is 6e-5 off: it adds up all pixels of a thread in float32."""
    torch.manual_seed(0)
    x = torch.randn(4, 16, 256, 256)
    expected = nn.BatchNorm2d(16).double()(x.double())
    found = fdk.NormAct(nn.BatchNorm2d(16))(lay_out(x, layout))
    assert (found - expected).abs().max() <= 2e-6


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_small_maps_on_a_gpu_are_left_to_torch_unless_a_backend_is_chosen():
    module = fdk.NormAct(nn.BatchNorm2d(16), nn.ReLU()).cuda()
    small, large = (torch.randn(4, 16, side, side, device="cuda", requires_grad=True) for side in (256, 512))
    assert "NormActPass" not in module(small).grad_fn.name()
    assert "NormActPass" in module(large).grad_fn.name()
    with fdk.use_backend("triton"):
        assert "NormActPass" in module(small).grad_fn.name()
