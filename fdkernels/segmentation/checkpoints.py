"""Checkpoints of a training that may be broken off at any moment."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from fdkernels.segmentation.batches import TrainingBatches
from fdkernels.segmentation.runfiles import replacing

# A checkpoint of the largest network takes about a second to write.
SECONDS_BETWEEN = 60.0


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads it without executing anything.

    Lightning's own way holds the whole file in memory first and writes it to the system's folder for
    temporary files, from where it may have to be copied.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        with replacing(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        loaded: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        return loaded


class SaveBestAndLast(Checkpoint):
    """Keeps the epoch with the highest validation Dice, and one from which a broken run goes on.

    The last epoch is saved where it was the best so far, at the end of the phase, and where `seconds`
    have passed since. (Lightning's ModelCheckpoint forgets the best score when a folder is moved.)
    A run that goes on has its batches told the epoch here: Lightning does so only after it has made
    the first iterator, when workers have begun to read.

    Attributes:
        score: the highest validation Dice so far.

    Args:
        folder: for best.ckpt, which holds weights alone, and last.ckpt.
        batches: those that are trained on.
        seconds: that may pass without a checkpoint.
    """

    def __init__(self, folder: Path, batches: TrainingBatches, seconds: float = SECONDS_BETWEEN) -> None:
        self.batches = batches
        self.best = folder / "best.ckpt"
        self.last = folder / "last.ckpt"
        self.seconds = seconds
        self.score = -1.0
        self._saved_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "next_epoch": self.batches.epoch + 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score = state_dict["score"]
        self.batches.set_epoch(state_dict["next_epoch"])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        score = float(trainer.callback_metrics["val/dice"])
        improved = score > self.score
        if improved:
            self.score = score
            trainer.save_checkpoint(self.best, weights_only=True)
        due = (
            improved
            or trainer.current_epoch + 1 == trainer.max_epochs
            or time.monotonic() - self._saved_at >= self.seconds
        )
        # The clocks of the ranks may disagree, and saving is done together.
        if trainer.strategy.broadcast(due):
            trainer.save_checkpoint(self.last)
            self._saved_at = time.monotonic()


__all__ = ["SaveBestAndLast", "WholeFiles"]
