from __future__ import annotations

import dataclasses
import io

from rich.console import Console

from fdkernels.segmentation.data import Split
from fdkernels.segmentation.experiments import display
from fdkernels.segmentation.experiments.display import Board
from fdkernels.segmentation.experiments.plan import Arm, PlannedRun
from fdkernels.segmentation.run_data import RunData


def _runs(config):
    data = RunData(Split((), (), ()))
    arms = [Arm("without", goes_on_from="first"), Arm("with", goes_on_from="first")]
    return [PlannedRun(arm, 0, fold, config, data, None) for fold in (1, 2) for arm in arms]


def test_the_time_left_is_what_the_epochs_of_this_sitting_tell(tiny, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    runs = _runs(tiny)  # of two epochs each
    text = io.StringIO()
    with Board("ablation", runs, {runs[0].key}, Console(file=text)) as board:
        assert board.times() == "0:00:00 gone, unknown left"
        clock[0] = 10.0
        board.trained(runs[1], 1)
        assert board.times() == "0:00:10 gone, 0:00:50 left"
        clock[0] = 20.0
        board.finished(runs[1])
        assert board.times() == "0:00:20 gone, 0:00:40 left"
    assert (
        "ablation: with, seed 0, fold 1 is finished, 2 of 4 runs, 0:00:20 gone, 0:00:40 left"
        in text.getvalue()
    )


def test_epochs_of_an_earlier_sitting_cost_no_time(tiny, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    runs = _runs(tiny)
    with Board("ablation", runs, (), Console(file=io.StringIO())) as board:
        clock[0] = 10.0
        board.trained(runs[0], 2)  # its first epoch was trained before
        assert board.times() == "0:00:10 gone, 0:01:00 left"


def test_what_another_experiment_has_trained_is_no_time_left(tiny, monkeypatch, tmp_path):
    clock = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    runs = _runs(tiny)
    runs[2:] = [dataclasses.replace(run, trained=tmp_path) for run in runs[2:]]
    with Board("ablation", runs, (), Console(file=io.StringIO())) as board:
        clock[0] = 10.0
        board.trained(runs[0], 1)
        assert board.times() == "0:00:10 gone, 0:00:30 left"
        board.finished(runs[2])
        assert board.times() == "0:00:10 gone, 0:00:30 left"
        board.trained(runs[3], 1)  # it went on from other weights, so it is trained anew
        assert board.times() == "0:00:10 gone, 0:00:20 left"


def test_a_terminal_shows_arms_and_the_run_at_work(tiny):
    text = io.StringIO()
    runs = _runs(tiny)
    with Board("ablation", runs, (), Console(file=text, force_terminal=True, width=100)) as board:
        board.trained(runs[0], 1)
    for part in ("ablation, epochs", "0 of 2 runs", "0:00:00 gone", "without, seed 0, fold 1: epoch 1 of 2"):
        assert part in text.getvalue()
