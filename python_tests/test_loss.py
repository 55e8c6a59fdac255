"""The op: every backend against float64 truth, and what holds for any features and masks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fdkernels as fdk
import oracles
from bands import widest
from cases import Case, calls, cases

PAIRINGS = {
    "none": None,
    "shuffle": torch.tensor([1, 2, 0]),
    "pooled": torch.tensor([[0, 1], [2, 1]]),
}


def upstream_for(case: Case):
    def upstream(loss: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(case.seed + 2)
        return torch.randn(loss.shape, generator=generator)

    return upstream


def check_call(case: Case, options: dict[str, Any], backend: str, device: torch.device, ulps: float) -> None:
    """Loss and gradients of one call against the truth, in the device's memory."""
    features, mask = case.features(device), case.mask(device)
    there = {
        name: value.detach().to(device).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for name, value in options.items()
    }
    loss = fdk.feature_discrepancy_loss(features, mask, aspect="any", **there, backend=backend)
    weights = there["layer_weights"]
    inputs = [*features]
    inputs += [mask] if mask.requires_grad else []
    inputs += [weights] if weights is not None and weights.requires_grad else []
    upstream = upstream_for(case)(loss).to(loss)
    grads = torch.autograd.grad(loss, inputs, upstream, allow_unused=True, materialize_grads=True)
    assert [grad.dtype for grad in grads] == [value.dtype for value in inputs]

    def compare(truth: oracles.Truth) -> None:
        oracles.assert_within(loss, truth.loss, truth.loss_band, "loss")
        for i, (grad, wanted, band) in enumerate(zip(grads, truth.grads, truth.bands, strict=True)):
            # A weight of several entries adds up their gradients in its own dtype.
            roundings = 4.0 if inputs[i] is weights else ulps
            oracles.assert_within(grad, wanted, band, f"gradient of input {i}", roundings)

    truth = oracles.truth(features, mask, upstream_for(case), **options)
    try:
        compare(truth)
    except AssertionError:  # where regions cancel, the few moves of the truth need not find the worst
        compare(widest(truth, features, mask, upstream_for(case), **options))


@pytest.mark.usefixtures("nan_filled")
def test_loss_and_gradients_are_those_of_the_formula(backend, device, ulps, for_all):
    @for_all(calls(max_size=7), max_examples=60)
    def check(call: tuple[Case, dict[str, Any]]) -> None:
        case, options = call
        how = options["mask_resize"] or ("max" if options["convention"] == "released" else "area")
        assume(how != "max" or not case.has_ties)
        check_call(case, options, backend, device, ulps)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("convention", oracles.CONVENTIONS)
def test_every_convention_and_exchange(backend, device, ulps, convention, exchange):
    case = Case(
        ((3, 4, 6, 6), (3, 5, 3, 3)), (3, 1, 6, 6), layouts=("channels_last", "contiguous"), mask_kind="soft"
    )
    options = {
        "convention": convention,
        "exchange": exchange,
        "pairing": PAIRINGS[exchange],
        "layer_weights": torch.tensor([0.3, 1.7], requires_grad=True),
    }
    check_call(case, options, backend, device, ulps)


@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("convention", oracles.CONVENTIONS)
@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_gradcheck_and_gradgradcheck(backend, convention, exchange):
    layers = [torch.randn(3, 2, 2, 2, dtype=torch.float64), torch.randn(3, 1, 1, 2, dtype=torch.float64)]
    layers = [layer.requires_grad_() for layer in layers]
    mask = torch.rand(3, 2, 2, dtype=torch.float64).clamp(0.01, 0.99).requires_grad_()
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)

    def loss(mask: Tensor, weights: Tensor, *layers: Tensor) -> Tensor:
        return fdk.feature_discrepancy_loss(
            layers,
            mask,
            convention=convention,
            exchange=exchange,
            pairing=PAIRINGS[exchange],
            layer_weights=weights,
            eps=1e-3,
            backend=backend,
        )

    assert gradcheck(loss, (mask, weights, *layers), fast_mode=True)
    assert gradgradcheck(loss, (mask, weights, *layers), fast_mode=True)


@given(cases(dtypes=(torch.float64,)), st.sampled_from([0.25, 3.0, 100.0]))
def test_scaling_features_shifts_the_loss(case: Case, a: float):
    features, mask = case.features(), case.mask()

    def entries(layers, **options) -> Tensor:
        return fdk.feature_discrepancy_loss(
            layers, mask, aspect="any", ignore_index=case.ignore_index, reduction="none", eps=0.0, **options
        )

    scaled = [a * F for F in features]
    for convention, shift in (("paper", 2), ("algorithm1", 1), ("region_mean", 2), ("definition4", 2)):
        plain, moved = entries(features, convention=convention), entries(scaled, convention=convention)
        left_out = plain == 0
        # Regions that are equal but for rounding have a loss that rounding decides.
        counted = ~left_out & (plain < 30) & (moved < 30)
        wanted = plain - shift * math.log(a)
        torch.testing.assert_close(moved[counted], wanted[counted], rtol=1e-7, atol=1e-7)
        assert (moved[left_out] == 0).all()


