from __future__ import annotations

import io
import logging
import warnings

import pytest
from lightning.pytorch import LightningModule
from rich.console import Console

from fdkernels.segmentation.console import PhaseProgress, quiet_lightning, results_table


class _Trainer:
    """As much of a Lightning Trainer as the progress line reads."""

    max_epochs = 20
    num_training_batches = 3
    global_step = 0
    current_epoch = 0

    def __init__(self):
        self.callback_metrics = {"train/segmentation_loss": 0.5, "val/dice": 0.75}


def _shown(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    progress, trainer, module = PhaseProgress("phase 1", console), _Trainer(), LightningModule()
    progress.on_train_start(trainer, module)
    for epoch in range(trainer.max_epochs):
        trainer.current_epoch = epoch
        for batch in range(3):
            progress.on_train_batch_end(trainer, module, None, None, batch)
        progress.on_train_epoch_end(trainer, module)
    progress.on_train_end(trainer, module)
    return console.file.getvalue()


def test_a_terminal_shows_a_bar_that_reaches_the_end():
    shown = _shown(terminal=True)
    assert "60/60" in shown
    assert "L_seg 0.500, validation Dice 0.750" in shown


def test_a_log_file_gets_ten_plain_lines():
    lines = _shown(terminal=False).splitlines()
    assert len(lines) == 10
    assert lines[-1] == "phase 1, epoch 20/20: L_seg 0.500, validation Dice 0.750"


def test_only_known_chatter_is_silenced():
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with quiet_lightning():
        assert logger.level == logging.WARNING
        warnings.warn("The 'val_dataloader' does not have many workers", stacklevel=1)
        with pytest.warns(UserWarning, match="every alpha is stuck"):
            warnings.warn("every alpha is stuck", stacklevel=1)
    assert logger.level == level


def test_the_table_shows_both_phases():
    phase = {
        "epochs": 10,
        "best_epoch": 3,
        "validation_dice": 0.5,
        "test": {"dice": 0.25, "iou": 0.125, "images": 7},
    }
    console = Console(file=io.StringIO(), width=120)
    console.print(results_table({"phases": {"warm": phase, "active": phase}}, fd_loss=True))
    shown = console.file.getvalue()
    for text in ("7 test images", "alpha = 0", "alpha active", "3 of 10", "0.2500", "0.1250"):
        assert text in shown
