from __future__ import annotations

import io
import re

import pytest
from lightning.pytorch import LightningModule
from rich.console import Console

import fdkernels as fdk
from fdkernels.segmentation.progress import PhaseProgress, epoch_text

METRICS = {"train/segmentation_loss": 0.5, "val/dice": 0.75}
LAYERS = {
    "alpha/enc1": 0.25,
    "alpha/enc2": 0.0,
    "discrepancy_loss/enc1": -1.5,
    "discrepancy_loss/enc2": -2.75,
}


class _Trainer:
    """As much of a Lightning Trainer as the progress line reads."""

    max_epochs = 100
    num_training_batches = 300
    current_epoch = 0

    def __init__(self, metrics):
        self.callback_metrics = metrics


class _Module(LightningModule):
    def __init__(self, criterion):
        super().__init__()
        self.criterion = criterion


def _shown(terminal, epochs, width=80, criterion=None, first=0):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width)
    trainer, module = _Trainer({**METRICS, **LAYERS}), _Module(criterion)
    progress = PhaseProgress("phase 2, alpha active", console)
    trainer.current_epoch = first
    progress.on_train_start(trainer, module)
    for epoch in range(first, first + epochs):
        trainer.current_epoch = epoch
        for batch in range(trainer.num_training_batches):
            progress.on_train_batch_end(trainer, module, None, None, batch)
        progress.on_train_epoch_end(trainer, module)
    progress.on_train_end(trainer, module)
    return console.file.getvalue()


def _active(target=-3.0):
    return fdk.FeatureDiscrepancyLoss(num_layers=2, target=target)


def test_step_time_and_time_left_are_readable_on_80_columns():
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", _shown(terminal=True, epochs=100, criterion=_active()))
    last = [line for line in shown.splitlines() if "phase 2" in line][-1].rpartition("\r")[2]
    assert re.fullmatch(r"phase 2, alpha active \S+ 30000/30000 \d+:\d\d:\d\d < \d+:\d\d:\d\d", last.strip())
    assert len(last) <= 80
    assert "…" not in shown


def test_a_terminal_shows_the_numbers_of_the_last_epoch():
    shown = _shown(terminal=True, epochs=2, criterion=_active())
    assert "L_seg 0.500, validation Dice 0.750" in shown
    assert "alpha 0.000 to 0.250, L -2.750 to -1.500, target -3.00" in shown


def test_a_log_file_gets_a_plain_line_an_epoch():
    lines = _shown(terminal=False, epochs=100, criterion=_active()).splitlines()
    assert len(lines) == 100
    assert re.fullmatch(
        r"phase 2, alpha active: epoch 100/100, step 30000/30000, \d+:\d\d:\d\d < 0:00:00; "
        r"L_seg 0\.500, validation Dice 0\.750; alpha 0\.000 to 0\.250, L -2\.750 to -1\.500, target -3\.00",
        lines[-1],
    )


def test_a_resumed_phase_counts_from_where_it_goes_on():
    lines = _shown(terminal=False, epochs=2, first=98).splitlines()
    assert lines[0].startswith("phase 2, alpha active: epoch 99/100, step 29700/30000, ")


@pytest.mark.parametrize("criterion", [None, fdk.FeatureDiscrepancyLoss(num_layers=2, active=False)])
def test_alpha_is_shown_only_while_it_is_active(criterion):
    assert epoch_text({**METRICS, **LAYERS}, criterion) == ["L_seg 0.500, validation Dice 0.750"]


def test_a_target_is_shown_only_where_alpha_has_one():
    criterion = fdk.FeatureDiscrepancyLoss(num_layers=2, alpha_rule="descent")
    assert epoch_text({**METRICS, **LAYERS}, criterion)[1] == "alpha 0.000 to 0.250, L -2.750 to -1.500"
