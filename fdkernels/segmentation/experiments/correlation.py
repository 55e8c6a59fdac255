"""Dice against L_fd for every layer, before and after the phase with the loss (Figure 1)."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.experiments.effects import correlation, loss_of, over_seeds
from fdkernels.segmentation.experiments.plan import Arm, Experiment, Study

BEFORE = Arm("before", {"fd_loss": True})
AFTER = Arm("after", {"fd_loss": True}, goes_on_from=BEFORE.name)


def arms(config: TrainingConfig, novel_images: int) -> list[Arm]:
    """List the network of the first phase, trained without the loss, and that of the second."""
    return [BEFORE, AFTER]


def results(study: Study) -> dict[str, Any]:
    """Fit Dice by L_fd for each arm and layer; a point is a test image, both numbers its means over seeds."""
    layers = study.rows[0].layer_losses
    found: dict[str, Any] = {}
    for arm in study.arms():
        rows = study.of_arm(arm.name)
        dice = over_seeds(rows, attrgetter("dice"))
        losses = {layer: over_seeds(rows, loss_of(layer)) for layer in layers}
        found[arm.name] = {
            layer: correlation(list(of_layer.values()), [dice[sample] for sample in of_layer])
            for layer, of_layer in losses.items()
        }
    return {"correlation": found}


CORRELATION = Experiment(
    "correlation",
    "Dice against L_fd of each test image, for every layer.",
    arms,
    results,
    least_samples=4,
)

__all__ = ["AFTER", "BEFORE", "CORRELATION", "arms", "results"]
