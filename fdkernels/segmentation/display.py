"""What a person sees of a run at the terminal: progress, the table of results, no chatter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import fdkernels as fdk
from fdkernels.backend import resolve
from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.phase import RunData

# Remarks that do not concern the user: the loaders choose their workers by the size of the data,
# the folder of a run that is resumed is meant not to be empty, scores are equal on all ranks before
# they are logged and tests share no sample, and LeafSpec is between Lightning and torch.
_CHATTER = (
    r".*does not have many workers.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*smaller than the logging interval.*",
    r".*when logging on epoch level in distributed setting.*",
    r".*it is recommended to use `Trainer\(devices=1, num_nodes=1\)`.*",
    r".*isinstance\(treespec, LeafSpec\).*",
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keeps Lightning's notices (below warnings) and the remarks named above off the screen."""
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
    """What is trained on what, in two lines: network, images, device, number format, backend."""
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
    """Says once, when the device is known, what is trained on what."""

    def __init__(self, config: TrainingConfig, data: RunData, console: Console | None = None) -> None:
        self.config = config
        self.data = data
        self.console = console or Console()
        self._said = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._said:
            text = run_text(self.config, self.data, trainer.strategy.root_device, trainer.world_size)
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        self._said = True


class PhaseProgress(Callback):
    """One live line for a phase: steps, time left, L_seg and validation Dice of the last epoch.

    Where the output is no terminal (a log file), it prints a plain line for about every tenth of
    the epochs instead.
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title = title
        self.console = console or Console()
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("{task.description:<21}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[scores]}"),
            console=self.console,
        )
        self._progress.start()
        epochs = trainer.max_epochs or 1
        self._task = self._progress.add_task(
            self.title,
            total=epochs * int(trainer.num_training_batches),
            completed=trainer.current_epoch * int(trainer.num_training_batches),
            scores="",
        )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._progress is not None:
            self._progress.advance(self._task)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 1
        metrics = trainer.callback_metrics
        scores = f"L_seg {float(metrics['train/segmentation_loss']):.3f}"
        if "val/dice" in metrics:
            scores += f", validation Dice {float(metrics['val/dice']):.3f}"
        if self._progress is not None:
            self._progress.update(self._task, scores=scores)
        elif epoch == epochs or epoch % max(1, epochs // 10) == 0:
            self.console.print(f"{self.title}, epoch {epoch}/{epochs}: {scores}", highlight=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


PHASE_TITLES = {"warm": "phase 1, alpha = 0", "active": "phase 2, alpha active"}


def phase_title(phase: str, fd_loss: bool) -> str:
    """The name of a phase as a person reads it."""
    if fd_loss:
        return PHASE_TITLES[phase]
    return PHASE_TITLES[phase].split(",")[0]


def results_table(metrics: Mapping[str, Any], fd_loss: bool) -> Table:
    """Dice and IoU on the test images of the best model of each phase, from a run's metrics."""
    images = next(iter(metrics["phases"].values()))["test"]["images"]
    table = Table(title=f"best model of each phase, mean over {images} test images")
    table.add_column("phase")
    for name in ("best epoch", "validation Dice", "test Dice", "test IoU"):
        table.add_column(name, justify="right")
    for phase, result in metrics["phases"].items():
        table.add_row(
            phase_title(phase, fd_loss),
            f"{result['best_epoch']} of {result['epochs']}",
            f"{result['validation_dice']:.4f}",
            f"{result['test']['dice']:.4f}",
            f"{result['test']['iou']:.4f}",
        )
    return table


def folds_table(summary: Mapping[str, Any], fd_loss: bool) -> Table:
    """Dice and IoU on the test images of every fold, mean and standard deviation."""
    table = Table(title=f"best model of each phase, {summary['folds']} folds, mean and standard deviation")
    table.add_column("phase")
    for name in ("validation Dice", "test Dice", "test IoU"):
        table.add_column(name, justify="right")
    for phase, scores in summary["phases"].items():
        spread = [scores[name] for name in ("validation_dice", "dice", "iou")]
        cells = [f"{score['mean']:.4f} ± {score['standard_deviation']:.4f}" for score in spread]
        table.add_row(phase_title(phase, fd_loss), *cells)
    return table


__all__ = [
    "PhaseProgress",
    "RunHeader",
    "folds_table",
    "phase_title",
    "quiet_lightning",
    "results_table",
    "run_text",
]
