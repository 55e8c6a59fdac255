"""Checkpoints of a training that may be broken off at any moment."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from fdkernels.segmentation.module import NotFiniteError
from fdkernels.segmentation.runfiles import replacing

# A checkpoint of the largest network takes about a second to write.
SECONDS_BETWEEN = 60.0
_RESUMED_FROM = frozenset(
    {
        "state_dict",
        "optimizer_states",
        "loops",
        "callbacks",
        "epoch",
        "global_step",
        "pytorch-lightning_version",
    }
)
# Lightning and torch list all that does not fit, over many lines.
_LONGEST_REASON = 200


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint without executing anything.

    Raises:
        ValueError: the file is missing, damaged, or not what a run writes.
    """
    try:
        loaded = torch.load(path, map_location=map_location, weights_only=True)
    except OSError as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from error
    except Exception as error:
        # Without torch's own words: it advises weights_only=False, which executes what the file holds.
        raise foreign_checkpoint(path, type(error).__name__) from error
    if isinstance(loaded, dict):
        return loaded
    raise foreign_checkpoint(path, type(loaded).__name__)


def foreign_checkpoint(path: str | os.PathLike[str], reason: Exception | str) -> ValueError:
    """Make the error about a checkpoint that is not as a run writes it."""
    if isinstance(reason, Exception):
        words = " ".join(str(reason).split())
        reason = f"{type(reason).__name__}: {words[:_LONGEST_REASON]}"
    return ValueError(
        f"checkpoint {path} is damaged, or fdkernels did not write it ({reason}); nothing in it was "
        "executed. Put back the file that the run wrote, or remove it to train that phase from its beginning"
    )


class WholeFiles(TorchCheckpointIO):
    """Write a checkpoint whole or not at all, and read it without executing anything.

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
        loaded = read_checkpoint(path, map_location)
        # Lightning does without some of them, and would begin anew or forget the best score.
        if lacking := sorted(_RESUMED_FROM - set(loaded)):
            raise foreign_checkpoint(path, f"it lacks {', '.join(lacking)}")
        return loaded


class SaveBestAndLast(ModelCheckpoint):
    """Lightning's ModelCheckpoint for the highest validation Dice, and a last.ckpt to resume from.

    best.ckpt holds weights alone. last.ckpt is written with each new best, at the end of the phase, and where
    `seconds` have passed since. (ModelCheckpoint writes its last.ckpt each epoch, or within an epoch by time;
    and it forgets the best score when the folder is moved, so that the state kept here is the score alone.
    It also takes a first epoch whose Dice is NaN as the best so far; here no such epoch is saved as best.)

    Args:
        folder: of best.ckpt and last.ckpt.
        seconds: how long to train on without writing last.ckpt.

    Raises:
        NotFiniteError: at the end, the Dice of every epoch was NaN.
    """

    def __init__(self, folder: Path, seconds: float = SECONDS_BETWEEN) -> None:
        super().__init__(
            folder,
            "best",
            monitor="val/dice",
            mode="max",
            save_weights_only=True,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self.best = Path(self.format_checkpoint_name({}))
        self.last = self.best.with_name("last.ckpt")
        self.seconds = seconds
        self._saved_at = time.monotonic()

    @property
    def state_key(self) -> str:
        return "SaveBestAndLast"

    def state_dict(self) -> dict[str, Any]:
        return {"score": None if self.best_model_score is None else float(self.best_model_score)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["score"] is None:
            return
        score, path = torch.tensor(state_dict["score"], dtype=torch.float64, device="cpu"), str(self.best)
        kept = {"best_model_score": score, "best_model_path": path, "best_k_models": {path: score}}
        super().load_state_dict(
            {**kept, "dirpath": self.dirpath, "kth_best_model_path": path, "kth_value": score}
        )

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.state_key not in checkpoint["callbacks"]:
            raise KeyError(self.state_key)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before, dice = self.best_model_score, trainer.callback_metrics.get("val/dice")
        if dice is None or not dice.isnan():
            super().on_train_epoch_end(trainer, pl_module)
        is_end = trainer.current_epoch + 1 == trainer.max_epochs
        if is_end and self.best_model_score is None:
            raise NotFiniteError(
                f"none of {trainer.max_epochs} epochs has a validation Dice: the network puts out NaN on "
                "validation images; a lower lr, or 32-bit precision, may keep it finite"
            )
        due = (
            self.best_model_score is not before or is_end or time.monotonic() - self._saved_at >= self.seconds
        )
        # The clocks of the ranks may disagree, and saving is done together.
        if trainer.strategy.broadcast(due):
            trainer.save_checkpoint(self.last)
            self._saved_at = time.monotonic()


__all__ = ["SaveBestAndLast", "WholeFiles", "foreign_checkpoint", "read_checkpoint"]
