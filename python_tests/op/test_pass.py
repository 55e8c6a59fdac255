"""The op under autograd: one pass forward, one write backward, and the formula to second order."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fdkernels as fdk
import oracles
from cases import FORMULAS, SumsCase, cases, partners
from fdkernels.op import reference
from fdkernels.op.autograd import Call, run_pass
from fdkernels.op.pyramid import Weights, accumulate_dtype, describe
from fdkernels.op.weights import weights_of
from kernel_launches import RecordedOps, recorded_calls

PAIRINGS = {"none": None, "shuffle": torch.tensor([1, 1, 0]), "pooled": torch.tensor([[0, 1], [2, 1]])}
DIFFERENTIATED = ["reference", "cpu"]


def weights_for_mask(features, mask, ignore_index=None, backend="reference") -> Weights:
    mask = mask if mask.dim() == features[0].dim() else mask.unsqueeze(1)
    sizes = [layer.shape[2:] for layer in features]
    return weights_of(mask, sizes, accumulate_dtype(features), "area", ignore_index, backend)


def options_of(convention, exchange: str, reduction: str = "mean", eps: float = 1e-3):
    return SumsCase((), (), 0, convention, exchange=exchange, reduction=reduction, eps=eps).options


def without_slopes(features, weights, pairing, options, backend: str) -> Tensor:
    """The losses of sums that autograd differentiates, as where slopes do not serve."""
    sums, masses = run_pass(Call(backend, describe(features)), features, weights, None)
    wide = reference.wide(sums), reference.wide(masses)
    return reference.losses_of(*wide, describe(features), options, pairing).to(sums.dtype)


@st.composite
def passes(draw: st.DrawFn):
    exchange = draw(st.sampled_from(oracles.EXCHANGES))
    case = draw(cases(min_batch=1 if exchange == "none" else 2, max_size=6))
    convention = draw(st.one_of(st.sampled_from(oracles.CONVENTIONS), FORMULAS))
    options = options_of(convention, exchange, draw(st.sampled_from(("mean", "sum"))))
    pairing = draw(partners(exchange, case.batch))
    wanted = draw(st.lists(st.booleans(), min_size=len(case.shapes), max_size=len(case.shapes)))
    return case, options, pairing, wanted, draw(st.booleans())


def test_slopes_give_the_gradients_of_the_sums(backend, device, for_all):
    """Under every formula, exchange and reduction, with and without tap, whichever layers ask."""

    @for_all(passes())
    def check(drawn) -> None:
        case, options, pairing, wanted, tap = drawn
        features = [F.requires_grad_(w) for F, w in zip(case.features(device), wanted, strict=True)]
        mask, pairing = case.mask(device).detach(), None if pairing is None else pairing.to(device)
        weights = weights_for_mask(features, mask, case.ignore_index)
        call = Call(backend, describe(features), options, tap=tap)
        loss, _, *aliases = run_pass(call, features, weights, pairing)
        assert len(aliases) == (len(features) if tap else 0)
        separate = without_slopes(features, weights, pairing, options, backend)
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


def test_gradients_of_losses_and_of_sums_are_added(backend, device):
    features = torch.randn(3, 4, 5, device=device, requires_grad=True)
    weights = weights_for_mask([features], torch.rand(3, 5, device=device))
    call = Call(backend, describe([features]), options_of("paper", "none"))
    losses, sums = run_pass(call, [features], weights, None)
    G, g = torch.randn_like(losses), torch.randn_like(sums)
    both, *alone = (
        torch.autograd.grad(outputs, features, grads, retain_graph=True)[0]
        for outputs, grads in (((losses, sums), (G, g)), (losses, G), (sums, g))
    )
    torch.testing.assert_close(both, sum(alone))


@pytest.mark.parametrize("backend", DIFFERENTIATED, indirect=True)
@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("convention", oracles.CONVENTIONS)
def test_gradcheck_and_gradgradcheck(backend, convention, exchange):
    options = options_of(convention, exchange)
    first = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    second = torch.randn(3, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    weights = weights_for_mask([first, second], torch.rand(3, 2, 2, dtype=torch.float64))

    def losses(*features: Tensor) -> Tensor:
        call = Call(backend, describe(features), options)
        return run_pass(call, features, weights, PAIRINGS[exchange])[0]

    assert gradcheck(losses, (first, second), fast_mode=True)
    assert gradgradcheck(losses, (first, second), fast_mode=True)


@pytest.mark.parametrize("backend", DIFFERENTIATED, indirect=True)
def test_gradgradcheck_beside_ignored_pixels_and_a_layer_that_asks_for_nothing(backend):
    mask = torch.rand(2, 3, 2, dtype=torch.float64)
    mask[:, 0] = -1
    fixed = torch.randn(2, 2, 3, 2, dtype=torch.float64)
    features = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    weights = weights_for_mask([fixed, features], mask, ignore_index=-1)
    options = options_of("region_mean", "none", "sum")
    call = Call(backend, describe([fixed, features]), options, tap=True)

    def outputs(features: Tensor) -> tuple[Tensor, Tensor]:
        loss, _, _, out = run_pass(call, [fixed, features], weights, None)
        return loss, out.square()

    assert gradcheck(outputs, (features,))
    assert gradgradcheck(outputs, (features,))


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("convention", ["region_mean", "released"])
def test_second_derivatives_are_those_of_the_formula(backend, device, convention, exchange, reduction, soft):
    """Products of a random vector with the second derivatives, against the oracle's in float64."""
    features = [torch.randn(s, dtype=torch.float64, device=device) for s in ((3, 2, 4, 2), (3, 3, 2, 2))]
    mask = torch.rand(3, 4, 2, dtype=torch.float64, device=device)
    mask[0, 0] = -1
    mask = mask if soft else torch.where(mask < 0, mask, (mask > 0.5).double())
    pairing = PAIRINGS[exchange]
    options = {
        "convention": convention, "exchange": exchange, "pairing": pairing, "reduction": reduction,
        "ignore_index": -1, "mask_resize": "area", "eps": 1e-2,
    }  # fmt: skip

    def products(function, inputs: list[Tensor]) -> list[Tensor]:
        loss = function(inputs)
        generator = torch.Generator().manual_seed(1)
        random = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (loss, *inputs)]
        G, *v = (x.to(loss.device) for x in random)
        first = torch.autograd.grad(loss, inputs, G, create_graph=True)
        along = sum((grad * by).sum() for grad, by in zip(first, v, strict=True))
        return [loss.detach(), *(grad.detach() for grad in first), *torch.autograd.grad(along, inputs)]

    def through_op(inputs: list[Tensor]) -> Tensor:
        moved = {**options, "pairing": None if pairing is None else pairing.to(device)}
        mask_now = inputs[2] if soft else mask
        return fdk.feature_discrepancy_loss(inputs[:2], mask_now, **moved, backend=backend)

    def through_oracle(inputs: list[Tensor]) -> Tensor:
        return oracles.loss(inputs[:2], inputs[2] if soft else mask.cpu(), **options)

    leaves = [*features, mask] if soft else features
    got = products(through_op, [x.clone().requires_grad_() for x in leaves])
    wanted = products(through_oracle, [x.cpu().clone().requires_grad_() for x in leaves])
    for value, truth in zip(got, wanted, strict=True):
        scale = truth.abs().max().item()
        torch.testing.assert_close(value.cpu(), truth, rtol=1e-8, atol=1e-9 * (1 + scale))


