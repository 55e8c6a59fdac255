"""layer_losses: the two stages as one piece of work give the numbers of one after the other."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fdkernels as fdk
import oracles
from cases import cases, partners
from fdkernels.conventions import get_convention
from fdkernels.layer_losses import fused_layer_losses
from fdkernels.layer_masks import layer_masks
from fdkernels.log_norm import Options, log_norm
from fdkernels.region_sums import geometry as geo
from fdkernels.region_sums.api import sum_regions

PAIRINGS = {"none": None, "shuffle": torch.tensor([1, 1, 0]), "pooled": torch.tensor([[0, 1], [2, 1]])}
DIFFERENTIATED = ["reference", "cpu"]


def make_options(convention: str, exchange: str, reduction: str, eps: float = 1e-3) -> Options:
    c = get_convention(convention)
    return Options(c.region_weight, c.masked_background, c.norm, float(c.log_scale), eps, exchange, reduction)


def one_after_the_other(features, masks, pairing, options: Options, backend: str) -> Tensor:
    sums, masses = sum_regions(features, masks, backend)
    channels = [layer.shape[1] for layer in features]
    pixels = [layer.shape[2:].numel() for layer in features]
    return log_norm(sums, masses, pairing, channels, pixels, options, backend)


def masks_for(features, mask, ignore_index=None, how="area", backend="reference"):
    mask = mask if mask.dim() == features[0].dim() else mask.unsqueeze(1)
    sizes = [layer.shape[2:] for layer in features]
    return layer_masks(mask, sizes, geo.accumulate_dtype(features), how, ignore_index, backend)


@st.composite
def fused_calls(draw: st.DrawFn):
    exchange = draw(st.sampled_from(oracles.EXCHANGES))
    case = draw(cases(min_batch=1 if exchange == "none" else 2, max_size=6))
    options = make_options(
        draw(st.sampled_from(oracles.CONVENTIONS)), exchange, draw(st.sampled_from(("mean", "sum")))
    )
    pairing = draw(partners(exchange, case.batch))
    wanted = draw(st.lists(st.booleans(), min_size=len(case.shapes), max_size=len(case.shapes)))
    return case, options, pairing, wanted, draw(st.booleans())


def test_the_numbers_are_those_of_the_two_stages(backend, device, for_all):
    """Under every convention, exchange and reduction, with and without tap, whichever layers ask."""

    @for_all(fused_calls())
    def check(call) -> None:
        case, options, pairing, wanted, tap = call
        features = [F.requires_grad_(w) for F, w in zip(case.features(device), wanted, strict=True)]
        mask, pairing = case.mask(device).detach(), None if pairing is None else pairing.to(device)
        masks = masks_for(features, mask, case.ignore_index)
        loss, *aliases = fused_layer_losses(features, masks, pairing, options, backend, tap)
        separate = one_after_the_other(features, masks, pairing, options, backend)
        torch.testing.assert_close(loss, separate, equal_nan=True)
        asking = [F for F in features if F.requires_grad]
        if not asking:
            assert not loss.requires_grad
            return
        G = torch.randn_like(loss)
        upstream = [torch.randn_like(F) for F in aliases]
        grads = torch.autograd.grad([loss, *aliases], asking, [G, *upstream])
        expected = list(torch.autograd.grad(separate, asking, G))
        if tap:
            arrived = [u for u, F in zip(upstream, features, strict=True) if F.requires_grad]
            expected = [grad + u for grad, u in zip(expected, arrived, strict=True)]
        for grad, other in zip(grads, expected, strict=True):
            eps = torch.finfo(grad.dtype).eps
            scale = 1 + other.nan_to_num(0, 0, 0).abs().max().item()
            tolerance = {"rtol": 1e-5 + 4 * eps, "atol": (1e-5 + 8 * eps) * scale}
            torch.testing.assert_close(grad, other, equal_nan=True, **tolerance)


@pytest.mark.parametrize("backend", DIFFERENTIATED, indirect=True)
@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("convention", oracles.CONVENTIONS)
def test_gradcheck_and_gradgradcheck(backend, convention, exchange):
    options = make_options(convention, exchange, "mean")
    first = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    second = torch.randn(3, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    masks = masks_for([first, second], torch.rand(3, 2, 2, dtype=torch.float64))

    def losses(*features: Tensor) -> Tensor:
        return fused_layer_losses(features, masks, PAIRINGS[exchange], options, backend)[0]

    assert gradcheck(losses, (first, second), fast_mode=True)
    assert gradgradcheck(losses, (first, second), fast_mode=True)


@pytest.mark.parametrize("backend", DIFFERENTIATED, indirect=True)
def test_gradgradcheck_beside_ignored_pixels_and_a_layer_that_asks_for_nothing(backend):
    options = make_options("region_mean", "none", "sum")
    mask = torch.rand(2, 3, 2, dtype=torch.float64)
    mask[:, 0] = -1
    fixed = torch.randn(2, 2, 3, 2, dtype=torch.float64)
    features = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    masks = masks_for([fixed, features], mask, ignore_index=-1)

    def outputs(features: Tensor) -> tuple[Tensor, ...]:
        loss, _, out = fused_layer_losses([fixed, features], masks, None, options, backend, tap=True)
        return loss, out.square()

    assert gradcheck(outputs, (features,))
    assert gradgradcheck(outputs, (features,))


class _Calls(TorchDispatchMode):
    """The ops of the package that run inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fdkernels":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_backward_is_one_op_and_forward_one_beside_the_masks(backend, device):
    features = [torch.randn(2, 3, s, s, device=device, requires_grad=True) for s in (8, 4)]
    mask = torch.rand(2, 8, 8, device=device) > 0.5
    with _Calls() as calls:
        loss = fdk.feature_discrepancy_loss(features, mask, backend=backend)
    assert calls.names == ["layer_masks", "layer_losses_forward"]
    with _Calls() as calls:
        loss.backward()
    assert calls.names == ["layer_losses_backward"]


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_a_plain_call_runs_one_function_of_the_backend(backend, device, stage, monkeypatch):
    module = importlib.import_module(f"fdkernels.layer_losses.impl.{backend}")
    calls = []
    original = getattr(module, stage)
    monkeypatch.setattr(module, stage, lambda *args: calls.append(stage) or original(*args))
    features = [torch.randn(2, 3, s, s, device=device, requires_grad=True) for s in (8, 4)]
    fdk.feature_discrepancy_loss(features, torch.rand(2, 8, 8, device=device), backend=backend).backward()
    assert calls == [stage]


