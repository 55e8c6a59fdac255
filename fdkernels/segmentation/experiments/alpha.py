"""Alpha and L_fd of each layer over the training, under each rule of alpha (Figure 5)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from fdkernels.alpha import ALPHA_RULES
from fdkernels.segmentation.config import PHASES, TrainingConfig
from fdkernels.segmentation.demo_figure import layer_history
from fdkernels.segmentation.experiments.effects import SCORES, mean
from fdkernels.segmentation.experiments.plan import FIRST_PHASE, Arm, Experiment, PlannedRun, Study
from fdkernels.segmentation.saved_runs import read_result

KINDS = ("alpha", "discrepancy_loss")


def arms(config: TrainingConfig, novel_images: int) -> list[Arm]:
    """List the first phase and an arm for each rule."""
    return [
        FIRST_PHASE,
        *(Arm(rule, {"alpha_rule": rule}, goes_on_from=FIRST_PHASE.name) for rule in ALPHA_RULES),
    ]


def results(study: Study) -> dict[str, Any]:
    """Give both numbers of each layer over the epochs, the mean over seeds and folds, and the final alpha.

    Returns:
        "history" by rule and layer: "phase" and "epoch" of each point, "alpha" and "discrepancy_loss";
        "final" by rule: "alpha" by layer with mean, min and max over the runs, the "strongest" layer, and
        the "targets" of the runs; "means" of Dice and IoU by rule.
    """
    history, final = {}, {}
    for arm in study.arms():
        runs = [run for run in study.runs if run.arm.name == arm.name]
        history[arm.name] = _history(runs)
        final[arm.name] = _final(runs)
    means = {
        arm.name: {score: mean(getattr(row, score) for row in study.of_arm(arm.name)) for score in SCORES}
        for arm in study.arms()
    }
    return {"history": history, "final": final, "means": means}


def _history(runs: Sequence[PlannedRun]) -> dict[str, dict[str, list[Any]]]:
    """Average over runs what their logs say of each epoch."""
    logged = {kind: [layer_history(run.folder, kind) for run in runs] for kind in KINDS}
    layers = {layer: None for one in logged["alpha"] for layer in one["active"]}
    found: dict[str, dict[str, list[Any]]] = {}
    for layer in layers:
        points: dict[str, list[Any]] = {"phase": [], "epoch": [], **{kind: [] for kind in KINDS}}
        for phase in PHASES:
            curves = {kind: [one[phase].get(layer, []) for one in logged[kind]] for kind in KINDS}
            epochs = min(len(curve) for kind in KINDS for curve in curves[kind])
            points["phase"] += [phase] * epochs
            points["epoch"] += range(1, epochs + 1)
            for kind in KINDS:
                points[kind] += [statistics.fmean(at) for at in zip(*curves[kind], strict=False)][:epochs]
        found[layer] = points
    return found


def _final(runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """Read alpha at the end of the second phase from each run's result."""
    read = [read_result(run.folder / "active" / "result.json") for run in runs]
    layers = {
        layer: {
            "mean": statistics.fmean(one["final_alpha"][layer] for one in read),
            "min": min(one["final_alpha"][layer] for one in read),
            "max": max(one["final_alpha"][layer] for one in read),
        }
        for layer in read[0]["final_alpha"]
    }
    return {
        "alpha": layers,
        "strongest": max(layers, key=lambda layer: layers[layer]["mean"]),
        "targets": [one.get("alpha_target") for one in read],
    }


ALPHA = Experiment(
    "alpha",
    "Alpha and L_fd of each layer over the training, for each rule of alpha.",
    arms,
    results,
    sets=("fd_loss", "alpha_rule"),
)

__all__ = ["ALPHA", "arms", "results"]