def test_a_backward_that_is_differentiated_gives_the_gradient_of_one_that_is_not(backend, device):
    features = [torch.randn(2, 3, s, s, device=device, requires_grad=True) for s in (4, 2)]
    loss = fdk.feature_discrepancy_loss(features, torch.rand(2, 4, 4, device=device), backend=backend)
    with recorded_calls(backend) as calls:
        plain = torch.autograd.grad(loss, features, retain_graph=True)
        assert calls.take() == ["gradient"]
        differentiable = torch.autograd.grad(loss, features, create_graph=True)
        assert calls.take() == ["gradient"]
    for one, other in zip(plain, differentiable, strict=True):
        assert other.requires_grad
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_plain_call_is_one_pass_forward_and_one_write_backward(backend, device, exchange, reduction):
    features = [torch.randn(3, 3, s, s, device=device, requires_grad=True) for s in (8, 4)]
    pairing = PAIRINGS[exchange]
    options = {
        "exchange": exchange,
        "pairing": None if pairing is None else pairing.to(device),
        "reduction": reduction,
    }
    mask = torch.rand(3, 8, 8, device=device)
    with recorded_calls(backend) as calls:
        loss = fdk.feature_discrepancy_loss(features, mask, **options, backend=backend)
        assert calls.take() == ["masks", "sums"]
        loss.sum().backward()
        assert calls.take() == ["gradient"]


