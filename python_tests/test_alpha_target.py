"""FeatureDiscrepancyLoss: the target that `None` finds, α within its bounds, and what a state dict keeps."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fdkernels as fdk
from fdkernels import alpha as alpha_module
from fdkernels.alpha import ALPHA_RULES, LONG_WARM_START
from fdkernels.criterion import TARGET_PASSES

MASK = torch.tensor([[1, 0]])


def layer(loss: float) -> Tensor:
    """Features [1, 1, 2] whose loss under MASK is `loss`: ((F_0 - F_1) / 2)² = exp(-loss)."""
    return torch.tensor([[[2 * math.exp(-loss / 2), 0.0]]], requires_grad=True)


def test_the_first_pass_sets_the_target_1_below_the_lowest_layer():
    crit = fdk.FeatureDiscrepancyLoss(3)
    assert crit.target is None
    assert "target=None" in repr(crit)
    crit([layer(2.0), layer(-5.0), layer(3.0)], MASK).backward()
    assert crit.target == pytest.approx(-6)
    assert "target=-6.0" in repr(crit)
    # The gradient of ascent is -(L - target).
    assert crit.alpha.grad.tolist() == pytest.approx([-8.0, -1.0, -9.0])


def test_the_target_follows_the_lowest_of_the_first_passes_and_then_stays():
    crit = fdk.FeatureDiscrepancyLoss(1, alpha_init=0.5)
    for loss in (2.0, 4.0, 1.0):
        crit([layer(loss)], MASK)
    assert crit.target == pytest.approx(0)
    for _ in range(TARGET_PASSES - 3):
        crit([layer(3.0)], MASK)
    crit([layer(-7.0)], MASK)
    assert crit.target == pytest.approx(0)


def test_a_number_fixes_the_target():
    crit = fdk.FeatureDiscrepancyLoss(1, target=0.25)
    crit([layer(-7.0)], MASK)
    assert crit.target == 0.25
    crit.target = -1
    assert crit.target == -1
    with pytest.raises(ValueError, match="target must be a finite number or None, got inf"):
        crit.target = math.inf


def test_passes_that_train_nothing_do_not_set_the_target():
    crit = fdk.FeatureDiscrepancyLoss(1, alpha_init=0.5, active=False)
    crit([layer(-3.0)], MASK)
    crit.activate()
    crit.eval()
    assert crit([layer(-3.0)], MASK).item() == pytest.approx(-1.5)
    crit.train()
    with torch.no_grad():
        assert crit([layer(-3.0)], MASK).item() == pytest.approx(-1.5)
    assert crit.target is None
    crit([layer(2.0)], MASK)
    assert crit.target == pytest.approx(1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_does_not_set_the_target(value):
    crit = fdk.FeatureDiscrepancyLoss(1)
    crit([torch.full((1, 1, 2), value)], MASK)
    assert crit.target is None
    crit([layer(2.0)], MASK)
    assert crit.target == pytest.approx(1)


def test_the_target_of_a_second_activation_is_found_anew():
    crit = fdk.FeatureDiscrepancyLoss(1)
    crit([layer(2.0)], MASK)
    crit.freeze()
    crit.activate()
    assert crit.target is None


def test_a_resumed_module_goes_on_finding_its_target():
    crit = fdk.FeatureDiscrepancyLoss(1)
    crit([layer(2.0)], MASK)
    other = fdk.FeatureDiscrepancyLoss(1)
    other.load_state_dict(crit.state_dict())
    assert other.target == pytest.approx(1)
    for loss in [1.0] + [2.0] * TARGET_PASSES + [-9.0]:
        for each in (crit, other):
            each([layer(loss)], MASK)
    assert crit.target == pytest.approx(0)
    assert other.target == crit.target
    fixed = fdk.FeatureDiscrepancyLoss(1, target=5)
    fixed.load_state_dict(crit.state_dict())
    assert fixed.target == 5


def test_passes_that_are_not_counted_do_not_set_the_target():
    crit = fdk.FeatureDiscrepancyLoss(1, alpha_init=0.5)
    crit([layer(2.0)], MASK)
    crit([layer(-7.0)], MASK, count_step=False)
    assert crit.target == pytest.approx(1)


def test_every_layer_of_a_network_with_batch_norm_gets_a_weight():
    """The README's own lines on a network whose losses are soon below 0."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(c, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for c in (1, 16, 16)
    ]
    model = nn.Sequential(*blocks, nn.Conv2d(16, 1, 1))
    crit = fdk.FeatureDiscrepancyLoss(3)
    optimizer = torch.optim.Adam([{"params": model.parameters()}, *crit.parameter_groups(lr=1e-2)])
    taps = fdk.FeatureTaps(model, ["0", "1", "2"])
    mask = (torch.rand(4, 1, 16, 16) > 0.5).float()
    images = mask + torch.rand(4, 1, 16, 16)
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(images), mask)
        (loss + crit(taps.features, mask)).backward()
        optimizer.step()
    assert crit.layer_losses.min() < 0
    assert crit.alpha.min() > 0.05


