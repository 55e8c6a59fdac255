"""The demo: train a small UNet on a stained slide, without and with the loss."""

from __future__ import annotations

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.data import Split
from fdkernels.segmentation.demo_data import PATCH, write_patches
from fdkernels.segmentation.demo_figure import draw_comparison
from fdkernels.segmentation.profiling import train_measured
from fdkernels.segmentation.runfiles import write_json

RUNS = {"without_loss": "without the loss", "with_loss": "with the loss"}


def _in_own_process(config: TrainingConfig, split: Split) -> dict[str, Any]:
    """Run `train_measured` in a fresh process: the peak memory of a process never decreases."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(train_measured, config, split).result()


def _step(result: dict[str, Any]) -> float:
    seconds: float = result["seconds_per_step"]["median"]
    return seconds


def _memory(result: dict[str, Any]) -> str:
    size = result["peak_gpu_memory"] or result["peak_memory"]
    return "unknown" if size is None else f"{size / 2**20:.0f} MiB"


def results_table(results: dict[str, dict[str, Any]]) -> Table:
    """Tabulate Dice, IoU, seconds per step and peak memory of both runs, and their differences.

    Args:
        results: result of `train_measured` of each run in `RUNS`.
    """
    table = Table(title="Test patches, best model of phase two")
    table.add_column("")
    for heading in ("Dice", "IoU", "seconds per step", "peak memory"):
        table.add_column(heading, justify="right")
    for name, title in RUNS.items():
        scores = results[name]["phases"]["active"]["test"]
        table.add_row(
            title,
            f"{scores['dice']:.4f}",
            f"{scores['iou']:.4f}",
            f"{_step(results[name]):.4f}",
            _memory(results[name]),
        )
    without, with_loss = (results[name]["phases"]["active"]["test"] for name in RUNS)
    table.add_section()
    table.add_row(
        "difference",
        f"{with_loss['dice'] - without['dice']:+.4f}",
        f"{with_loss['iou'] - without['iou']:+.4f}",
        f"{_step(results['with_loss']) - _step(results['without_loss']):+.4f}",
        "",
    )
    return table


def run_demo(
    output: str | Path,
    *,
    seed: int = 0,
    epochs_warm: int = 20,
    epochs_active: int = 20,
    base_channels: int = 16,
    accelerator: str = "auto",
) -> dict[str, Any]:
    """Train without and with the loss, print a table, draw a figure, and return the results.

    Both runs start from the same weights, see the same batches and take the same number of steps.
    The patches are from scikit-image's immunohistochemistry slide, which needs no download.

    Args:
        output: folder for patches/, runs/, results.json and demo.png.
        seed: seed of weights, order and augmentation.
        epochs_warm, epochs_active: epochs of phase one and two.
        base_channels: width of the UNet's first level.
        accelerator: accelerator of Lightning's Trainer.

    Returns:
        The result of `train_measured` of each run in `RUNS`, as in results.json.
    """
    output = Path(output)
    console = Console()
    patches = output / "patches"
    split = write_patches(patches)
    console.print(
        f"Patches of {PATCH}x{PATCH}: {len(split.train)} for training, "
        f"{len(split.validation)} for validation, {len(split.test)} for testing",
        highlight=False,
    )
    results = {}
    for name, title in RUNS.items():
        folder = output / "runs" / name
        if (folder / "config.json").exists():
            shutil.rmtree(folder)
        config = TrainingConfig(
            dataset="demo",
            data=str(patches),
            output=str(folder),
            base_channels=base_channels,
            size=PATCH,
            batch_size=8,
            epochs_warm=epochs_warm,
            epochs_active=epochs_active,
            lr=1e-3,
            alpha_lr=1e-3,
            fd_loss=name == "with_loss",
            seed=seed,
            workers=0,
            accelerator=accelerator,
        )
        console.print(f"\nTraining {title}")
        results[name] = _in_own_process(config, split)
    write_json(output / "results.json", results)
    picture = output / "demo.png"
    draw_comparison(picture, split.test, {RUNS[name]: output / "runs" / name for name in RUNS})
    console.print()
    console.print(results_table(results))
    console.print(
        "Seconds per step: median over phase two of forward, backward and optimizer. Peak memory: the whole "
        "training process, including libraries"
        + (" (on the GPU: its tensors)." if results["with_loss"]["peak_gpu_memory"] else ".")
    )
    console.print(f"Picture: {picture}\nNumbers: {output / 'results.json'}", highlight=False)
    return results


__all__ = ["results_table", "run_demo"]
