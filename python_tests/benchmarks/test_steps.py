from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from benchmarks import step_contenders, steps
from benchmarks.step_contenders import OP, PLAIN, WITHOUT, Step, StepCase, disagreement, unavailable
from benchmarks.timing import MIN_ROUNDS
from fdkernels import models

TINY = StepCase("unet", "eager", "cpu", batch=2, side=16, base_channels=2)


@pytest.mark.parametrize("network", models.names())
def test_the_op_and_the_plain_loss_train_a_network_alike(network):
    case = replace(TINY, network=network, mode="channels_last")
    loss, gradient = disagreement(Step(case, OP).outcome(), Step(case, PLAIN).outcome())
    assert loss < 1e-5
    assert gradient < 1e-3


def test_the_loss_is_what_makes_the_step_another():
    loss, gradient = disagreement(Step(TINY, OP).outcome(), Step(TINY, WITHOUT).outcome())
    assert loss > 0.01
    assert gradient > 0.01


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the profiler, about what it cannot trace here
def test_an_entry_has_all_contenders_or_the_reason(monkeypatch):
    monkeypatch.setattr(steps, "MIN_ROUNDS", 3)
    entry = steps.run_case(TINY, budget=0)
    assert entry["seconds"].keys() | entry["left_out"].keys() == set(step_contenders.CONTENDERS)
    assert entry["ratios"].keys() == {f"{name}/without" for name in entry["seconds"] if name != WITHOUT}
    assert entry["rounds"] == 3 < MIN_ROUNDS
    assert entry["parameters"] == sum(p.numel() for p in models.create("unet", base_channels=2).parameters())


def test_a_wrong_contender_is_named_and_nothing_is_timed(monkeypatch):
    right = step_contenders.plain
    monkeypatch.setattr(step_contenders, "plain", lambda *inputs: 1.1 * right(*inputs))
    with pytest.raises(AssertionError, match="loss of op is wrong for unet eager cpu, so nothing is timed"):
        steps.run_case(TINY, budget=0)


def test_half_precision_is_held_to_wider_bounds():
    case = replace(TINY, mode="amp")
    errors = steps.check(case, {name: Step(case, name) for name in (WITHOUT, OP, PLAIN)})
    assert errors.keys() == {OP}
    assert errors[OP]["gradient"] < steps.BOUNDS[True][1]


def test_a_contender_of_a_later_version_is_left_out_with_the_reason(monkeypatch):
    class OldTaps:
        def __init__(self, model, names):
            raise NotImplementedError

    monkeypatch.setattr(step_contenders, "FeatureTaps", OldTaps)
    assert unavailable("tap") == "this version has no FeatureTaps(fused=True)"
    assert unavailable(OP) is None


def test_a_step_that_does_not_compile_is_left_out_with_the_reason(monkeypatch):
    def refuse(self):
        if self.contender == OP:
            raise TorchDynamoException("made-up reason\nand where")
        return torch.zeros((), requires_grad=True)

    monkeypatch.setattr(Step, "backward", refuse)
    chosen = {name: Step(TINY, name) for name in (WITHOUT, OP, PLAIN)}
    assert steps._leave_out_uncompilable(chosen) == {OP: "torch.compile does not take it: made-up reason"}
    assert list(chosen) == [WITHOUT, PLAIN]


@pytest.mark.slow
def test_a_compiled_step_agrees():
    case = replace(TINY, mode="compiled")
    errors = steps.check(case, {name: Step(case, name) for name in (WITHOUT, OP, PLAIN)})
    assert errors[OP]["loss"] < 1e-4
    torch.compiler.reset()
