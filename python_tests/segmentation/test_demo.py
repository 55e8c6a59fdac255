from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

pytest.importorskip("skimage", reason="the extra demo is not installed")

from fdkernels.segmentation import demo as demo_module
from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.demo import results_table, run_demo
from fdkernels.segmentation.demo_data import write_patches
from fdkernels.segmentation.demo_figure import alpha_history
from fdkernels.segmentation.profiling import StepClock, peak_memory, train_measured
from fdkernels.segmentation.runfiles import read_json


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Run a short demo in this process; return its folder and results."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "_in_own_process", train_measured)
        results = run_demo(folder, epochs_warm=1, epochs_active=2, base_channels=2, accelerator="cpu")
    return folder, results


def test_both_runs_are_measured_and_written(demo):
    folder, results = demo
    assert json.loads((folder / "results.json").read_text()) == results
    assert list(results) == ["without_loss", "with_loss"]
    for result in results.values():
        assert result["steps_per_phase"] == [5, 10]
        assert result["seconds_per_step"]["median"] > 0
        assert result["peak_memory"] >= result["peak_memory_before_training"]


def test_training_is_measured_in_its_own_process(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    block = np.ones(2**28, np.uint8)
    here = peak_memory()
    del block
    config = TrainingConfig(
        dataset="demo",
        data=str(tmp_path),
        output=str(tmp_path / "run"),
        base_channels=2,
        size=32,
        lr=1e-3,
        epochs_warm=1,
        epochs_active=0,
        limit_batches=2,
        accelerator="cpu",
    )
    result = demo_module._in_own_process(config, write_patches(tmp_path))
    assert read_json(tmp_path / "run" / "metrics.json") == {"phases": result["phases"]}
    assert result["steps_per_phase"] == [2]
    assert result["peak_memory"] < here - 2**27


def test_phase_one_is_the_same_in_both_runs(demo):
    _, results = demo
    scores = [result["phases"]["warm"]["test"] for result in results.values()]
    assert scores[0] == scores[1]


def test_alpha_moves_in_phase_two(demo):
    folder, _ = demo
    history = alpha_history(folder / "runs" / "with_loss")
    assert all(values == [0] for values in history["warm"].values())
    assert all(len(values) == 2 and values[-1] > 0 for values in history["active"].values())


def test_a_repeated_epoch_keeps_its_last_values(tmp_path):
    for version, rows in ((2, "0,0.1\n1,0.2\n"), (10, "1,0.3\n2,0.4\n")):
        folder = tmp_path / "active" / "logs" / f"version_{version}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"epoch,alpha/enc1\n{rows}2,\n")
    assert alpha_history(tmp_path) == {"warm": {}, "active": {"enc1": [0.1, 0.3, 0.4]}}


def test_the_figure_shows_image_errors_and_alpha(demo):
    folder, _ = demo
    picture = np.array(Image.open(folder / "demo.png").convert("RGB"))
    assert min(picture.shape[:2]) > 600
    red = (picture[..., 0] > 230) & (picture[..., 1] < 80) & (picture[..., 2] < 80)
    assert red.sum() > 100
    assert np.unique(picture.reshape(-1, 3), axis=0).shape[0] > 1000


def test_the_table_shows_the_results(demo):
    _, results = demo
    console = Console(file=io.StringIO(), width=120)
    console.print(results_table(results))
    shown = console.file.getvalue()
    for result in results.values():
        assert f"{result['phases']['active']['test']['dice']:.4f}" in shown
        assert f"{result['seconds_per_step']['median']:.4f}" in shown
    for text in ("without the loss", "with the loss", "difference", "MiB"):
        assert text in shown


def test_a_second_demo_replaces_the_first(demo, monkeypatch):
    folder, results = demo
    begun = []
    monkeypatch.setattr(
        demo_module,
        "_in_own_process",
        lambda config, split: begun.append(config.output) or results[config.output.split("/")[-1]],
    )
    monkeypatch.setattr(demo_module, "draw_comparison", lambda *arguments: None)
    run_demo(folder, base_channels=2)
    assert begun == [str(folder / "runs" / name) for name in results]
    assert not list((folder / "runs").glob("*/config.json"))


def test_peak_memory_includes_freed_memory():
    size = 2**27
    block = np.ones(size, np.uint8)
    during = peak_memory()
    del block
    assert during > size
    # The kernel counts pages in batches, so the peak is only exact to a few pages.
    assert peak_memory() > during - 2**20


def test_quartiles_are_those_of_the_last_fit():
    clock = StepClock()
    clock.fits = [[100.0], [1.0, 2.0, 3.0, 4.0, 5.0]]
    assert clock.quartiles() == [2, 3, 4]