@pytest.mark.parametrize("convention", oracles.CONVENTIONS)
def test_an_identity_pairing_doubles_the_loss(backend, device, convention):
    features, mask = torch.randn(3, 4, 5, 5, device=device), torch.rand(3, 5, 5, device=device)
    options = {"convention": convention, "reduction": "none", "backend": backend}
    plain = fdk.feature_discrepancy_loss(features, mask, **options)
    pairing = torch.arange(3, device=device)
    both = fdk.feature_discrepancy_loss(features, mask, exchange="shuffle", pairing=pairing, **options)
    torch.testing.assert_close(both, 2 * plain)


@given(cases(min_batch=2), st.randoms(use_true_random=False), st.sampled_from(oracles.CONVENTIONS[:5]))
def test_permuting_the_batch_permutes_the_entries(case: Case, random, convention: str):
    order = list(range(case.batch))
    random.shuffle(order)
    features, mask = [F.detach().double() for F in case.features()], case.mask().detach()
    options = {
        "convention": convention,
        "reduction": "none",
        "ignore_index": case.ignore_index,
        "aspect": "any",
    }
    plain = fdk.feature_discrepancy_loss(features, mask, eps=1e-6, **options)
    moved = fdk.feature_discrepancy_loss([F[order] for F in features], mask[order], eps=1e-6, **options)
    torch.testing.assert_close(plain[order], moved, rtol=1e-9, atol=1e-9)


@given(calls(dtypes=(torch.float64,)))
def test_a_list_of_layers_gives_what_single_calls_give(call: tuple[Case, dict[str, Any]]):
    case, options = call
    features, mask = case.features(), case.mask().detach()
    options["aspect"] = "any"
    weights = options.pop("layer_weights")
    reduction = options.pop("reduction")
    together = fdk.feature_discrepancy_loss(
        features, mask, layer_weights=weights, reduction=reduction, **options
    )
    alone = [fdk.feature_discrepancy_loss(layer, mask, reduction=reduction, **options) for layer in features]
    if weights is not None:
        alone = [weight * loss for weight, loss in zip(weights, alone, strict=True)]
    if reduction == "none":
        join = torch.cat if options["convention"] == "released" or len(alone) == 1 else torch.stack
        wanted = join(alone, dim=0 if join is torch.cat else 1)
    else:
        wanted = torch.stack(alone).sum()
        if weights is None and reduction == "mean":
            wanted = wanted / len(alone)
    torch.testing.assert_close(together, wanted, rtol=1e-6, atol=1e-9)


