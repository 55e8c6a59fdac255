"""Output at the terminal: what a run computes, tables of results, no chatter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

import fdkernels as fdk
from fdkernels.backend import resolve
from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.run_data import RunData
from fdkernels.segmentation.terminal import terminal

# Warnings that do not concern the user: the loaders choose their workers by the size of the data,
# the folder of a resumed run is not empty, scores are equal on all ranks before they are logged,
# ranks share no test sample, and LeafSpec is between Lightning and torch.
_CHATTER = (
    r".*does not have many workers.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*smaller than the logging interval.*",
    r".*when logging on epoch level in distributed setting.*",
    r".*it is recommended to use `Trainer\(devices=1, num_nodes=1\)`.*",
    r".*isinstance\(treespec, LeafSpec\).*",
)


SET_TITLES = {"worst_off": "worst off", "best_off": "best off", "all": "all"}
SCORE_TITLES = {
    "dice": "Dice",
    "iou": "IoU",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "precision": "precision",
}


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's notices (below warnings) and the remarks named above."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in _CHATTER:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def run_text(config: TrainingConfig, data: RunData, device: torch.device, world: int) -> str:
    """Describe a run in two lines: network, images, device, number format, backend."""
    split = data.split
    images = f"{len(split.train)} images"
    if data.novel:
        images += f" and {len(data.novel)} of {config.novel_dataset}"
    side = "" if config.size is None else f" at {config.size}x{config.size}"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts = [
        f"{world} x {where}" if world > 1 else where,
        config.precision,
        *(["channels_last"] if config.channels_last else []),
        *(["compiled"] if config.compile else []),
        f"batches of {config.batch_size}" + (f" x {config.accumulate}" if config.accumulate > 1 else ""),
        f"loss backend {resolve(config.backend, device)}" if config.fd_loss else "without the loss",
        f"seed {config.seed}",
        f"torch {torch.__version__}, fdkernels {fdk.__version__}",
    ]
    return (
        f"{config.model} on {config.dataset}{side}: {images} to train on, "
        f"{len(split.validation)} to validate, {len(split.test)} to test\n" + ", ".join(facts)
    )


class RunHeader(Callback):
    """Print `run_text` once, when Lightning knows the device."""

    def __init__(self, config: TrainingConfig, data: RunData, console: Console | None = None) -> None:
        self.config = config
        self.data = data
        self.console = console or terminal()
        self._said = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._said:
            text = run_text(self.config, self.data, trainer.strategy.root_device, trainer.world_size)
            self.console.print(text, soft_wrap=True)
        self._said = True


PHASE_TITLES = {"warm": "phase 1, alpha = 0", "active": "phase 2, alpha active"}


def phase_title(phase: str, fd_loss: bool) -> str:
    """Name a phase for the screen."""
    if fd_loss:
        return PHASE_TITLES[phase]
    return PHASE_TITLES[phase].split(",")[0]


def results_table(results: Mapping[str, Any], fd_loss: bool) -> Table:
    """Show Dice and IoU on the test images of the best model of each phase.

    Args:
        results: the content of metrics.json, or of folds.json, which gives mean and standard deviation.
        fd_loss: whether the loss was on, for the names of the phases.
    """
    phases = results["phases"]
    columns = ["validation Dice", "test Dice", "test IoU"]
    if "folds" in results:
        title = f"best model of each phase, {results['folds']} folds, mean and standard deviation"
    else:
        images = next(iter(phases.values()))["test"]["images"]
        title = f"best model of each phase, mean over {images} test images"
        columns.insert(0, "best epoch")
    table = Table(title=title)
    table.add_column("phase")
    for name in columns:
        table.add_column(name, justify="right")
    for phase, result in phases.items():
        if "folds" in results:
            scores = [result[name] for name in ("validation_dice", "dice", "iou")]
            cells = [f"{score['mean']:.4f} ± {score['standard_deviation']:.4f}" for score in scores]
        else:
            values = (result["validation_dice"], result["test"]["dice"], result["test"]["iou"])
            cells = [f"{result['best_epoch']} of {result['epochs']}", *(f"{value:.4f}" for value in values)]
        table.add_row(phase_title(phase, fd_loss), *cells)
    return table


def scores_table(summary: Mapping[str, Any], phase: str) -> Table:
    """Show worst-off, best-off and all samples of a phase, from 0 to 1 as `results_table` does.

    With a baseline each set has two rows, and the second holds the differences to the first with their
    95 % intervals, and how many images improved; without one, each score has a row, with its standard
    deviation over the samples.

    Args:
        summary: the content of summary.json.
        phase: one of its phases.
    """
    found = summary["phases"][phase]
    caption = f"Worst off: {found['worst_off_rule']}."
    if "baseline" in found:
        unit = found["comparison"]["resampled"]
        caption = f"In brackets: 95 % interval, bootstrap over {unit}. {caption}"
    table = Table(title=_title(summary, phase), caption=caption)
    if "baseline" in found:
        _compare(table, found)
    else:
        _describe(table, found)
    return table


def _title(summary: Mapping[str, Any], phase: str) -> str:
    of = "all images" if summary["part"] == "all" else f"{summary['part']} images"
    what = "given weights" if phase == "weights" else phase_title(phase, summary["fd_loss"])
    return f"{summary['model']} on {of} of {summary['dataset']}, {what}"


def _compare(table: Table, found: Mapping[str, Any]) -> None:
    """Add one section a set: the baseline, then the run with its differences."""
    table.add_column("samples")
    table.add_column("images", justify="right")
    table.add_column("run")
    for heading in ("Dice", "Δ Dice", "IoU", "Δ IoU"):
        table.add_column(heading, justify="right")
    for name, title in SET_TITLES.items():
        before, after = found["baseline"]["sets"][name], found["sets"][name]
        compared = found["comparison"][name]
        scores = [(_score(before[score]["mean"]), "") for score in ("dice", "iou")]
        table.add_section()
        table.add_row(title, str(before["images"]), "baseline", *scores[0], *scores[1])
        cells = []
        for score in ("dice", "iou"):
            ends = compared[score]
            spread = "" if ends is None else f"\n\\[{_score(ends[0], '+')}, {_score(ends[1], '+')}]"
            cells += [_score(after[score]["mean"]), _score(found["difference"][name][score], "+") + spread]
        table.add_row(f"{compared['improved']} better,\n{compared['worsened']} worse", "", "this", *cells)


def _describe(table: Table, found: Mapping[str, Any]) -> None:
    """Add one row a score and one column a set; then the pooled scores, then the mean over the folds."""
    sets = [found["sets"][name] for name in SET_TITLES]
    table.add_column("score")
    for one, title in zip(sets, SET_TITLES.values(), strict=True):
        images = "1 image" if one["images"] == 1 else f"{one['images']} images"
        table.add_column(f"{title}\n{images}", justify="right")
    for score, title in SCORE_TITLES.items():
        table.add_row(title, *(_with_deviation(one[score]) for one in sets))
    table.add_section()
    for score in ("dice", "iou"):
        pooled = (_score(one["pooled"] and one["pooled"][score]) for one in sets)
        table.add_row(f"{SCORE_TITLES[score]}, pixels pooled", *pooled)
    if "folds" in found:
        folds = found["folds"]
        table.add_section()
        for score in ("dice", "iou"):
            title = f"{SCORE_TITLES[score]}, mean of {len(folds['each'])} folds"
            table.add_row(title, "", "", _with_deviation(folds[score]))


def _score(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.4f}"


def _with_deviation(described: Mapping[str, Any]) -> str:
    mean, deviation = described["mean"], described["std"]
    return _score(mean) if deviation is None else f"{_score(mean)} ± {_score(deviation)}"


__all__ = [
    "RunHeader",
    "phase_title",
    "quiet_lightning",
    "results_table",
    "run_text",
    "scores_table",
]
