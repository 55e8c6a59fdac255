"""Checkpoints of a training that may be broken off at any moment."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

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


class SaveLast(Checkpoint):
    """Keeps the end of an epoch from which a run that was broken off goes on.

    Saved after an epoch that was the best so far, after the last one, and where `seconds` have passed
    since; the same on all ranks.

    Args:
        path: the file.
        best: saves the best epoch, before this callback in the list.
        seconds: that may pass without.
    """

    def __init__(self, path: Path, best: ModelCheckpoint, seconds: float = SECONDS_BETWEEN) -> None:
        self.path = path
        self.best = best
        self.seconds = seconds
        self._best_saved = ""
        self._saved_at = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        best = str(self.best.best_model_score)
        due = (
            best != self._best_saved
            or trainer.current_epoch + 1 == trainer.max_epochs
            or time.monotonic() - self._saved_at >= self.seconds
        )
        if trainer.strategy.broadcast(due):
            trainer.save_checkpoint(self.path)
            self._best_saved, self._saved_at = best, time.monotonic()


__all__ = ["SaveLast", "WholeFiles"]
