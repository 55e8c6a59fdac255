"""The log of a phase: a row an epoch, which belongs to the checkpoint that the phase is resumed from."""

from __future__ import annotations

import csv
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger

from fdkernels.segmentation.runfiles import replacing

# How long a run that is broken off waits for TensorBoard's writer.
_SECONDS_TO_CLOSE = 5.0
_FIRST = "version_0"


class EpochLog(Checkpoint):
    """Write the metrics of each epoch as one row of logs/version_0/metrics.csv, and for TensorBoard.

    A row is on the disk before the checkpoint of its epoch is: what a checkpoint knows is never lost. A
    resumed phase drops the rows of the epochs that it trains again and goes on in the same files, so that
    each epoch has one row and one point of each curve, however often the run was killed. (Lightning logs an
    epoch after its checkpoint, and opens another folder for each resume. The class is a Checkpoint, because
    Lightning calls those last, after the module has logged its epoch, in the order in which they are given.)

    Args:
        folder: of the phase.
        tensorboard: write its event files too, into tensorboard/version_0.
    """

    def __init__(self, folder: Path, tensorboard: bool = False) -> None:
        self.logs = folder / "logs"
        self.path = self.logs / _FIRST / "metrics.csv"
        self.tensorboard = folder / "tensorboard" if tensorboard else None
        self.begun = False
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []
        self._board: InterruptibleTensorBoard | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun = True
        if not trainer.is_global_zero:
            return
        self._rows = [row for row in read_rows(self.logs) if int(row["epoch"]) < trainer.current_epoch]
        self._rewrite()
        # Logs of runs that were resumed by older versions; their rows are in the first file now.
        _remove_others(self.logs)
        if self.tensorboard is not None:
            # Written anew from the rows, since no reader of event files need know which of them still count.
            shutil.rmtree(self.tensorboard, ignore_errors=True)
            self._board = InterruptibleTensorBoard(
                self.tensorboard.parent, name=self.tensorboard.name, version=0
            )
            for row in self._rows:
                self._draw(row)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # On all ranks, which compute the metrics together.
        row = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if trainer.is_global_zero:
            self._append({**row, "epoch": trainer.current_epoch, "step": trainer.global_step - 1})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close("success")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close("failed")

    def _append(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if set(row) <= set(self._columns):
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        else:
            self._rewrite()
        if self._board is not None:
            self._draw(row)
            self._board.save()

    def _rewrite(self) -> None:
        self._columns = sorted({name for row in self._rows for name in row})
        if not self._rows:
            self.path.unlink(missing_ok=True)
            return
        with replacing(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            _write(file, self._columns, self._rows)

    def _draw(self, row: dict[str, Any]) -> None:
        if self._board is not None:
            numbers = {name: float(value) for name, value in row.items() if value != "" and name != "step"}
            self._board.log_metrics(numbers, int(row["step"]))

    def _close(self, status: str) -> None:
        if self._board is not None:
            self._board.finalize(status)
            self._board = None


def read_rows(logs: Path) -> list[dict[str, Any]]:
    """Read the rows of a phase, one an epoch in their order; of an epoch written twice the later counts.

    Cells are text, and empty where an epoch has no such metric. Lines that a kill has cut off are left out.

    Args:
        logs: the folder with version_0, and version_1 and so on where older versions resumed the run.
    """
    rows: dict[int, dict[str, Any]] = {}
    files = (path for path in logs.glob("version_*/metrics.csv") if _version(path.parent) is not None)
    for path in sorted(files, key=lambda path: _version(path.parent) or 0):
        written: dict[int, dict[str, Any]] = {}
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                epoch, step = row.get("epoch") or "", row.get("step") or ""
                if None not in row.values() and epoch.isdecimal() and step.isdecimal():
                    # Older versions wrote validation and training of an epoch as two rows.
                    known = written.setdefault(int(epoch), {})
                    known.update(
                        {name: cell for name, cell in row.items() if cell != "" or name not in known}
                    )
        rows.update(written)
    return [rows[epoch] for epoch in sorted(rows)]


def _write(file: TextIO, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(rows)


def _version(folder: Path) -> int | None:
    number = folder.name.removeprefix("version_")
    return int(number) if number.isdecimal() else None


def _remove_others(logs: Path) -> None:
    for path in logs.glob("version_*"):
        if path.name != _FIRST and _version(path) is not None:
            shutil.rmtree(path, ignore_errors=True)


class InterruptibleTensorBoard(TensorBoardLogger):
    """Lightning's TensorBoardLogger, which after Ctrl-C ends within seconds.

    A Ctrl-C while a value is handed to TensorBoard's writer thread can leave that thread asleep with the
    value unwritten, and closing the log would wait for it for ever.
    """

    def finalize(self, status: str) -> None:
        if status == "success":
            super().finalize(status)
            return
        closing = threading.Thread(target=super().finalize, args=(status,), daemon=True)
        closing.start()
        closing.join(timeout=_SECONDS_TO_CLOSE)


__all__ = ["EpochLog", "InterruptibleTensorBoard", "read_rows"]
