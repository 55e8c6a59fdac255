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
from fdkernels.segmentation.demo import results_table, run_demo, summary
from fdkernels.segmentation.demo_data import write_patches
from fdkernels.segmentation.demo_figure import layer_history
from fdkernels.segmentation.profiling import StepClock, peak_memory, train_measured
from fdkernels.segmentation.runfiles import read_json


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Run a short demo in this process; return its folder and results."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "_in_own_process", train_measured)
        results = run_demo(
            folder, seeds=(0, 1), epochs_warm=1, epochs_active=2, base_channels=2, accelerator="cpu"
        )
    return folder, results


def test_both_runs_are_measured_and_written(demo):
    folder, results = demo
    assert json.loads((folder / "results.json").read_text()) == results
    assert list(results) == ["without_loss", "with_loss"]
    assert [len(of_seeds) for of_seeds in results.values()] == [2, 2]
    for result in (result for of_seeds in results.values() for result in of_seeds):
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
    for pair in zip(*results.values(), strict=True):
        scores = [result["phases"]["warm"]["test"] for result in pair]
        assert scores[0] == scores[1]


def test_alpha_moves_in_phase_two(demo):
    folder, _ = demo
    history = layer_history(folder / "runs" / "with_loss" / "seed_0", "alpha")
    assert all(values == [0] for values in history["warm"].values())
    assert all(len(values) == 2 and values[-1] > 0 for values in history["active"].values())


def test_a_repeated_epoch_keeps_its_last_values(tmp_path):
    for version, rows in ((2, "0,4,0.1\n1,9,0.2\n"), (10, "1,9,0.3\n2,14,0.4\n")):
        folder = tmp_path / "active" / "logs" / f"version_{version}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"epoch,step,alpha/enc1\n{rows}2,14,\n")
    assert layer_history(tmp_path, "alpha") == {"warm": {}, "active": {"enc1": [0.1, 0.3, 0.4]}}


def test_the_figure_shows_image_errors_and_alpha(demo):
    folder, _ = demo
    picture = np.array(Image.open(folder / "demo.png").convert("RGB"))
    assert min(picture.shape[:2]) > 600
    red = (picture[..., 0] > 230) & (picture[..., 1] < 80) & (picture[..., 2] < 80)
    assert red.sum() > 100
    assert np.unique(picture.reshape(-1, 3), axis=0).shape[0] > 1000


def made_result(dice: float) -> dict:
    test = {"dice": dice, "iou": dice / 2}
    return {
        "phases": {"active": {"test": test}},
        "seconds_per_step": {"median": 0.25},
        "peak_memory": 3 * 2**20,
        "peak_gpu_memory": None,
    }


def test_the_table_shows_mean_and_spread_of_the_seeds():
    results = {
        "without_loss": [made_result(dice) for dice in (0.9, 0.94)],
        "with_loss": [made_result(dice) for dice in (0.91, 0.924)],
    }
    console = Console(file=io.StringIO(), width=120)
    console.print(results_table(results))
    shown = console.file.getvalue()
    for text in (
        "92.0 (90.0 to 94.0)",
        "91.7 (91.0 to 92.4)",
        "-0.3 (+1.0, -1.6)",
        "45.9 (45.5 to 46.2)",
        "0.250",
        "3 MiB",
    ):
        assert text in shown
    assert "higher for 1 of 2 seeds; the seeds without it alone differ by 4.0 points" in summary(results)


def test_a_second_demo_replaces_the_first(demo, monkeypatch):
    folder, results = demo
    begun = []
    monkeypatch.setattr(
        demo_module,
        "_in_own_process",
        lambda config, split: begun.append(config.output) or results[config.output.split("/")[-2]][0],
    )
    monkeypatch.setattr(demo_module, "draw_comparison", lambda *arguments: None)
    run_demo(folder, seeds=(1,), base_channels=2)
    assert begun == [str(folder / "runs" / name / "seed_1") for name in results]
    assert not list((folder / "runs").glob("*/seed_1"))
    assert len(list((folder / "runs").glob("*/seed_0"))) == 2


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