@pytest.mark.parametrize(("rule", "low", "high"), [("ascent", 0.0, 1.0), ("clipped", 0.0, 1.0)])
def test_alpha_is_within_its_bounds_whenever_it_is_read(rule, low, high):
    crit = fdk.FeatureDiscrepancyLoss(2, rule, alpha_init=0.5)
    (parameter,) = crit.parameters()
    for read in (
        lambda: crit.alpha,
        lambda: crit.state_dict()["alpha"],
        lambda: copy.deepcopy(crit).alpha,
        lambda: crit.eval().alpha,
    ):
        with torch.no_grad():
            parameter.copy_(torch.tensor([-2.0, 3.23]))
        read_alpha = read().detach().expand(2)
        assert low <= read_alpha.min().item() <= read_alpha.max().item() <= high


def test_evaluation_uses_alpha_within_its_bounds():
    crit = fdk.FeatureDiscrepancyLoss(1).eval()
    with torch.no_grad():
        next(crit.parameters()).fill_(3.0)
    assert crit([layer(2.0)], MASK).item() == pytest.approx(2)


@pytest.mark.parametrize("rule", ALPHA_RULES)
def test_the_state_is_made_of_tensors(rule):
    state = fdk.FeatureDiscrepancyLoss(2, rule).state_dict()
    assert state.keys() == {"alpha", "steps", "active", "alpha_target"}
    assert all(isinstance(value, Tensor) for value in state.values())


def test_safetensors_keeps_the_state():
    safetensors = pytest.importorskip("safetensors.torch")
    crit = fdk.FeatureDiscrepancyLoss(2, active=False)
    other = fdk.FeatureDiscrepancyLoss(2)
    other.load_state_dict(safetensors.load(safetensors.save(crit.state_dict())))
    assert not other.is_active


@pytest.mark.parametrize("active", [True, False])
def test_a_state_that_an_earlier_version_saved_still_loads(active):
    earlier = {
        "alpha": torch.tensor([0.25]),
        "steps": torch.tensor(7),
        "_extra_state": {"active": active},
    }
    outer = nn.ModuleDict({"crit": fdk.FeatureDiscrepancyLoss(1, target=-3, active=not active)})
    outer.load_state_dict({f"crit.{key}": value for key, value in earlier.items()})
    crit = outer["crit"]
    assert crit.is_active == active
    assert crit.alpha.requires_grad == active
    assert (crit.alpha.item(), crit.steps.item(), crit.target) == (0.25, 7, -3)


def test_copies_and_pickles_keep_alpha_and_phase():
    crit = fdk.FeatureDiscrepancyLoss(1, alpha_init=0.5, patience=1)
    crit([layer(2.0)], MASK)
    for other in (copy.deepcopy(crit), pickle.loads(pickle.dumps(crit))):
        assert (other.alpha.item(), other.target, other.is_active) == (0.5, crit.target, True)
    file = io.BytesIO()
    torch.save(crit, file)


