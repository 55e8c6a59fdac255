from __future__ import annotations

import io
import logging
import warnings

import pytest
from rich.console import Console

from fdkernels.segmentation.console import quiet_lightning, results_table


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