def test_second_derivatives_do_not_take_the_slopes(device):
    features = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    loss = fdk.feature_discrepancy_loss(features, torch.rand(2, 4, 4, device=device), backend="reference")
    with _Calls() as calls:
        (grad,) = torch.autograd.grad(loss, features, create_graph=True)
    assert calls.names == ["log_norm_backward", "region_sums_backward"]
    assert grad.requires_grad


def test_no_slopes_are_made_where_no_gradient_is_asked_for(backend, device, monkeypatch):
    module = importlib.import_module(f"fdkernels.layer_losses.impl.{backend}")
    sizes = []
    original = module.forward

    def watch(*args):
        outputs = original(*args)
        sizes.append(outputs[3].numel())
        return outputs

    monkeypatch.setattr(module, "forward", watch)
    features = torch.randn(2, 3, 4, 4, device=device)
    mask = torch.rand(2, 4, 4, device=device)
    fdk.feature_discrepancy_loss(features, mask, backend=backend)
    fdk.feature_discrepancy_loss(features.requires_grad_(), mask, backend=backend)
    assert sizes == [0, 2 * 2 * 3]


@pytest.mark.parametrize("options", [("paper", "none", "mean"), ("released", "pooled", "sum")], ids="-".join)
@pytest.mark.parametrize("ignore", [None, -1])
@pytest.mark.parametrize("with_upstream", [False, True])
def test_the_ops_pass_opcheck(backend, device, interpreted, options, ignore, with_upstream):
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not interpreted:  # tracing NumPy takes long and says nothing about kernels
        tests.append("test_aot_dispatch_dynamic")
    features = [torch.randn(3, 3, 4, 2, device=device), torch.randn(3, 1, 2, 2, device=device)]
    mask = torch.rand(3, 4, 2, device=device)
    masks = masks_for(features, mask.masked_fill(mask < 0.2, -1) if ignore else mask, ignore)
    pairing = PAIRINGS[options[1]]
    pairing = None if pairing is None else pairing.to(device)
    arguments = (features, masks.fg, masks.bg, pairing, True, *make_options(*options), backend)
    op = torch.ops.fdkernels
    torch.library.opcheck(op.layer_losses_forward.default, arguments, test_utils=tests)
    slopes = op.layer_losses_forward(*arguments)[3]
    upstream, places = ([torch.randn_like(features[1])], [1]) if with_upstream else ([], [])
    geometry = geo.pack([geo.geometry_of(layer) for layer in features])
    grad_loss = torch.randn(2, device=device)
    arguments = (grad_loss, slopes, masks.fg, masks.bg, upstream, places, geometry, backend)
    torch.library.opcheck(op.layer_losses_backward.default, arguments, test_utils=tests)


def test_what_forward_leaves_unwritten_and_backward_too(backend, device, nan_filled):
    features = [torch.randn(2, 5, 7, 3, device=device, requires_grad=True) for _ in range(2)]
    loss = fdk.feature_discrepancy_loss(features, torch.rand(2, 7, 3, device=device), backend=backend)
    assert loss.isfinite()
    for grad in torch.autograd.grad(loss, features):
        assert grad.isfinite().all()
