"""The demo: train a small UNet on a stained slide, without and with the loss."""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.table import Table

from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.data import Split
from fdkernels.segmentation.demo_data import PATCH, write_patches
from fdkernels.segmentation.demo_figure import draw_comparison
from fdkernels.segmentation.profiling import train_measured
from fdkernels.segmentation.runfiles import write_json
from fdkernels.segmentation.terminal import terminal

RUNS = {"without_loss": "without the loss", "with_loss": "with the loss"}

# By arm the result of each seed.
Results = dict[str, list[dict[str, Any]]]


def _in_own_process(config: TrainingConfig, split: Split) -> dict[str, Any]:
    """Run `train_measured` in a fresh process: the peak memory of a process never decreases."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(train_measured, config, split).result()


def _memory(results: Sequence[dict[str, Any]]) -> str:
    sizes = [result["peak_gpu_memory"] or result["peak_memory"] for result in results]
    return "unknown" if None in sizes else f"{max(sizes) / 2**20:.0f} MiB"


def _test(results: Sequence[dict[str, Any]], score: str) -> list[float]:
    """Return a test score of each seed, in percent."""
    return [100 * result["phases"]["active"]["test"][score] for result in results]


def results_table(results: Results) -> Table:
    """Tabulate Dice and IoU over the seeds, seconds per step and peak memory of both arms.

    A cell is the mean over the seeds and, in brackets, the lowest and the highest. The last row is the mean
    difference between the arms, each seed beside itself, with the difference of every seed.

    Args:
        results: by arm in `RUNS` the results of `train_measured`, one a seed.
    """
    table = Table(title="Test patches in %, best model of phase two, mean (lowest to highest seed)")
    table.add_column("")
    for heading in ("Dice", "IoU", "seconds per step", "peak memory"):
        table.add_column(heading, justify="right")
    for name, title in RUNS.items():
        cells = [
            f"{statistics.mean(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})"
            for scores in (_test(results[name], score) for score in ("dice", "iou"))
        ]
        step = statistics.median(result["seconds_per_step"]["median"] for result in results[name])
        table.add_row(title, *cells, f"{step:.3f}", _memory(results[name]))
    table.add_section()
    cells = []
    for score in ("dice", "iou"):
        pairs = zip(*(_test(results[name], score) for name in RUNS), strict=True)
        gains = [with_loss - without for without, with_loss in pairs]
        cells.append(f"{statistics.mean(gains):+.1f} ({', '.join(f'{gain:+.1f}' for gain in gains)})")
    table.add_row("difference (each seed)", *cells)
    return table


def summary(results: Results) -> str:
    """Say in a sentence what the seeds show, and what they cannot."""
    without, with_loss = (_test(results[name], "dice") for name in RUNS)
    better = sum(b > a for a, b in zip(without, with_loss, strict=True))
    return (
        f"With the loss Dice is higher for {better} of {len(without)} seeds; the seeds without it alone "
        f"differ by {max(without) - min(without):.1f} points. So few seeds on one slide, whose truth is a "
        "threshold of its stain and not drawn by a person, prove nothing either way: try the loss on your "
        "own data."
    )


def run_demo(
    output: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    epochs_warm: int = 12,
    epochs_active: int = 12,
    base_channels: int = 16,
    accelerator: str = "auto",
) -> Results:
    """Train without and with the loss for each seed, print a table, draw a figure, and return the results.

    Both runs of a seed start from the same weights, see the same batches and take the same number of steps.
    The patches are from scikit-image's immunohistochemistry slide, which needs no download.

    Args:
        output: folder for patches/, runs/, results.json and demo.png.
        seeds: seeds of weights, order and augmentation.
        epochs_warm, epochs_active: epochs of phase one and two.
        base_channels: width of the UNet's first level.
        accelerator: accelerator of Lightning's Trainer.

    Returns:
        By arm in `RUNS` the results of `train_measured`, one a seed, as in results.json.
    """
    output = Path(output)
    console = terminal()
    patches = output / "patches"
    split = write_patches(patches)
    console.print(
        f"Patches of {PATCH}x{PATCH}: {len(split.train)} for training, "
        f"{len(split.validation)} for validation, {len(split.test)} for testing"
    )
    runs = output / "runs"
    results: Results = {name: [] for name in RUNS}
    for number, seed in enumerate(seeds, start=1):
        for name, title in RUNS.items():
            folder = runs / name / f"seed_{seed}"
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
            console.print(f"\nTraining {title}, seed {seed} ({number} of {len(seeds)})")
            results[name].append(_in_own_process(config, split))
    write_json(output / "results.json", results)
    picture = output / "demo.png"
    draw_comparison(picture, split.test, {RUNS[name]: runs / name / f"seed_{seeds[0]}" for name in RUNS})
    console.print()
    console.print(results_table(results))
    console.print(summary(results))
    console.print(
        "Seconds per step: median over phase two of forward, backward and optimizer. Peak memory: the whole "
        "training process, including libraries"
        + (" (on the GPU: its tensors)." if results["with_loss"][0]["peak_gpu_memory"] else ".")
    )
    console.print(f"Picture: {picture}\nNumbers: {output / 'results.json'}", soft_wrap=True)
    return results


__all__ = ["Results", "results_table", "run_demo", "summary"]
