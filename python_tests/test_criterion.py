"""FeatureDiscrepancyLoss: how α moves under each rule, phases, state, and the warning when it is stuck."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor

import fdkernels as fdk
from fdkernels.alpha import ALPHA_RULES

MASK = torch.tensor([[1, 0]])
TRAINED = ("ascent", "descent", "clipped")


def layer(loss: float) -> Tensor:
    """Features [1, 1, 2] whose loss under MASK is `loss`: ((F_0 - F_1) / 2)² = exp(-loss)."""
    return torch.tensor([[[2 * math.exp(-loss / 2), 0.0]]], requires_grad=True)


def steps(
    crit: fdk.FeatureDiscrepancyLoss, losses: list[float] | list[list[float]], lr: float = 0.1
) -> list[float]:
    """α of the first layer after each step of plain gradient descent on the losses, one or one a layer."""
    optimizer = torch.optim.SGD(crit.parameters(), lr=lr)
    path = []
    for loss in losses:
        optimizer.zero_grad()
        of_layers = loss if isinstance(loss, list) else [loss] * crit.alpha.shape[0]
        crit([layer(loss) for loss in of_layers], MASK).backward()
        optimizer.step()
        path.append(crit.alpha[0].item())
    return path


def test_the_value_is_the_weighted_sum_of_the_layers():
    crit = fdk.FeatureDiscrepancyLoss(2, alpha_init=0.5)
    features = [layer(1.0), layer(3.0)]
    assert crit(features, MASK).item() == pytest.approx(0.5 * 1 + 0.5 * 3)
    assert crit.layer_losses.tolist() == pytest.approx([1.0, 3.0])
    assert not crit.layer_losses.requires_grad


def test_the_gradient_of_the_features_is_that_of_the_weighted_op():
    crit = fdk.FeatureDiscrepancyLoss(2, alpha_init=0.3)
    layers = [torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 2, 8, requires_grad=True)]
    mask = torch.rand(2, 8)
    grads = torch.autograd.grad(crit(layers, mask), layers)
    loss = fdk.feature_discrepancy_loss(layers, mask, layer_weights=[0.3, 0.3])
    for grad, wanted in zip(grads, torch.autograd.grad(loss, layers), strict=True):
        torch.testing.assert_close(grad, wanted)


def test_ascent_by_hand():
    # α ← α + 0.1·L within [0, 1]
    crit = fdk.FeatureDiscrepancyLoss(1, target=0)
    path = steps(crit, [2.0, 3.0, -1.0, 4.0, 6.0, -12.0])
    assert path == pytest.approx([0.2, 0.5, 0.4, 0.8, 1.0, 0.0], abs=1e-6)


def test_ascent_to_a_target_by_hand():
    # α ← α + 0.1·(L - 1) within [0, 0.3]
    crit = fdk.FeatureDiscrepancyLoss(1, target=1.0, alpha_max=0.3)
    assert steps(crit, [3.0, 1.0, 3.0, 0.0]) == pytest.approx([0.2, 0.2, 0.3, 0.2], abs=1e-6)


def test_descent_by_hand():
    # α ← α - 0.1·L without bounds
    crit = fdk.FeatureDiscrepancyLoss(1, "descent", alpha_init=0.1)
    assert steps(crit, [2.0, 8.0, -30.0]) == pytest.approx([-0.1, -0.9, 2.1], abs=1e-5)


def test_clipped_by_hand():
    # α ← α - 0.1·L within [0, 1]: where L > 0 it never leaves 0
    crit = fdk.FeatureDiscrepancyLoss(1, "clipped")
    assert steps(crit, [2.0, 3.0, -4.0, -9.0, 2.0]) == pytest.approx([0.0, 0.0, 0.4, 1.0, 0.8], abs=1e-6)


def test_ramp_by_hand():
    crit = fdk.FeatureDiscrepancyLoss(1, "ramp", ramp_steps=4, alpha_max=2.0)
    values = [crit([layer(3.0)], MASK).item() for _ in range(6)]
    # α = 0, ½, 1, 1½, 2, 2
    assert values == pytest.approx([0.0, 1.5, 3.0, 4.5, 6.0, 6.0])
    assert list(crit.parameters()) == []
    assert "alpha" in dict(crit.named_buffers())


@pytest.mark.parametrize("rule", TRAINED)
def test_each_layer_has_its_own_alpha(rule):
    crit = fdk.FeatureDiscrepancyLoss(2, rule, alpha_init=0.5, target=0)
    crit([layer(1.0), layer(-2.0)], MASK).backward()
    sign = -1 if rule == "ascent" else 1
    assert crit.alpha.grad.tolist() == pytest.approx([sign * 1.0, sign * -2.0])


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_ascent_grows_under_any_optimizer(optimizer):
    crit = fdk.FeatureDiscrepancyLoss(3)
    updates = optimizer(crit.parameters(), lr=0.01)
    for _ in range(3):
        updates.zero_grad()
        crit([layer(2.0)] * 3, MASK).backward()
        updates.step()
    assert (crit.alpha > 0.01).all()


@pytest.mark.parametrize(("rule", "low", "high"), [("ascent", 0.0, 0.7), ("clipped", 0.0, 1.0)])
def test_a_pass_never_uses_alpha_beyond_its_bounds(rule, low, high):
    crit = fdk.FeatureDiscrepancyLoss(2, rule, alpha_max=0.7)
    with torch.no_grad():
        crit.alpha.copy_(torch.tensor([-3.0, 5.0]))
    value = crit([layer(1.0), layer(2.0)], MASK)
    assert value.item() == pytest.approx(low * 1 + high * 2)
    assert crit.alpha.tolist() == pytest.approx([low, high])


@pytest.mark.parametrize("rule", ALPHA_RULES)
def test_evaluation_moves_nothing(rule):
    crit = fdk.FeatureDiscrepancyLoss(1, rule, ramp_steps=2).eval()
    before = crit.alpha.clone()
    for _ in range(60):
        crit([layer(1.0)], MASK)
    assert torch.equal(crit.alpha, before)
    crit.train()
    crit([layer(1.0)], MASK)
    assert crit.alpha.item() == 0  # the first training pass of a ramp


@pytest.mark.parametrize("rule", ALPHA_RULES)
def test_warm_start(rule):
    crit = fdk.FeatureDiscrepancyLoss(
        2, rule, alpha_init=0.0 if rule == "ramp" else 0.25, ramp_steps=4, active=False
    )
    features = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(2)]
    mask = torch.rand(2, 4)
    assert not crit.is_active
    loss = crit(features, mask)
    assert loss.item() == 0
    assert not loss.requires_grad
    assert crit.layer_losses.shape == (2,)
    assert not crit.alpha.requires_grad
    assert "frozen" in repr(crit)
    (loss + features[0].sum()).backward()  # adds to another loss as if it were not there
    crit.activate()
    assert crit.is_active
    if rule == "ramp":
        assert [crit(features, mask) is not None and crit.alpha[0].item() for _ in range(3)] == [0, 0.25, 0.5]
    else:
        assert crit.alpha.tolist() == [0.25, 0.25]
        assert crit.alpha.requires_grad
        crit(features, mask).backward()
        assert crit.alpha.grad.abs().min() > 0


def test_an_optimizer_made_in_the_warm_start_trains_alpha_after_it():
    crit = fdk.FeatureDiscrepancyLoss(1, active=False, target=0)
    optimizer = torch.optim.SGD(crit.parameters(), lr=0.1)
    crit([layer(2.0)], MASK)
    optimizer.step()
    crit.activate()
    crit([layer(2.0)], MASK).backward()
    optimizer.step()
    assert crit.alpha.item() == pytest.approx(0.2)


def test_activating_twice_does_not_set_alpha_back():
    crit = fdk.FeatureDiscrepancyLoss(1, target=0)
    steps(crit, [2.0])
    crit.activate()
    assert crit.alpha.item() == pytest.approx(0.2)


def test_freezing_again_stops_alpha_at_zero():
    crit = fdk.FeatureDiscrepancyLoss(1)
    steps(crit, [2.0])
    crit.freeze()
    assert crit.alpha.item() == 0
    assert crit([layer(2.0)], MASK).item() == 0


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("rule", ALPHA_RULES)
def test_state_dict_round_trip(rule, active):
    crit = fdk.FeatureDiscrepancyLoss(1, rule, ramp_steps=10)
    for _ in range(4):
        crit([layer(-2.0)], MASK)
    if rule != "ramp":
        steps(crit, [-2.0, 1.0])
    if not active:
        crit.freeze()
    file = io.BytesIO()
    torch.save(crit.state_dict(), file)
    file.seek(0)
    other = fdk.FeatureDiscrepancyLoss(1, rule, ramp_steps=10, active=not active)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.alpha, crit.alpha)
    assert other.is_active == active
    assert other.alpha.requires_grad == (active and rule != "ramp")
    values = [c([layer(-2.0)], MASK).item() for c in (crit, other)]
    assert values[0] == values[1]
    assert torch.equal(other.alpha, crit.alpha)


@pytest.mark.parametrize("rule", ALPHA_RULES)
def test_a_copy_goes_its_own_way(rule):
    crit = fdk.FeatureDiscrepancyLoss(1, rule, ramp_steps=2)
    crit([layer(-1.0)], MASK)
    other = copy.deepcopy(crit)
    with torch.no_grad():
        other.alpha.fill_(0.5)
    assert crit.alpha.item() == 0


@pytest.mark.parametrize("rule", ALPHA_RULES)
def test_gradients_accumulate_over_two_passes_before_one_backward(rule):
    crit = fdk.FeatureDiscrepancyLoss(1, rule, ramp_steps=2, target=0)
    with torch.no_grad():
        crit.alpha.fill_(1.5)  # so that the first pass changes α in place
    features = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.rand(2, 4)
    first = crit([features], mask)
    alpha_of_first = crit.alpha.item()
    with torch.no_grad():
        crit.alpha.add_(0.7)  # as an optimizer step or the next pass may
    second = crit([features], mask)
    alpha_of_second = crit.alpha.item()
    (first + second).backward()
    plain = fdk.feature_discrepancy_loss(features, mask)
    (wanted,) = torch.autograd.grad(plain, features)
    torch.testing.assert_close(features.grad, (alpha_of_first + alpha_of_second) * wanted)
    if rule != "ramp":
        sign = -1 if rule == "ascent" else 1
        assert crit.alpha.grad.item() == pytest.approx(sign * 2 * plain.item())


def test_an_alpha_that_is_in_no_optimizer_is_noticed_once():
    crit = fdk.FeatureDiscrepancyLoss(2, alpha_init=0.5, patience=3)
    for _ in range(3):
        crit([layer(1.0)] * 2, MASK)
    with pytest.warns(UserWarning, match="alpha has not been stepped in 3 training passes"):
        crit([layer(1.0)] * 2, MASK)
    for _ in range(10):
        crit.alpha.max()  # reading α is no step
        crit([layer(1.0)] * 2, MASK)  # a second warning would be an error here


def test_a_layer_that_the_rule_holds_at_0_is_named_with_its_loss_and_the_target():
    crit = fdk.FeatureDiscrepancyLoss(3, target=0.5, patience=2)
    expected = (
        r"alpha has stayed at 0 for 2 training passes in 2 of 3 layers.*alpha\[1\], whose loss -1 is not "
        r"above target=0.5.*alpha\[2\], whose loss 0.25 is not"
    )
    with pytest.warns(UserWarning, match=expected) as said:
        steps(crit, [[1.0, -1.0, 0.25]] * 9, lr=0.01)
    assert len(said) == 1


def test_an_alpha_that_comes_back_to_0_under_ascent_has_done_its_work():
    crit = fdk.FeatureDiscrepancyLoss(1, target=0, patience=2)
    steps(crit, [1.0] * 5 + [-9.0] * 9)  # a warning would be an error here
    assert crit.alpha.item() == 0


def test_alphas_that_all_reach_their_bound_are_noticed_once():
    crit = fdk.FeatureDiscrepancyLoss(2, alpha_max=0.5, patience=2)
    with pytest.warns(UserWarning, match="every alpha has stayed at a bound of .* raise alpha_max") as said:
        steps(crit, [9.0] * 12)
    assert len(said) == 1


def test_clipped_where_the_loss_is_positive_is_noticed():
    crit = fdk.FeatureDiscrepancyLoss(1, "clipped", patience=2)
    with pytest.warns(UserWarning, match="'clipped' never leaves 0"):
        steps(crit, [1.0] * 5)


@pytest.mark.parametrize(
    ("crit", "value", "match"),
    [
        (fdk.FeatureDiscrepancyLoss(2, alpha_max=0.05, patience=3), 9.0, "every alpha has stayed at a bound"),
        (fdk.FeatureDiscrepancyLoss(2, "clipped", patience=3), 1.0, "'clipped' never leaves 0"),
    ],
    ids=["ascent", "clipped"],
)
def test_a_step_that_counts_no_change_is_noticed_at_the_bounds(crit, value, match):
    """Fused optimizers write parameters without a new version of the tensor."""
    crit = copy.deepcopy(crit)
    optimizer = torch.optim.Adam(crit.parameter_groups(lr=0.02), fused=True)

    def train() -> None:
        for _ in range(12):
            optimizer.zero_grad()
            crit([layer(value)] * 2, MASK).backward()
            optimizer.step()
            crit.alpha.max()  # reading α projects it before the next pass

    with pytest.warns(UserWarning, match=match) as said:
        train()
    assert len(said) == 1


@pytest.mark.parametrize(
    "crit",
    [
        fdk.FeatureDiscrepancyLoss(1, patience=2),
        fdk.FeatureDiscrepancyLoss(1, "descent", patience=2),
        fdk.FeatureDiscrepancyLoss(1, "clipped", patience=2, alpha_init=0.9),
        fdk.FeatureDiscrepancyLoss(1, "ramp", patience=2, ramp_steps=3),
        fdk.FeatureDiscrepancyLoss(1, patience=2, active=False),
        fdk.FeatureDiscrepancyLoss(1, "clipped", patience=2, active=False),
    ],
    ids=["ascent", "descent", "clipped", "ramp", "frozen ascent", "frozen clipped"],
)
def test_there_is_no_warning_where_alpha_moves_or_is_frozen(crit):
    crit = copy.deepcopy(crit)
    parameters = [p for p in crit.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01) if parameters else None
    for _ in range(9):
        loss = crit([layer(1.0)], MASK)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_exchange_arguments_go_through():
    crit = fdk.FeatureDiscrepancyLoss(1, alpha_init=1.0, exchange="shuffle")
    features, mask = torch.randn(4, 3, 5), torch.rand(4, 5)
    got = crit([features], mask, pairing=[1, 2, 3, 0])
    wanted = fdk.feature_discrepancy_loss(features, mask, exchange="shuffle", pairing=[1, 2, 3, 0])
    torch.testing.assert_close(got, wanted)
    seeded = [crit([features], mask, generator=torch.Generator().manual_seed(1)).item() for _ in range(2)]
    assert seeded[0] == seeded[1]
    pooled = fdk.FeatureDiscrepancyLoss(1, alpha_init=1.0, exchange="pooled")
    assert pooled([features], mask, domains=[0, 1, 0, 1]).isfinite()


def test_one_call_may_leave_out_or_change_the_exchange():
    crit = fdk.FeatureDiscrepancyLoss(1, alpha_init=1.0, exchange="pooled")
    features, mask = torch.randn(4, 3, 5), torch.rand(4, 5)
    direct = fdk.feature_discrepancy_loss(features, mask)
    torch.testing.assert_close(crit([features], mask, exchange="none"), direct)
    assert crit([features[:1]], mask[:1], exchange="none").isfinite()  # a batch of one cannot be paired
    pairing = [1, 2, 3, 0]
    shuffled = fdk.feature_discrepancy_loss(features, mask, exchange="shuffle", pairing=pairing)
    torch.testing.assert_close(crit([features], mask, exchange="shuffle", pairing=pairing), shuffled)
    # The module's own is as before.
    assert crit.exchange == "pooled"
    with pytest.raises(ValueError, match="domains"):
        crit([features], mask)


def test_an_unknown_exchange_of_one_call_is_refused():
    with pytest.raises(ValueError, match=r"exchange must be one of .*got 'swap'"):
        fdk.FeatureDiscrepancyLoss(1)([layer(1.0)], MASK, exchange="swap")


@pytest.mark.parametrize("rule", ALPHA_RULES)
def test_a_pass_that_is_not_counted_moves_nothing_and_gives_the_same(rule):
    crit = fdk.FeatureDiscrepancyLoss(1, rule, ramp_steps=4, patience=2)
    features = layer(1.0).requires_grad_()
    crit([features], MASK)
    with torch.no_grad():
        crit.alpha.fill_(0.5)
    before = crit.alpha.detach().clone()
    loss = crit([features], MASK, count_step=False)
    assert loss.item() == pytest.approx(0.5)
    assert torch.equal(crit.alpha, before)
    assert crit.steps == 1
    loss.backward()  # the gradient reaches features, and α unless it is ramped
    assert features.grad.abs().max() > 0
    assert rule == "ramp" or crit.alpha.grad.item() == pytest.approx(-1 if rule == "ascent" else 1)


def test_parts_of_an_accumulated_step_are_one_step_of_a_ramp():
    crit = fdk.FeatureDiscrepancyLoss(1, "ramp", ramp_steps=2)
    for _ in range(3):
        for part in range(4):
            crit([layer(1.0)], MASK, count_step=part == 0)
    assert crit.steps == 3
    assert crit.alpha.item() == 1


def test_passes_that_are_not_counted_do_not_make_alpha_stuck():
    crit = fdk.FeatureDiscrepancyLoss(1, patience=2)  # α is in no optimizer
    crit([layer(1.0)], MASK)
    for _ in range(9):
        crit([layer(1.0)], MASK, count_step=False)  # a warning would be an error here


def test_settings_go_through():
    crit = fdk.FeatureDiscrepancyLoss(
        1,
        alpha_init=1.0,
        convention="algorithm1",
        mask_resize="max",
        ignore_index=9,
        eps=0.1,
        reduction="sum",
    )
    features, mask = torch.randn(3, 2, 3), torch.tensor([[0, 1, 0, 9, 1, 1]] * 3)
    wanted = fdk.feature_discrepancy_loss(
        features,
        mask,
        convention="algorithm1",
        mask_resize="max",
        ignore_index=9,
        eps=0.1,
        reduction="sum",
    )
    torch.testing.assert_close(crit(features, mask), wanted)


def test_one_layer_may_be_a_tensor():
    crit = fdk.FeatureDiscrepancyLoss(1, alpha_init=1.0)
    assert crit(layer(2.0), MASK).item() == pytest.approx(2.0)


def test_float64_features_give_a_float64_loss():
    crit = fdk.FeatureDiscrepancyLoss(1, alpha_init=1.0)
    assert crit(layer(2.0).double(), MASK).dtype == torch.float64


def test_print_shows_the_settings():
    text = repr(fdk.FeatureDiscrepancyLoss(9, "clipped", convention="lemma7", exchange="shuffle"))
    assert "num_layers=9, alpha_rule='clipped', active, convention='lemma7', exchange='shuffle'" in text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
        ({"num_layers": 2.0}, TypeError, "num_layers must be an integer, got float"),
        ({"num_layers": True}, TypeError, "num_layers must be an integer, got bool"),
        ({"alpha_rule": "up"}, ValueError, "alpha_rule must be one of 'ascent', .*got 'up'"),
        ({"alpha_init": -0.1}, ValueError, r"alpha_init must be within \[0.0, 1.0\] .*got -0.1"),
        ({"alpha_init": 2.0}, ValueError, r"alpha_init must be within \[0.0, 1.0\] .*got 2.0"),
        ({"alpha_init": float("nan")}, ValueError, "alpha_init must be within .*got nan"),
        ({"alpha_max": 0.0}, ValueError, "alpha_max must be positive, got 0.0"),
        ({"alpha_max": float("nan")}, ValueError, "alpha_max must be positive, got nan"),
        ({"target": float("nan")}, ValueError, "target must be .*got nan"),
        ({"ramp_steps": 0}, ValueError, "ramp_steps must be at least 1, got 0"),
        ({"patience": 0}, ValueError, "patience must be at least 1, got 0"),
        ({"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'sum', got 'none'"),
        ({"convention": "papers"}, ValueError, "convention must be one of"),
        ({"exchange": "swap"}, ValueError, "exchange must be one of"),
        ({"mask_resize": "cubic"}, ValueError, "mask_resize must be one of"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0"),
    ],
    ids=lambda value: f"{next(iter(value))}" if isinstance(value, dict) else "",
)
def test_wrong_settings_are_refused_when_it_is_made(arguments, error, message):
    with pytest.raises(error, match=message):
        fdk.FeatureDiscrepancyLoss(**{"num_layers": 1, **arguments})


def test_another_number_of_layers_is_refused():
    crit = fdk.FeatureDiscrepancyLoss(2)
    with pytest.raises(ValueError, match="features must have 2 layers, one for each alpha, got 1"):
        crit([layer(1.0)], MASK)
