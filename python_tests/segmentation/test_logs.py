"""The log of a phase belongs to its checkpoint: each epoch has one row, however often the run was killed."""

from __future__ import annotations

import csv

import pytest
from lightning.pytorch import LightningModule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fdkernels.segmentation.checkpoints import SaveBestAndLast
from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.logs import EpochLog, read_rows
from fdkernels.segmentation.train import train
from tiny_data import write_tiny_tnbc


class _Trainer:
    """As much of a Lightning Trainer as the log reads."""

    is_global_zero = True
    current_epoch = 0
    global_step = 0

    def __init__(self):
        self.callback_metrics = {}


def _train(folder, first, last, tensorboard=False, metrics=None):
    """Log the epochs from `first` to `last`, as a phase that is resumed and then killed."""
    log, trainer, module = EpochLog(folder, tensorboard), _Trainer(), LightningModule()
    trainer.current_epoch = first
    log.on_train_start(trainer, module)
    for epoch in range(first, last + 1):
        trainer.current_epoch, trainer.global_step = epoch, 3 * (epoch + 1)
        trainer.callback_metrics = (metrics or {"train/loss": 0.5}) | {"val/dice": epoch / 8}
        log.on_train_epoch_end(trainer, module)
    return log, trainer, module


def _rows(folder):
    with (folder / "logs" / "version_0" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_holds_the_metrics_of_its_epoch(tmp_path):
    _train(tmp_path, 0, 1)
    assert _rows(tmp_path) == [
        {"epoch": "0", "step": "2", "train/loss": "0.5", "val/dice": "0.0"},
        {"epoch": "1", "step": "5", "train/loss": "0.5", "val/dice": "0.125"},
    ]


def test_epochs_that_are_trained_again_have_one_row(tmp_path):
    _train(tmp_path, 0, 5)
    _train(tmp_path, 3, 7)
    assert [int(row["epoch"]) for row in _rows(tmp_path)] == list(range(8))
    assert [float(row["val/dice"]) for row in _rows(tmp_path)] == [epoch / 8 for epoch in range(8)]
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["version_0"]


def test_a_phase_that_begins_anew_drops_the_log_of_the_one_before(tmp_path):
    _train(tmp_path, 0, 5)
    _train(tmp_path, 0, 0)
    assert [row["epoch"] for row in _rows(tmp_path)] == ["0"]


@pytest.mark.parametrize("cut", [1, 3, 12, 20])
def test_a_line_that_a_kill_cut_off_is_trained_again(tmp_path, cut):
    _train(tmp_path, 0, 3)
    path = tmp_path / "logs" / "version_0" / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-cut])
    _train(tmp_path, 3, 4)
    assert [row["epoch"] for row in _rows(tmp_path)] == ["0", "1", "2", "3", "4"]


def test_a_metric_that_comes_later_gets_its_column(tmp_path):
    _train(tmp_path, 0, 1)
    _train(tmp_path, 2, 2, metrics={"train/loss": 0.5, "late": 4.0})
    assert [row["late"] for row in _rows(tmp_path)] == ["", "", "4.0"]


def test_logs_that_older_versions_split_become_one(tmp_path):
    for version, text in (
        # Validation and training had rows of their own; epoch 2 was trained twice.
        (
            "version_0",
            "epoch,step,train/loss,val/dice\n0,2,,0.5\n0,2,3.0,\n1,5,,0.25\n1,5,2.0,\n2,8,,9\n2,8,9,\n",
        ),
        ("version_1", "epoch,step,train/loss,val/dice\n2,8,,0.75\n2,8,1.0,\n"),
    ):
        (tmp_path / "logs" / version).mkdir(parents=True)
        (tmp_path / "logs" / version / "metrics.csv").write_text(text)
    assert [row["train/loss"] for row in read_rows(tmp_path / "logs")] == ["3.0", "2.0", "1.0"]
    _train(tmp_path, 3, 3)
    assert [row["train/loss"] for row in _rows(tmp_path)] == ["3.0", "2.0", "1.0", "0.5"]
    assert [row["val/dice"] for row in _rows(tmp_path)] == ["0.5", "0.25", "0.75", "0.375"]
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["version_0"]


def test_tensorboard_has_one_curve_with_each_epoch_once(tmp_path):
    log, trainer, module = _train(tmp_path, 0, 4, tensorboard=True)
    log.on_exception(trainer, module, KeyboardInterrupt())
    log, trainer, module = _train(tmp_path, 2, 5, tensorboard=True)
    log.on_train_end(trainer, module)
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == ["version_0"]
    files = list((tmp_path / "tensorboard" / "version_0").glob("events.*"))
    assert len(files) == 1  # a reader that takes no heed of purged steps sees no epoch twice either
    events = EventAccumulator(str(files[0]))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("val/dice")] == [
        (3 * epoch + 2, epoch / 8) for epoch in range(6)
    ]


def test_the_row_of_an_epoch_is_written_before_its_checkpoint(tmp_path, monkeypatch):
    seen = []
    save = SaveBestAndLast.on_train_epoch_end

    def look(self, trainer, pl_module):
        folder = self.last.parent
        seen.append((trainer.current_epoch, [int(row["epoch"]) for row in _rows(folder)]))
        assert float(_rows(folder)[-1]["alpha/enc1"]) == float(pl_module.criterion.alpha.detach()[0])
        save(self, trainer, pl_module)

    monkeypatch.setattr(SaveBestAndLast, "on_train_epoch_end", look)
    config = TrainingConfig(
        dataset="tnbc",
        data=str(write_tiny_tnbc(tmp_path / "data")),
        output=str(tmp_path / "run"),
        base_channels=2,
        size=32,
        batch_size=2,
        epochs_warm=2,
        epochs_active=1,
        limit_batches=1,
        accelerator="cpu",
        tensorboard=False,
    )
    train(config, progress=False)
    assert seen == [(0, [0]), (1, [0, 1]), (0, [0])]


def test_other_ranks_write_nothing(tmp_path):
    log, trainer = EpochLog(tmp_path, tensorboard=True), _Trainer()
    trainer.is_global_zero = False
    log.on_train_start(trainer, LightningModule())
    log.on_train_epoch_end(trainer, LightningModule())
    assert list(tmp_path.iterdir()) == []
