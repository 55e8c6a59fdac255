"""Every pair of Table 2 trains from end to end: without the loss, with it, and with both exchanges."""

from __future__ import annotations

import csv
import math

import pytest

from fdkernels import models
from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.presets import TABLE_2, preset_fields
from fdkernels.segmentation.runfiles import read_json, read_weights
from fdkernels.segmentation.train import train
from tiny_data import make_tiny

# A second data set of the same kind of images, as section 4 pools them.
NOVEL = {"tnbc": "monuseg", "monuseg": "tnbc", "udiat": "us-tnbc", "us-tnbc": "udiat", "ad-256": "tnbc"}
WAYS = {
    "without the loss": {"fd_loss": False},
    "with the loss": {},
    "shuffle": {"exchange": "shuffle"},
    "pooled": {"exchange": "pooled"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {name: make_tiny(name, folder / name, images=8) for name in {*NOVEL, *NOVEL.values()}}


def _train(folders, output, dataset, model, way, **options):
    fields = {**preset_fields(f"{dataset}-{model}"), **WAYS[way], **options}
    if way == "pooled":
        novel = NOVEL[dataset]
        fields |= {"novel_dataset": novel, "novel_data": str(folders[novel]), "novel_images": 3}
    config = TrainingConfig(
        data=str(folders[dataset]), output=str(output), alpha_lr=1e-2, accelerator="cpu", **fields
    )
    return train(config, progress=False)


def _logged(folder, phase):
    """Each column of the log: its numbers by epoch."""
    (log,) = (folder / phase / "logs").glob("version_*/metrics.csv")
    columns = {}
    with log.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    columns.setdefault(name, []).append(float(value))
    return columns


def _check(folder, metrics, dataset, model, way, base_channels, epochs=1):
    with_loss = way != "without the loss"
    network = models.create(model, base_channels=base_channels)
    assert read_json(folder / "metrics.json") == metrics
    config = read_json(folder / "config.json")
    assert (config["dataset"], config["model"]) == (dataset, model)
    for phase, result in metrics["phases"].items():
        network.load_state_dict(read_weights(folder / result["weights"]))
        assert (folder / result["checkpoint"]).exists()
        assert all(math.isfinite(score) for score in result["test"].values())
        assert 0 <= result["test"]["iou"] <= result["test"]["dice"] <= 1
        assert result["test"]["images"] == len(read_json(folder / "split.json")["test"])
        logged = _logged(folder, phase)
        assert all(math.isfinite(value) for values in logged.values() for value in values)
        assert len(logged["train/loss"]) == len(logged["lr/network"]) == epochs
        for name in network.tap_names:
            assert (f"discrepancy_loss/{name}" in logged) == with_loss
            if with_loss:
                assert all((alpha > 0) == (phase == "active") for alpha in logged[f"alpha/{name}"])
    if way == "pooled":
        assert len(read_json(folder / "split.json")["novel"]) == 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dataset", "model"), TABLE_2, ids=lambda name: name)
def test_a_pair_of_table_2_trains_from_end_to_end(folders, tmp_path, dataset, model, way):
    small = {"size": 32, "base_channels": 2, "batch_size": 4, "epochs_warm": 1, "epochs_active": 1}
    metrics = _train(folders, tmp_path, dataset, model, way, tensorboard=False, **small)
    _check(tmp_path, metrics, dataset, model, way, base_channels=2)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dataset", "model"), TABLE_2, ids=lambda name: name)
def test_a_pair_of_table_2_trains_on_all_folds_of_larger_images(folders, tmp_path, dataset, model, way):
    larger = {"size": 64, "base_channels": 8, "batch_size": 2, "epochs_warm": 2, "epochs_active": 2}
    summary = _train(folders, tmp_path, dataset, model, way, fold="all", **larger)
    assert read_json(tmp_path / "folds.json") == summary
    for fold in range(1, 6):
        folder = tmp_path / f"fold-{fold}"
        metrics = read_json(folder / "metrics.json")
        _check(folder, metrics, dataset, model, way, base_channels=8, epochs=2)
        for phase, scores in summary["phases"].items():
            assert scores["dice"]["values"][fold - 1] == metrics["phases"][phase]["test"]["dice"]
