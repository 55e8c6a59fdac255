"""The live line of a phase, and the lines that a log file gets instead."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

import fdkernels as fdk
from fdkernels.segmentation.terminal import terminal


class _PhaseBar(Progress):
    """One bar, and below it lines of text."""

    lines: Sequence[str] = ()

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for line in self.lines:
            yield Text(line, style="dim")


class PhaseProgress(Checkpoint):
    """Show a bar for a phase, with the step, the time and the time left, and the numbers of the last epoch.

    The numbers are L_seg and the Dice of the validation images, and while alpha is active also the ranges of
    alpha and L over the layers, and the target. Where the output is no terminal (a log file), the same is
    printed as a plain line an epoch. (Lightning's RichProgressBar shows a bar an epoch and leaves nothing in
    a log file. A Checkpoint, because Lightning calls those after the module has logged its epoch.)
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title = title
        self.console = console or terminal()
        self._bar: _PhaseBar | None = None
        self._task = TaskID(0)
        self._first = 0
        self._begun = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first, self._begun = trainer.current_epoch, time.monotonic()
        if not self.console.is_terminal:
            return
        # The bar takes what the others leave: step, time and time left are readable on 80 columns.
        self._bar = _PhaseBar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
        )
        self._bar.start()
        steps = int(trainer.num_training_batches)
        self._task = self._bar.add_task(
            self.title, total=(trainer.max_epochs or 1) * steps, completed=trainer.current_epoch * steps
        )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        lines = epoch_text(trainer.callback_metrics, getattr(pl_module, "criterion", None))
        if self._bar is not None:
            self._bar.lines = lines
            return
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 1
        steps = int(trainer.num_training_batches)
        elapsed = time.monotonic() - self._begun
        left = elapsed / (epoch - self._first) * (epochs - epoch)
        self.console.print(
            f"{self.title}: epoch {epoch}/{epochs}, step {epoch * steps}/{epochs * steps}, "
            f"{_duration(elapsed)} < {_duration(left)}; {'; '.join(lines)}",
            soft_wrap=True,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def epoch_text(metrics: Mapping[str, Any], criterion: fdk.FeatureDiscrepancyLoss | None) -> list[str]:
    """Describe an epoch in one line, and alpha, L and the target in a second one while alpha is active.

    Args:
        metrics: as `SegmentationModule` logs them, scalars by name.
        criterion: the loss; None without it.
    """
    scores = f"L_seg {float(metrics['train/segmentation_loss']):.3f}"
    if "val/dice" in metrics:
        scores += f", validation Dice {float(metrics['val/dice']):.3f}"
    if criterion is None or not criterion.is_active:
        return [scores]
    layers = [f"{name} {_range(metrics, prefix)}" for name, prefix in _LAYER_NUMBERS.items()]
    target = criterion.target if criterion.alpha_rule == "ascent" else None
    if target is not None:
        layers.append(f"target {float(target):.2f}")
    return [scores, ", ".join(layers)]


_LAYER_NUMBERS = {"alpha": "alpha/", "L": "discrepancy_loss/"}


def _range(metrics: Mapping[str, Any], prefix: str) -> str:
    values = [float(value) for name, value in metrics.items() if name.startswith(prefix)]
    return f"{min(values):.3f} to {max(values):.3f}" if values else "unknown"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


__all__ = ["PhaseProgress", "epoch_text"]
