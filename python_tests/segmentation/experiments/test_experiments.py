"""Each experiment on the tiny data set: what its results hold."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdkernels.alpha import ALPHA_RULES
from fdkernels.commands.experiment import Name
from fdkernels.conventions import CONVENTIONS
from fdkernels.models.blocks import TAP_NAMES
from fdkernels.segmentation.experiments import addition, conventions
from fdkernels.segmentation.experiments.engine import run_experiment
from fdkernels.segmentation.experiments.qualitative import GREEN, OPACITY, correction_picture
from fdkernels.segmentation.experiments.registry import EXPERIMENTS
from fdkernels.segmentation.experiments.tables import tables
from fdkernels.segmentation.logs import read_rows
from fdkernels.segmentation.module import SegmentationModule
from fdkernels.segmentation.runfiles import read_json
from tiny_data import make_tiny


def _run(name, config, folder, **counts):
    own = dataclasses.replace(config, output=str(folder))
    summary = run_experiment(name, own, **{"seeds": 1, "folds": 2, **counts}, jobs=1, progress=False)
    # As the command ends: whatever an experiment adds to its comparisons, they can be shown.
    compared = {(one["arm"], one["baseline"]) for one in summary["results"].get("comparisons", [])}
    assert len(tables(summary)) == len(compared)
    return summary


def test_the_command_knows_every_experiment():
    assert {name.value for name in Name} == set(EXPERIMENTS)


def test_correlation_and_shift_compare_both_phases_of_one_run(tiny, tmp_path):
    found = _run("correlation", tiny, tmp_path / "correlation")
    assert found["arms"] == ["before", "after"]
    for arm in found["arms"]:
        assert list(found["results"]["correlation"][arm]) == list(TAP_NAMES)
        assert found["results"]["correlation"][arm]["enc1"]["samples"] == 4
    shift = _run("shift", tiny, tmp_path / "shift")
    assert (tmp_path / "shift" / "scores.csv").read_text().replace("shift", "") == (
        tmp_path / "correlation" / "scores.csv"
    ).read_text().replace("correlation", "")
    results = shift["results"]
    with (tmp_path / "shift" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    means = {
        arm: np.mean([float(row["L_fd_enc2"]) for row in rows if row["arm"] == arm]) for arm in shift["arms"]
    }
    assert results["discrepancy_loss"]["enc2"]["before"]["mean"] == pytest.approx(means["before"])
    assert results["discrepancy_loss"]["enc2"]["shift"]["mean"] == pytest.approx(
        means["after"] - means["before"]
    )
    assert set(results["features"]) == {"before", "after"}


def test_alpha_has_a_curve_for_each_rule(tiny, tmp_path):
    results = _run("alpha", tiny, tmp_path, folds=1)["results"]
    assert list(results["history"]) == list(ALPHA_RULES)
    for rule in ALPHA_RULES:
        curve = results["history"][rule]["enc1"]
        assert curve["phase"] == ["warm", "warm", "active", "active"]
        assert curve["epoch"] == [1, 2, 1, 2]
        assert curve["alpha"][:2] == [0, 0]
        last = read_json(tmp_path / "runs" / rule / "seed0" / "fold1" / "active" / "result.json")[
            "final_alpha"
        ]
        assert results["final"][rule]["alpha"]["enc1"]["mean"] == pytest.approx(last["enc1"])
        assert curve["alpha"][-1] == pytest.approx(last["enc1"])
        assert results["final"][rule]["strongest"] == max(last, key=last.get)
    # All rules go on from one first phase.
    starts = {tuple(one["enc1"]["discrepancy_loss"][:2]) for one in results["history"].values()}
    assert len(starts) == 1


def test_arms_take_equal_steps_where_an_exchange_drops_a_last_batch_of_one(tiny, tmp_path):
    """Of six training images in batches of five one is left over, which the exchange cannot pair."""
    own = dataclasses.replace(tiny, exchange="shuffle", batch_size=5, epochs_active=1)
    _run("ablation", own, tmp_path, folds=1)
    for arm in ("without", "with"):
        folder = tmp_path / "runs" / arm / "seed0" / "fold1"
        assert len(read_json(folder / "split.json")["train"]) == 6
        (row,) = read_rows(folder / "active" / "logs")
        assert row["step"] == "0"


def test_a_second_phase_that_does_not_stay_finite_is_named_and_left_out(tiny, tmp_path, monkeypatch):
    step = SegmentationModule.training_step

    def diverging(self, batch, batch_idx):
        if self.criterion.is_active and self.criterion.alpha_rule == "descent":
            batch = {**batch, "image": batch["image"] * float("nan")}
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SegmentationModule, "training_step", diverging)
    found = _run("alpha", tiny, tmp_path, folds=1)
    assert list(found["failed"]) == ["descent/seed0/fold1"]
    assert "the training loss became nan in epoch 1" in found["failed"]["descent/seed0/fold1"]
    assert list(found["results"]["final"]) == ["ascent", "clipped", "ramp"]
    assert "descent" not in (tmp_path / "scores.csv").read_text()


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    novel = make_tiny("monuseg", tmp_path_factory.mktemp("monuseg"), images=12)
    return dataclasses.replace(
        tiny, novel_dataset="monuseg", novel_data=str(novel), epochs_warm=1, epochs_active=1
    )


def test_images_are_added_in_batches_of_the_paper(pair):
    assert addition.numbers(pair, 33) == [0, 10, 20, 30, 33]
    assert addition.numbers(pair, 30) == [0, 10, 20, 30]
    assert addition.numbers(dataclasses.replace(pair, novel_images=15), 33) == [0, 10, 15]
    ultrasound = dataclasses.replace(pair, dataset="us-tnbc", novel_dataset="udiat")
    assert addition.numbers(ultrasound, 40) == [0, 15, 30, 40]


def test_addition_compares_three_methods_on_the_base(pair, tmp_path):
    found = _run("addition", dataclasses.replace(pair, novel_images=4), tmp_path, folds=1)
    assert found["arms"] == ["none+0", "fd+0", "none+4", "fd+4", "fd_exchange+4"]
    curves = found["results"]["curves"]
    assert [[point["images"] for point in curves[method]] for method in addition.METHODS] == [[0, 4]] * 3
    # Without an image to exchange with, L_fd alone is the start of both curves.
    assert curves["fd_exchange"][0] == curves["fd"][0]
    splits = {
        arm: read_json(tmp_path / "runs" / arm / "seed0" / "fold1" / "split.json") for arm in found["arms"]
    }
    assert "novel" not in splits["none+0"]
    assert {arm: len(one["novel"]) for arm, one in splits.items() if "novel" in one} == dict.fromkeys(
        ["none+4", "fd+4", "fd_exchange+4"], 4
    )
    assert len({str(one["test"]) for one in splits.values()}) == 1


def test_conventions_vary_one_thing_at_a_time(tiny):
    arms = conventions.arms(dataclasses.replace(tiny, convention="lemma7"), 0)
    names = [arm.name for arm in arms if arm.scored]
    assert names == [
        "none",
        *(f"{name}-ascent" for name in CONVENTIONS),
        *(f"lemma7-{rule}" for rule in ALPHA_RULES if rule != "ascent"),
    ]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_conventions_are_compared_with_none(tiny, tmp_path):
    found = _run("conventions", dataclasses.replace(tiny, epochs_warm=1, epochs_active=1), tmp_path)
    comparisons = found["results"]["comparisons"]
    assert {one["baseline"] for one in comparisons} == {"none"}
    assert len(comparisons) == (len(found["arms"]) - 1) * 3 * 2


def test_bound_writes_a_row_an_image_and_layer(tiny, tmp_path):
    results = _run("bound", tiny, tmp_path)["results"]
    with (tmp_path / "bound.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * len(TAP_NAMES)  # arms, test images, layers
    for lemma in ("lemma5", "lemma7"):
        for arm in ("before", "after"):
            one = results["lemmas"][lemma][arm]["enc1"]
            mine = [row for row in rows if (row["arm"], row["layer"]) == (arm, "enc1")]
            assert one["samples"] == 4
            assert one["holds"] == sum(row[f"{lemma}_holds"] == "true" for row in mine)
            assert one["holds"] + sum(one["fails"].values()) == 4
    # FD is that of the convention of the same name: -log FD, up to its eps.
    own = dataclasses.replace(tiny, convention="lemma7", epochs_warm=1, epochs_active=1)
    under = _run("bound", own, tmp_path / "lemma7", folds=1)
    assert under["settings"]["convention"] == "lemma7"
    with (tmp_path / "lemma7" / "bound.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert float(row["lemma5_loss"]) == pytest.approx(float(row["lemma7_loss"]), rel=1e-3, abs=1e-3)


def _pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def test_qualitative_draws_the_worst_first(tiny, tmp_path):
    results = _run("qualitative", tiny, tmp_path)["results"]
    means = [sum(one["dice"].values()) for one in results["shown"]]
    assert means == sorted(means)
    assert len(means) == 4
    first = results["shown"][0]
    for what, path in first["files"].items():
        file = tmp_path / path
        if what.endswith("_array"):
            assert np.load(file).ndim == 2
        else:
            assert _pixels(file).shape[:2] == (36, 40)
    truth, predicted = (_pixels(tmp_path / first["files"][what]) > 0 for what in ("truth", "with"))
    dice = 2 * (truth & predicted).sum() / (truth.sum() + predicted.sum())
    assert dice == pytest.approx(first["dice"]["with"], abs=0.1)  # scored at 32x32


def test_corrections_are_green_and_errors_that_stay_are_not():
    truth = np.array([[True, True, False, False]])
    before = np.array([[False, True, True, True]])
    after = np.array([[True, False, False, True]])
    picture = correction_picture(np.zeros((1, 4, 3)), before, after, truth)
    green = (1 - OPACITY) * 0.45 + OPACITY * np.array(GREEN)
    assert [np.allclose(pixel, green) for pixel in picture[0]] == [True, False, True, False]


def test_mediation_needs_no_data(tiny, tmp_path):
    own = dataclasses.replace(tiny, data="")
    found = _run("mediation", own, tmp_path)
    assert found["arms"] == []
    assert len(found["results"]["simulations"]) == 4
    assert (
        Path(tmp_path / "scores.csv")
        .read_text()
        .startswith("experiment,arm,seed,fold,patient,sample,dice,iou")
    )
