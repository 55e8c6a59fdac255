from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("lightning", reason="the extra train is not installed")

from benchmarks import record, training
from benchmarks.results import read_files
from benchmarks.training_report import training_section
from fdkernels.segmentation.presets import TABLE_2

SMALL = ["--device=cpu", "--size=16", "--batch-size=2", "--base-channels=2", "--steps=2"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(record, "header", lambda arguments, device: {"command": " ".join(arguments)})


def test_each_pair_is_measured_without_and_with_the_loss(tmp_path):
    file = tmp_path / "training.json"
    presets = ["udiat-cmunet", "tnbc-nucleisegnet"]
    assert training.main([f"--output={file}", *SMALL, "--presets", *presets]) == 0
    entries = json.loads(file.read_text())["measurements"]
    assert [entry["preset"] for entry in entries] == presets
    for entry in entries:
        for name in ("without_loss", "with_loss"):
            seconds = entry[name]["seconds_per_step"]
            assert 0 < seconds["first_quartile"] <= seconds["median"] <= seconds["third_quartile"]
            assert entry[name]["peak_bytes"] is None or entry[name]["peak_bytes"] > 0
            assert math.isfinite(entry[name]["loss"])
        medians = [entry[name]["seconds_per_step"]["median"] for name in ("with_loss", "without_loss")]
        assert entry["ratio_of_medians"] == pytest.approx(medians[0] / medians[1])


def test_the_report_reads_what_is_written(monkeypatch, tmp_path):
    head = {"commit": {"id": "abc"}, "when": "now", "command": "made-up", "quick": False}
    machine = {"cpu_model": "Made-up CPU", "versions": {"fdkernels": "0.1.0", "torch": "9.9"}}
    monkeypatch.setattr(record, "header", lambda arguments, device: {"machine": machine, **head})
    assert training.main([f"--output={tmp_path / 'x.json'}", *SMALL, "--presets", "tnbc-nucleisegnet"]) == 0
    text = training_section(read_files(tmp_path))
    assert "- Timed steps: 2; width: 2 base channels\n" in text
    assert "| nucleisegnet | tnbc | 2x3x16x16 | 32-true | " in text


def test_real_sizes_are_the_presets():
    arguments = training._parse(["--output=x", "--device=cuda"])
    assert arguments.presets == [f"{dataset}-{model}" for dataset, model in TABLE_2]
    config = training.config_of("us-tnbc-cmunet", arguments, fd_loss=True)
    assert (config.size, config.batch_size, config.base_channels) == (512, 4, None)


def test_the_loss_acts_in_the_steps_that_are_measured():
    arguments = training._parse(["--output=x", *SMALL])
    losses = [
        training.train_steps(training.config_of("tnbc-unet", arguments, fd_loss), 3)["loss"]
        for fd_loss in (False, True)
    ]
    assert losses[0] != losses[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_real_sizes_are_refused_with_a_sentence(tmp_path, capsys):
    assert training.main([f"--output={tmp_path / 'x.json'}"]) == 0
    assert "There is no GPU" in capsys.readouterr().out
    assert not (tmp_path / "x.json").exists()
