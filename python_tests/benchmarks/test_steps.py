from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from benchmarks import cases, steps, training_step
from benchmarks.calls import MIN_ROUNDS
from benchmarks.steps import disagreement
from benchmarks.training_step import OP, PLAIN, WITHOUT, Step, StepCase
from fdkernels import models

TINY_STEPS = ("--batch=2", "--side=32", "--base-channels=2", "--budget=0")
TINY = StepCase("unet", "eager", "cpu", batch=2, side=32, base_channels=2)


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
    assert entry["seconds"].keys() | entry["left_out"].keys() == set(training_step.CONTENDERS)
    over_without = {f"{name}/without" for name in entry["seconds"] if name != WITHOUT}
    assert entry["ratios"].keys() == over_without | {"free/norms"}
    assert entry["rounds"] == 3 < MIN_ROUNDS
    assert (entry["images"], entry["base_channels"]) == ("2x3x32x32", 2)


def test_a_wrong_contender_is_named_and_nothing_is_timed(monkeypatch):
    right = training_step.plain
    monkeypatch.setattr(training_step, "plain", lambda *inputs: 1.1 * right(*inputs))
    with pytest.raises(AssertionError, match="loss of op is wrong for unet eager cpu, so nothing is timed"):
        steps.run_case(TINY, budget=0)


def test_half_precision_is_held_to_wider_bounds():
    case = replace(TINY, mode="amp")
    errors = steps.check(case, {name: Step(case, name) for name in (WITHOUT, OP, PLAIN)})
    assert errors.keys() == {OP}
    assert errors[OP]["gradient"] < steps.BOUNDS[True][1]


def test_a_step_that_does_not_compile_is_left_out_with_the_reason(monkeypatch):
    def refuse(self):
        if self.contender == OP:
            raise TorchDynamoException("made-up reason\nand where")
        return torch.zeros((), requires_grad=True)

    monkeypatch.setattr(Step, "backward", refuse)
    chosen = {name: Step(TINY, name) for name in (WITHOUT, OP, PLAIN)}
    assert steps.leave_out_uncompilable(chosen) == {OP: "torch.compile does not take it: made-up reason"}
    assert list(chosen) == [WITHOUT, PLAIN]


@pytest.mark.slow
def test_a_compiled_step_agrees():
    case = replace(TINY, mode="compiled")
    errors = steps.check(case, {name: Step(case, name) for name in (WITHOUT, OP, PLAIN)})
    assert errors[OP]["loss"] < 1e-4
    torch.compiler.reset()


def test_a_wrong_contender_is_the_exit_status_and_no_entry(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cases, "header", lambda arguments, device: {})
    monkeypatch.setattr(training_step, "plain", lambda *inputs: torch.zeros(()))
    options = ["--device=cpu", "--networks", "unet", "--modes", "eager", *TINY_STEPS]
    assert steps.main([f"--output={tmp_path / 'steps.json'}", *options]) == 1
    assert "loss of op is wrong for unet eager cpu" in capsys.readouterr().out
    assert not (tmp_path / "steps.json").exists()


def test_each_preset_is_trained_without_and_with_the_loss(monkeypatch, tmp_path):
    pytest.importorskip("lightning", reason="the extra train is not installed")
    monkeypatch.setattr(cases, "header", lambda arguments, device: {})
    file, presets = tmp_path / "training.json", ["udiat-unet", "tnbc-unet"]
    options = ["--device=cpu", "--steps=2", *TINY_STEPS]
    assert steps.main([f"--output={file}", *options, "--presets", *presets]) == 0
    content = json.loads(file.read_text())
    assert content["kind"] == "training"
    assert [entry["preset"] for entry in content["measurements"]] == presets
    for entry in content["measurements"]:
        assert entry["seconds"].keys() == {WITHOUT, OP}
        assert entry["ratios"].keys() == {"op/without"}
        assert (entry["images"], entry["rounds"], entry["mode"]) == ("2x3x32x32", 2, "eager")


def test_real_sizes_are_the_presets(monkeypatch):
    pytest.importorskip("lightning", reason="the extra train is not installed")
    configs = []
    monkeypatch.setattr(steps, "train_steps", lambda config, count: configs.append(config) or [1.0, 1.0])
    entry = steps.run_preset("us-tnbc-cmunet", "amp channels_last compiled", "cpu", 2, {"size": None})
    assert [config.fd_loss for config in configs] == [False, True]
    config = configs[0]
    assert (config.precision, config.channels_last, config.compile) == ("bf16-mixed", True, True)
    assert (entry["network"], entry["images"], entry["base_channels"]) == ("cmunet", "4x3x512x512", None)


def test_without_names_the_presets_are_those_of_table_2():
    presets = pytest.importorskip("fdkernels.segmentation.presets", reason="the extra train is not installed")
    arguments = steps._parse(["--output=x", "--device=cuda", "--presets"])
    chosen = [name for name, mode, _ in steps.jobs(arguments) if mode == "eager"]
    assert chosen == [f"{dataset}-{model}" for dataset, model in presets.TABLE_2]


def test_without_a_gpu_real_trainings_are_refused_with_a_sentence(tmp_path, capsys):
    assert steps.main([f"--output={tmp_path / 'x.json'}", "--device=cpu", "--presets"]) == 0
    assert "There is no GPU" in capsys.readouterr().out
    assert not (tmp_path / "x.json").exists()
