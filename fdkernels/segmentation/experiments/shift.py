"""Dice and L_fd of the test images before and after the phase with the loss (Figure 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from fdkernels.segmentation.experiments.correlation import AFTER, BEFORE, arms
from fdkernels.segmentation.experiments.effects import compare_arms, difference, loss_of, mean
from fdkernels.segmentation.experiments.features import feature_means, measure
from fdkernels.segmentation.experiments.plan import Experiment, ScoreRow, Study

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def results(study: Study) -> dict[str, Any]:
    """Describe both distributions of Dice and of each layer's L_fd, and their shift.

    Returns:
        What `compare_arms` gives for Dice and IoU; "discrepancy_loss" by layer and "dice", each with the
        quantiles "before" and "after" and the "shift", which `difference` gives; and "features", of
        `feature_means`: whether the features are merely inflated.
    """
    before, after = study.of_arm(BEFORE.name), study.of_arm(AFTER.name)
    values: dict[str, Callable[[ScoreRow], float]] = {"dice": attrgetter("dice")}
    values |= {layer: loss_of(layer) for layer in study.rows[0].layer_losses}
    shifts = {
        name: {
            "before": quantiles([value(row) for row in before]),
            "after": quantiles([value(row) for row in after]),
            "shift": difference(after, before, value),
        }
        for name, value in values.items()
    }
    return {
        **compare_arms(study, [(AFTER.name, BEFORE.name)]),
        "dice": shifts.pop("dice"),
        "discrepancy_loss": shifts,
        "features": feature_means(study),
    }


def quantiles(values: Sequence[float]) -> dict[str, float | None]:
    """Compute mean and quantiles of the finite values, by name: "mean", "0.05" to "0.95"."""
    kept = [value for value in values if np.isfinite(value)]
    found = np.quantile(kept, QUANTILES).tolist() if kept else [None] * len(QUANTILES)
    return {"mean": mean(kept), **dict(zip(map(str, QUANTILES), found, strict=True))}


SHIFT = Experiment(
    "shift",
    "Distributions of Dice and L_fd before and after the phase with the loss.",
    arms,
    results,
    measure=measure,
)

__all__ = ["SHIFT", "quantiles", "results"]
