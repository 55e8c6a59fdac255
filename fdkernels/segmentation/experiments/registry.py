"""The experiments by name."""

from __future__ import annotations

from fdkernels.segmentation.experiments.ablation import ABLATION
from fdkernels.segmentation.experiments.alpha import ALPHA
from fdkernels.segmentation.experiments.conventions import CONVENTIONS_EXPERIMENT
from fdkernels.segmentation.experiments.plan import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment for experiment in (ABLATION, ALPHA, CONVENTIONS_EXPERIMENT)
}

__all__ = ["EXPERIMENTS"]
