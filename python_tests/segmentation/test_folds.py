from __future__ import annotations

import dataclasses
import shutil

import pytest

from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.runfiles import read_json
from fdkernels.segmentation.train import summarize_folds, train
from tiny_data import make_tiny


def _result(dice):
    test = {"dice": dice, "iou": dice / 2, "images": 3}
    return {"phases": {"warm": {"validation_dice": 0.5, "test": test}}}


def test_mean_and_standard_deviation_are_those_worked_by_hand():
    summary = summarize_folds([_result(0.2), _result(0.4), _result(0.9)])
    assert summary["folds"] == 3
    scores = summary["phases"]["warm"]
    assert set(scores) == {"validation_dice", "dice", "iou"}
    assert scores["dice"]["values"] == [0.2, 0.4, 0.9]
    assert scores["dice"]["mean"] == pytest.approx(0.5)
    assert scores["dice"]["standard_deviation"] == pytest.approx(0.13**0.5)  # (0.09 + 0.01 + 0.16) / 2
    assert scores["validation_dice"]["standard_deviation"] == 0


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return TrainingConfig(
        dataset="tnbc",
        data=str(make_tiny("tnbc", tmp_path_factory.mktemp("tnbc"), images=10)),
        output="",
        base_channels=2,
        size=32,
        epochs_warm=1,
        epochs_active=1,
        lr=1e-2,
        limit_batches=1,
        accelerator="cpu",
        tensorboard=False,
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A cross-validation: its folder and what came out."""
    folder = tmp_path_factory.mktemp("folds")
    return folder, train(dataclasses.replace(config, output=str(folder), fold="all"), progress=False)


def test_every_image_is_tested_in_exactly_one_fold(run):
    folder, summary = run
    assert read_json(folder / "folds.json") == summary
    tested = [
        entry["image"]
        for fold in range(1, 6)
        for entry in read_json(folder / f"fold-{fold}" / "split.json")["test"]
    ]
    assert len(tested) == len(set(tested)) == 10


def test_one_fold_alone_is_that_of_the_whole(run, config, tmp_path):
    folder, _ = run
    metrics = train(dataclasses.replace(config, output=str(tmp_path), fold=3), progress=False)
    assert metrics == read_json(folder / "fold-3" / "metrics.json")
    assert read_json(tmp_path / "split.json") == read_json(folder / "fold-3" / "split.json")


def test_resuming_takes_finished_folds_as_they_are(run, config, tmp_path):
    folder, summary = run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "folds.json").unlink()
    shutil.rmtree(copy / "fold-4")
    shutil.rmtree(copy / "fold-5" / "active")
    kept = {path: path.stat().st_mtime_ns for path in copy.glob("fold-[1235]/*/best.ckpt")}
    assert len(kept) == 7
    again = train(dataclasses.replace(config, output=str(copy), fold="all"), resume=True, progress=False)
    assert again == summary
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_a_folder_with_folds_is_not_overwritten(run, config):
    folder, _ = run
    for fold in ("all", None):
        with pytest.raises(ValueError, match="already holds a run"):
            train(dataclasses.replace(config, output=str(folder), fold=fold), progress=False)