@given(cases(), st.sampled_from([torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64]))
def test_a_hard_mask_means_the_same_in_every_dtype(case: Case, dtype: torch.dtype):
    mask = case.mask().detach() == 1
    features = case.features()
    as_bool = fdk.feature_discrepancy_loss(features, mask, aspect="any", reduction="none")
    as_other = fdk.feature_discrepancy_loss(features, mask.to(dtype), aspect="any", reduction="none")
    torch.testing.assert_close(as_bool, as_other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("convention", oracles.CONVENTIONS)
def test_bad_features_reach_the_loss(backend, device, convention, bad, exchange):
    features = torch.randn(3, 2, 4, 4, device=device)
    features[1, 0, 2, 2] = bad
    mask = torch.rand(3, 4, 4, device=device) > 0.5
    options = {"convention": convention, "exchange": exchange, "backend": backend}
    pairing = PAIRINGS[exchange]
    pairing = None if pairing is None else pairing.to(device)
    loss = fdk.feature_discrepancy_loss(features, mask, pairing=pairing, **options)
    assert not loss.isfinite()
    if exchange == "none" and convention != "released":
        entries = fdk.feature_discrepancy_loss(features, mask, reduction="none", **options)
        assert entries.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("convention", oracles.CONVENTIONS)
def test_what_ignored_pixels_hold_has_no_effect(backend, device, convention):
    clean = torch.randn(2, 3, 4, 4, device=device)
    mask = torch.randint(0, 2, (2, 8, 8), device=device)
    mask[:, :4, 2:4] = 255  # the cells (0, 1) and (1, 1) of the layer
    dirty = clean.clone()
    dirty[..., 0, 1] = float("nan")
    dirty[..., 1, 1] = float("inf")
    dirty.requires_grad_()
    options = {"convention": convention, "ignore_index": 255, "backend": backend}
    loss = fdk.feature_discrepancy_loss(dirty, mask, **options)
    assert torch.equal(loss.detach(), fdk.feature_discrepancy_loss(clean, mask, **options))
    (grad,) = torch.autograd.grad(loss, dirty)
    assert grad.isfinite().all()
    assert grad[..., :2, 1].abs().max() == 0


@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
def test_samples_left_out_do_not_count_and_get_no_gradient(backend, device, exchange):
    features = torch.randn(4, 3, 4, 4, device=device)
    mask = torch.randint(0, 2, (4, 4, 4), device=device)
    mask[1] = 255
    pairing = {"shuffle": [2, 3, 3, 0], "pooled": [[0, 2], [3, 0], [1, 3]]}.get(exchange)
    kept = [0, 2, 3]
    pairing_of_kept = {"shuffle": [1, 2, 0], "pooled": [[0, 1], [2, 0]]}.get(exchange)
    options = {"exchange": exchange, "ignore_index": 255, "backend": backend}
    features.requires_grad_()
    loss = fdk.feature_discrepancy_loss(features, mask, pairing=pairing, **options)
    others = features.detach()[kept].requires_grad_()
    wanted = fdk.feature_discrepancy_loss(others, mask[kept], pairing=pairing_of_kept, **options)
    torch.testing.assert_close(loss, wanted)
    (grad,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(grad[kept], torch.autograd.grad(wanted, others)[0])
    assert grad[1].abs().max() == 0


@pytest.mark.parametrize("empty", ["foreground", "background"])
def test_an_empty_region_is_left_out_by_region_mean_alone(backend, device, empty):
    features = torch.randn(3, 2, 4, 4, device=device, requires_grad=True)
    mask = torch.randint(0, 2, (3, 4, 4), device=device)
    mask[1] = 0 if empty == "foreground" else 1
    for convention in oracles.CONVENTIONS[:5]:
        entries = fdk.feature_discrepancy_loss(
            features, mask, convention=convention, reduction="none", backend=backend
        )
        (grad,) = torch.autograd.grad(entries.sum(), features)
        if convention == "region_mean":
            assert entries[1] == 0
            assert grad[1].abs().max() == 0
            mean = fdk.feature_discrepancy_loss(features, mask, convention=convention, backend=backend)
            torch.testing.assert_close(mean, entries.sum() / 2)
        elif convention != "lemma7":  # where f or b is 0, its D is 1 and its loss 0
            assert entries[1] != 0
    one = (features[1] if empty == "background" else -features[1]).mean((1, 2))
    wanted = -one.square().sum().log()
    paper = fdk.feature_discrepancy_loss(features, mask, reduction="none", backend=backend)
    torch.testing.assert_close(paper[1], wanted)


@pytest.mark.parametrize("convention", oracles.CONVENTIONS)
def test_a_call_in_which_nothing_counts_gives_zero_loss_and_gradient(backend, device, convention):
    features = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    mask = torch.full((2, 4, 4), 9, device=device)
    loss = fdk.feature_discrepancy_loss(
        features, mask, convention=convention, ignore_index=9, backend=backend
    )
    assert loss.item() == 0
    assert torch.autograd.grad(loss, features)[0].abs().max() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_zero_batch(backend, device, reduction):
    layers = [torch.randn(0, c, 4, 4, device=device, requires_grad=True) for c in (2, 3)]
    mask = torch.zeros(0, 4, 4, device=device)
    loss = fdk.feature_discrepancy_loss(layers, mask, reduction=reduction, backend=backend)
    assert loss.shape == ((0, 2) if reduction == "none" else ())
    assert loss.sum().item() == 0
    for grad, layer in zip(torch.autograd.grad(loss.sum(), layers), layers, strict=True):
        assert grad.shape == layer.shape


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_one_pixel_by_hand(backend, device, rank):
    features = torch.tensor([[3.0, -1.0]], device=device).reshape(1, 2, *[1] * rank).requires_grad_()
    mask = torch.full((1, *[1] * rank), 0.75, device=device)
    loss = fdk.feature_discrepancy_loss(features, mask, eps=0.0, backend=backend)
    # f - b = ¾F - ¼F = (1.5, -0.5), D = 2.5; ∂L/∂F = -2·(f - b)·½ / D
    assert loss.item() == pytest.approx(-math.log(2.5))
    (grad,) = torch.autograd.grad(loss, features)
    assert grad.flatten().tolist() == pytest.approx([-0.6, 0.2])


@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("convention", ["paper", "lemma7", "released"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_number_of_a_pass_is_that_of_weighted_layers(
    backend, device, layers, reduction, convention, exchange
):
    """Without weights a pass adds up the layers itself, with them torch does."""
    torch.manual_seed(2)
    features = [
        torch.randn(3, 4, 6 - i, 5, dtype=torch.float64, device=device).requires_grad_()
        for i in range(layers)
    ]
    mask = (torch.rand(3, 1, 6, 5, device=device) > 0.6).float()
    each = 1 / layers if reduction == "mean" else 1.0
    weights = torch.full((layers,), each, dtype=torch.float64, device=device)
    pairing = PAIRINGS[exchange]
    options = {"convention": convention, "exchange": exchange, "eps": 1e-3, "reduction": reduction}
    options |= {"pairing": None if pairing is None else pairing.to(device), "aspect": "any"}

    def derivatives(layer_weights: Tensor | None) -> list[Tensor]:
        loss = fdk.feature_discrepancy_loss(
            features, mask, layer_weights=layer_weights, backend=backend, **options
        )
        plain = torch.autograd.grad(3 * loss, features, retain_graph=True)
        first = torch.autograd.grad(3 * loss, features, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), features)
        return [loss.detach(), *plain, *(grad.detach() for grad in first), *second]

    for found, expected in zip(derivatives(None), derivatives(weights), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