@pytest.mark.parametrize("used", ["all", "some", "none"])
def test_a_tap_adds_what_arrives_in_the_same_pass(backend, device, used):
    features = [torch.randn(2, 3, s, s, device=device, requires_grad=True) for s in (8, 4)]
    with recorded_calls(backend) as calls:
        outs, loss = fdk.tap(features, torch.rand(2, 8, 8, device=device), backend=backend)
        assert calls.take() == ["masks", "sums"]
        through = {"all": outs, "some": outs[1:], "none": []}[used]
        torch.autograd.grad(loss + sum(out.square().sum() for out in through), features)
        ((name, arguments, _),) = calls.calls
    assert name == "gradient"
    upstream = list(arguments[3]) or [None, None]
    assert [grad is not None for grad in upstream] == [used == "all", used != "none"]


def test_a_soft_mask_that_asks_for_a_gradient_takes_one_more_pass_backward(backend, device):
    features = torch.randn(2, 3, 8, 8, device=device, requires_grad=True)
    mask = torch.rand(2, 8, 8, device=device, requires_grad=True)
    with recorded_calls(backend) as calls:
        loss = fdk.feature_discrepancy_loss(features, mask, backend=backend)
        assert calls.take() == ["sums"]  # torch resizes the mask
        loss.backward()
        assert sorted(calls.take()) == ["gradient", "mask_gradient"]


def test_layers_that_ask_for_nothing_are_not_written(backend, device):
    features = [torch.randn(2, C, 4, device=device) for C in (2, 3, 5)]
    features[1].requires_grad_()
    with recorded_calls(backend) as calls:
        mask = torch.rand(2, 4, device=device)
        fdk.feature_discrepancy_loss(features, mask, backend=backend).backward()
        ((_, arguments, grads),) = [call for call in calls.calls if call[0] == "gradient"]
    assert arguments[4].channels == (3,)
    assert len(grads) == 1


def test_under_a_dispatch_mode_the_same_work_is_seen_as_registered_ops(backend, device):
    features = [torch.randn(2, 3, s, s, device=device, requires_grad=True) for s in (8, 4)]
    mask = torch.rand(2, 8, 8, device=device) > 0.5
    with RecordedOps() as forward:
        loss = fdk.feature_discrepancy_loss(features, mask, backend=backend)
    with RecordedOps() as backward:
        loss.backward()
    assert forward.names == ["masks", "sums"]
    assert backward.names == ["gradient"]


def test_no_slopes_are_made_where_no_gradient_is_asked_for(backend, device):
    features = torch.randn(2, 3, 4, 4, device=device)
    mask = torch.rand(2, 4, 4, device=device)
    with recorded_calls(backend) as calls:
        fdk.feature_discrepancy_loss(features, mask, backend=backend)
        fdk.feature_discrepancy_loss(features.requires_grad_(), mask, backend=backend)
    made = [out.slopes is not None for name, _, out in calls.calls if name == "sums"]
    assert made == [False, True]


@pytest.mark.parametrize("road", ["direct", "op", "compiled"])
@pytest.mark.parametrize("eps", [1e-300, 1e-30, 0.1])
def test_options_reach_the_kernels_whole(backend, device, interpreted, road, eps):
    """ε beyond float32, by each way that leads to the kernels: D is 0 where both regions are alike."""
    if interpreted and road == "compiled":
        pytest.skip("tracing NumPy takes long and says nothing about kernels")
    features = torch.ones(2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]] * 2, device=device)

    def loss(features: Tensor, mask: Tensor) -> Tensor:
        return fdk.feature_discrepancy_loss(features, mask, convention="algorithm1", eps=eps, backend=backend)

    if road == "op":
        with RecordedOps() as ops:
            value = loss(features, mask)
        assert "sums" in ops.names
    elif road == "compiled":
        torch.compiler.reset()
        value = torch.compile(loss, backend="aot_eager", fullgraph=True)(features, mask)
    else:
        value = loss(features, mask)
    assert value.item() == pytest.approx(-0.5 * math.log(eps), rel=1e-15)


def test_what_forward_leaves_unwritten_and_backward_too(backend, device, nan_filled):
    features = [torch.randn(2, 5, 7, 3, device=device, requires_grad=True) for _ in range(2)]
    loss = fdk.feature_discrepancy_loss(features, torch.rand(2, 7, 3, device=device), backend=backend)
    assert loss.isfinite()
    for grad in torch.autograd.grad(loss, features):
        assert grad.isfinite().all()
