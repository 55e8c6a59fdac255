"""Experiments end to end on the tiny data set: tables, refusals, the same numbers however they are run."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fdkernels.segmentation.evaluation import evaluate
from fdkernels.segmentation.experiments.display import Board
from fdkernels.segmentation.experiments.engine import run_experiment
from fdkernels.segmentation.experiments.folder import taken
from fdkernels.segmentation.experiments.running import one_thread
from fdkernels.segmentation.fields import FieldError
from fdkernels.segmentation.runfiles import read_json, read_weights, write_json
from fdkernels.segmentation.train import train


def _table(folder):
    with (Path(folder) / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _assert_same(folder, config):
    """The same scores and results as the unbroken experiment of `config`."""
    assert (Path(folder) / "scores.csv").read_bytes() == (Path(config.output) / "scores.csv").read_bytes()
    results = [read_json(Path(one) / "summary.json")["results"] for one in (folder, config.output)]
    assert results[0] == results[1]


def test_every_test_image_of_every_run_has_a_row(ablation):
    config, _ = ablation
    rows = _table(config.output)
    places = list(dict.fromkeys((row["seed"], row["fold"], row["arm"]) for row in rows))
    assert places == [(s, f, arm) for s in "01" for f in "12" for arm in ("without", "with")]
    layers = [name for name in rows[0] if name.startswith("L_fd_")]
    assert [*rows[0]] == ["experiment", "arm", "seed", "fold", "patient", "sample", "dice", "iou", *layers]
    assert layers[0] == "L_fd_enc1"
    assert len(layers) == 9
    for seed, fold, arm in places:
        folder = Path(config.output) / "runs" / arm / f"seed{seed}" / f"fold{fold}"
        tested = [one["image"] for one in read_json(folder / "split.json")["test"]]
        assert [
            row["sample"] for row in rows if (row["seed"], row["fold"], row["arm"]) == (seed, fold, arm)
        ] == tested


def test_scores_are_those_of_evaluate(ablation):
    config, _ = ablation
    found = evaluate(Path(config.output) / "runs" / "with" / "seed1" / "fold2", phases=["active"]).samples
    rows = [
        row for row in _table(config.output) if (row["arm"], row["seed"], row["fold"]) == ("with", "1", "2")
    ]
    for row, one in zip(rows, found, strict=True):
        assert float(row["dice"]) == pytest.approx(one.scores["dice"])
        assert float(row["L_fd_dec1"]) == pytest.approx(one.layer_losses["dec1"], rel=1e-4)


@pytest.mark.parametrize("arm", ["without", "with"])
def test_an_arm_is_the_run_that_train_makes(ablation, tmp_path, arm):
    """The shared first phase changes nothing."""
    config, _ = ablation
    own = dataclasses.replace(config, output=str(tmp_path / "run"), fold=1, seed=1, fd_loss=arm == "with")
    with one_thread():
        train(own, progress=False)
    folder = Path(config.output) / "runs" / arm / "seed1" / "fold1"
    for phase in ("warm", "active"):
        ours, theirs = (read_weights(one / phase / "best.safetensors") for one in (folder, tmp_path / "run"))
        assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_differences_are_those_of_the_table(ablation):
    config, summary = ablation
    rows = _table(config.output)
    dice = {(row["arm"], row["seed"], row["sample"]): float(row["dice"]) for row in rows}
    gains = [value - dice[("without", *key[1:])] for key, value in dice.items() if key[0] == "with"]
    (one,) = (
        one for one in summary["results"]["comparisons"] if (one["set"], one["score"]) == ("all", "dice")
    )
    assert one["mean"] == pytest.approx(sum(gains) / len(gains))
    assert summary["results"]["samples"]["all"] == len({row["sample"] for row in rows})
    assert {(one["arm"], one["baseline"]) for one in summary["results"]["comparisons"]} == {
        ("with", "without")
    }


def test_the_summary_says_what_was_run(ablation):
    config, summary = ablation
    assert summary == read_json(Path(config.output) / "summary.json")
    assert summary["experiment"] == "ablation"
    assert summary["arms"] == ["without", "with"]
    assert (summary["seeds"], summary["folds"]) == ([0, 1], [1, 2])
    assert summary["state"] == {"finished": 12, "total": 12}
    assert len(summary["seconds"]) == 12
    assert {"torch", "fdkernels", "python", "scipy"} <= set(summary["versions"])
    assert summary["settings"]["epochs_warm"] == 2
    assert summary["results"]["features"]["with"]["enc1"]["norm"] > 0


def test_what_is_lost_is_made_again_to_the_same_numbers(ablation, tmp_path):
    """A run without its marker, one within its second phase, and tables that lag behind."""
    config, _ = ablation
    folder = tmp_path / "moved"
    shutil.copytree(config.output, folder)
    runs = folder / "runs"
    (runs / "without" / "seed0" / "fold1" / "scores.json").unlink()
    broken = runs / "with" / "seed1" / "fold2"
    for name in ("scores.json", "metrics.json", "active/result.json", "active/best.safetensors"):
        (broken / name).unlink()
    shutil.rmtree(runs / "with" / "seed1" / "fold1")
    (folder / "scores.csv").unlink()
    again = dataclasses.replace(config, output=str(folder))
    run_experiment("ablation", again, seeds=2, folds=2, jobs=1, resume=True, progress=False)
    _assert_same(folder, config)


def _command(config, *more):
    fields = ("data", "base_channels", "size", "batch_size", "epochs_warm", "epochs_active", "lr", "alpha_lr")
    options = [
        part for name in fields for part in ("--" + name.replace("_", "-"), str(getattr(config, name)))
    ]
    return [
        *(sys.executable, "-W", "ignore", "-m", "fdkernels", "experiment", "ablation", *options),
        *("--accelerator", "cpu", "--no-tensorboard", "--seeds", "2", "--folds", "2", *more),
    ]


def _children(process):
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [Path(f"/proc/{number}") for number in listed]


def _wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


ENDS = [
    pytest.param(signal.SIGKILL, -signal.SIGKILL, 1, id="SIGKILL"),
    pytest.param(signal.SIGINT, 130, 2, id="SIGINT"),
]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the children of a process from /proc")
@pytest.mark.parametrize(("number", "code", "jobs"), ENDS)
def test_ended_with_two_jobs_and_resumed_with_any(ablation, tmp_path, number, code, jobs):
    """The same numbers as the unbroken experiment in one process, and no process is left."""
    config, _ = ablation
    folder = tmp_path / "ended"
    process = subprocess.Popen(
        _command(config, "--output", str(folder), "--jobs", "2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
    )
    try:
        _wait_for(lambda: process.poll() is not None or any(folder.glob("runs/*/*/*/scores.json")))
        children = _children(process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, output
    assert children
    _wait_for(lambda: not any(map(_is_alive, children)), 20)
    if number != signal.SIGKILL:
        assert f"Continue with: fdkernels experiment ablation --output {folder} --resume" in output
    assert read_json(folder / "summary.json")["state"]["finished"] < 12
    again = dataclasses.replace(config, output=str(folder))
    run_experiment("ablation", again, seeds=2, folds=2, jobs=jobs, resume=True, progress=False)
    _assert_same(folder, config)


def _is_alive(process):
    """Whether it runs; a zombie has ended."""
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except OSError:
        return False


REFUSED = {
    "seeds": ({}, {"seeds": 3}, "seeds is 3, but the experiment in .* began with 2"),
    "folds": ({}, {"folds": 1}, "folds is 1, but the experiment in .* began with 2"),
    "lr": ({"lr": 0.5}, {}, "lr is 0.5, but the experiment in .* began with 0.01"),
    "exchange": ({"exchange": "shuffle"}, {}, "exchange is shuffle, but"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_setting_is_refused_by_its_name(ablation, case):
    config, _ = ablation
    changes, counts, message = REFUSED[case]
    with pytest.raises(FieldError, match=message):
        run_experiment(
            "ablation",
            dataclasses.replace(config, **changes),
            **{"seeds": 2, "folds": 2, **counts},
            jobs=1,
            resume=True,
            progress=False,
        )


def test_folders_that_hold_something_else_are_refused(ablation, tiny, tmp_path):
    config, _ = ablation
    with pytest.raises(ValueError, match="already holds something; go on with its experiment by --resume"):
        run_experiment("ablation", config, seeds=2, folds=2, jobs=1, progress=False)
    with pytest.raises(ValueError, match="holds experiment ablation, got alpha"):
        run_experiment("alpha", config, seeds=2, folds=2, jobs=1, resume=True, progress=False)
    empty = dataclasses.replace(tiny, output=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="holds no experiment to resume"):
        run_experiment("ablation", empty, jobs=1, resume=True, progress=False)


def test_two_experiments_on_one_folder_are_refused(tiny, tmp_path):
    own = dataclasses.replace(tiny, output=str(tmp_path))
    with taken(tmp_path), pytest.raises(ValueError, match="is in use by another experiment that runs now"):
        run_experiment("ablation", own, jobs=1, progress=False)


IMPOSSIBLE = {
    "fd_loss": ("ablation", {"fd_loss": False}, {}, "fd_loss is set for each arm by experiment ablation"),
    "alpha_rule": ("alpha", {"alpha_rule": "ramp"}, {}, "alpha_rule is set for each arm by experiment alpha"),
    "epochs": ("shift", {"epochs_warm": 0}, {}, "epochs_warm must be at least 1 in an experiment"),
    "devices": ("ablation", {"devices": "2"}, {}, "devices must be 1 in an experiment"),
    "novel": (
        "addition",
        {},
        {},
        "adds images of a second data set: novel_dataset and novel_data must name it",
    ),
    "folds": ("ablation", {}, {"folds": 6}, "folds must be an integer from 1 to 5, got 6"),
    "seeds": ("ablation", {}, {"seeds": 0}, "seeds must be an integer from 1 to 1000, got 0"),
    "samples": ("correlation", {}, {"folds": 1}, "needs at least 4 test images, got 2 in the folds"),
    "name": ("ablate", {}, {}, "experiment must be ablation, .* or mediation, got ablate"),
    "jobs": ("ablation", {}, {"jobs": 0}, "jobs must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_is_impossible_is_said_before_anything_is_trained(tiny, tmp_path, case):
    name, changes, counts, message = IMPOSSIBLE[case]
    own = dataclasses.replace(tiny, output=str(tmp_path / "out"), **changes)
    with pytest.raises(ValueError, match=message):
        run_experiment(name, own, **{"seeds": 1, "folds": 2, "jobs": 1, **counts}, progress=False)
    assert not (tmp_path / "out").exists()


def test_one_patient_is_noted_and_leaves_out_intervals(tiny, tmp_path, capsys):
    own = dataclasses.replace(tiny, output=str(tmp_path / "out"), epochs_warm=1, epochs_active=1)
    summary = run_experiment("ablation", own, seeds=1, folds=1, jobs=1)
    assert summary["notes"] == [
        "All test images are of one patient, so that there will be no intervals; raise --folds."
    ]
    captured = capsys.readouterr()
    assert summary["notes"][0] in captured.err
    assert "ablation: with, seed 0, fold 1 is finished, 3 of 3 runs" in captured.out
    assert all(one["interval"] is None for one in summary["results"]["comparisons"])


def test_files_that_are_gone_are_noticed_though_their_runs_are_finished(ablation, tmp_path):
    config, _ = ablation
    folder, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(config.output, folder)
    shutil.copytree(config.data, data)
    for path in data.glob("*/01_1.png"):
        path.unlink()
    own = dataclasses.replace(config, output=str(folder), data=str(data))
    with pytest.raises(ValueError, match=r"no longer splits as .*split\.json says"):
        run_experiment("ablation", own, seeds=2, folds=2, jobs=1, resume=True, progress=False)


def test_a_marker_that_is_no_marker_is_named(ablation, tmp_path):
    config, _ = ablation
    shutil.copytree(config.output, tmp_path / "out")
    marker = tmp_path / "out" / "runs" / "with" / "seed0" / "fold1" / "scores.json"
    write_json(marker, {"samples": [{"patient": "1"}], "seconds": {}})
    own = dataclasses.replace(config, output=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=re.escape(f"{marker} is not as a run of an experiment writes it")):
        run_experiment("ablation", own, seeds=2, folds=2, jobs=1, resume=True, progress=False)


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_fails_is_named(ablation, tmp_path, jobs):
    config, _ = ablation
    shutil.copytree(config.output, tmp_path / "out")
    damaged, other = (tmp_path / "out" / "runs" / "with" / "seed0" / f"fold{fold}" for fold in (1, 2))
    for path in (other / "scores.json", damaged / "scores.json", damaged / "active" / "result.json"):
        path.unlink()
    (damaged / "active" / "last.ckpt").write_bytes(b"no checkpoint")
    own = dataclasses.replace(config, output=str(tmp_path / "out"))
    with pytest.raises(RuntimeError, match=r"run with/seed0/fold1 failed: checkpoint .* is damaged"):
        run_experiment("ablation", own, seeds=2, folds=2, jobs=jobs, resume=True, progress=False)


def _shift(config, output, **options):
    config = dataclasses.replace(config, output=str(output))
    return run_experiment("shift", config, seeds=2, folds=2, progress=False, **options)


def test_what_another_experiment_has_trained_is_taken_from_there(ablation, tmp_path, monkeypatch):
    config, source_summary = ablation
    anew = _shift(config, tmp_path / "anew")
    assert anew["reused"] == {}
    trained = []
    monkeypatch.setattr(Board, "trained", lambda board, run, epochs: trained.append(run.key))
    taken_over = _shift(config, tmp_path / "taken", reuse=[config.output])
    assert trained == []
    _assert_same(tmp_path / "taken", dataclasses.replace(config, output=str(tmp_path / "anew")))
    source = Path(config.output) / "runs"
    assert taken_over["reused"] == {
        f"{arm}/seed{seed}/fold{fold}": str(source / of / f"seed{seed}" / f"fold{fold}")
        for arm, of in (("before", "first-phase"), ("after", "with"))
        for seed in (0, 1)
        for fold in (1, 2)
    }
    times = {key: seconds["training"] for key, seconds in source_summary["seconds"].items()}
    assert taken_over["seconds"]["after/seed1/fold2"]["training"] == times["with/seed1/fold2"]


@pytest.mark.parametrize("other", ["option", "version", "images", "first phase"])
def test_what_was_trained_otherwise_is_trained_anew(ablation, tmp_path, other):
    config, _ = ablation
    source = tmp_path / "source"
    shutil.copytree(config.output, source)
    for run in ("first-phase", "with"):
        folder = source / "runs" / run / "seed0" / "fold1"
        if other == "version":
            content = read_json(folder / "config.json")
            content["versions"]["torch"] = "2.0"
            write_json(folder / "config.json", content)
        elif other == "images":
            content = read_json(folder / "split.json")
            content["train"], content["validation"] = content["validation"], content["train"]
            write_json(folder / "split.json", content)
        elif other == "first phase":
            (folder / "warm" / "best.safetensors").write_bytes(b"another machine's")
    if other == "first phase":
        (source / "runs" / "first-phase" / "seed0" / "fold1" / "warm" / "result.json").unlink()
    options = dataclasses.replace(
        config, output=str(tmp_path / "shift"), lr=2e-2 if other == "option" else config.lr
    )
    summary = run_experiment("shift", options, seeds=1, folds=1, reuse=[source], progress=False)
    assert summary["reused"] == {}
    assert summary["state"] == {"finished": 2, "total": 2}


def test_an_exchange_decides_on_batches_where_the_loss_does_not_act_as_well(ablation, tmp_path):
    config, _ = ablation
    other = dataclasses.replace(config, output=str(tmp_path / "other"), exchange="shuffle")
    summary = run_experiment("ablation", other, seeds=1, folds=1, reuse=[config.output], progress=False)
    assert summary["reused"] == {}


def test_runs_in_which_the_loss_does_not_act_are_reused_however_alpha_would_move(ablation, tmp_path):
    config, _ = ablation
    other = dataclasses.replace(config, output=str(tmp_path / "other"), alpha_max=1e-3, alpha_lr=0.5)
    summary = run_experiment("ablation", other, seeds=1, folds=1, reuse=[config.output], progress=False)
    assert {key.split("/")[0] for key in summary["reused"]} == {"first-phase", "without"}
    result = read_json(tmp_path / "other" / "runs" / "with" / "seed0" / "fold1" / "active" / "result.json")
    assert max(result["final_alpha"].values()) == pytest.approx(1e-3)


def test_a_folder_to_reuse_must_hold_an_experiment(tiny, tmp_path):
    with pytest.raises(
        FieldError, match=r"reuse must name the folder of an experiment, got .* without summary\.json"
    ):
        _shift(tiny, tmp_path / "shift", reuse=[tmp_path])
    assert not (tmp_path / "shift" / "runs").exists()