def test_the_group_of_alpha_has_no_weight_decay():
    crit = fdk.FeatureDiscrepancyLoss(1, "descent", alpha_init=0.5)
    (group,) = crit.parameter_groups(lr=0.1)
    assert group == {"params": [crit.alpha], "lr": 0.1, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], weight_decay=0.1)
    optimizer.add_param_group(group)
    crit([layer(0.0)], MASK).backward()  # L = 0, so that decay alone would move α
    optimizer.step()
    assert crit.alpha.item() == pytest.approx(0.5, abs=1e-4)
    assert "lr" not in crit.parameter_groups()[0]
    assert fdk.FeatureDiscrepancyLoss(1, "ramp").parameter_groups() == []


def test_validation_without_gradients_does_not_advance_a_ramp():
    crit = fdk.FeatureDiscrepancyLoss(1, "ramp", ramp_steps=4)
    for _ in range(3):
        crit([layer(1.0)], MASK)
        with torch.no_grad():
            crit([layer(1.0)], MASK)
    assert crit.steps == 3
    assert crit.alpha.item() == 0.5


def test_a_long_warm_start_is_called_to_mind_once():
    crit = fdk.FeatureDiscrepancyLoss(1, active=False)
    crit._watch._frozen_passes = LONG_WARM_START - 1
    with pytest.warns(UserWarning, match=r"frozen \(active=False\) for 1000 training passes"):
        crit([layer(1.0)], MASK)
    crit([layer(1.0)], MASK)
    asked = fdk.FeatureDiscrepancyLoss(1)
    asked.freeze()
    for _ in range(3):
        asked([layer(1.0)], MASK)
    assert asked._watch._frozen_passes == 0


@pytest.mark.parametrize("rule", ALPHA_RULES)
def test_features_that_were_detached_are_noticed_once(rule):
    crit = fdk.FeatureDiscrepancyLoss(2, rule, patience=2, alpha_init=0.0 if rule == "ramp" else 0.5)

    def train(passes: int) -> None:
        for _ in range(passes):
            crit([layer(1.0), layer(1.0).detach()], MASK)
            with torch.no_grad():
                crit.alpha.add_(0.01)

    with pytest.warns(UserWarning, match=r"features\[1\] does not require a gradient"):
        train(3)
    train(9)  # a second warning would be an error here


@pytest.mark.parametrize("keeper", ["nothing", "group", "wrapped", "ramp", "one rank"])
def test_ranks_that_would_train_their_own_alpha_are_warned_of(monkeypatch, keeper):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1 if keeper == "one rank" else 2)
    crit = fdk.FeatureDiscrepancyLoss(1, "ramp" if keeper == "ramp" else "ascent")
    if keeper == "wrapped":
        wrapper = alpha_module.DistributedDataParallel
        monkeypatch.setattr(wrapper, "_active_ddp_module", object())
    if keeper == "group":
        crit._begin_step(crit.alpha, [layer(1.0)], crit.settings._replace(group=object()))
    elif keeper != "nothing":
        crit([layer(1.0)], MASK)
    else:
        with pytest.warns(UserWarning, match="2 ranks, and nothing keeps alpha the same on every rank"):
            crit([layer(1.0)], MASK)
        crit([layer(1.0)], MASK)


def test_an_averaged_copy_keeps_alpha_and_phase():
    crit = fdk.FeatureDiscrepancyLoss(1, alpha_init=0.5)
    average = torch.optim.swa_utils.AveragedModel(crit, use_buffers=True)
    for alpha in (0.2, 0.4):
        with torch.no_grad():
            crit.alpha.fill_(alpha)
        crit([layer(2.0)], MASK)
        average.update_parameters(crit)
    assert average.module.alpha.item() == pytest.approx(0.3)
    assert average.module.is_active
    assert crit.target == pytest.approx(1)
