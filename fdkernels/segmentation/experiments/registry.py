"""The experiments by name."""

from __future__ import annotations

from fdkernels.segmentation.experiments.ablation import ABLATION
from fdkernels.segmentation.experiments.addition import ADDITION
from fdkernels.segmentation.experiments.alpha import ALPHA
from fdkernels.segmentation.experiments.bound import BOUND
from fdkernels.segmentation.experiments.conventions import CONVENTIONS_EXPERIMENT
from fdkernels.segmentation.experiments.correlation import CORRELATION
from fdkernels.segmentation.experiments.mediation import MEDIATION
from fdkernels.segmentation.experiments.plan import Experiment
from fdkernels.segmentation.experiments.qualitative import QUALITATIVE
from fdkernels.segmentation.experiments.shift import SHIFT

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        ABLATION,
        CORRELATION,
        SHIFT,
        ALPHA,
        ADDITION,
        QUALITATIVE,
        BOUND,
        CONVENTIONS_EXPERIMENT,
        MEDIATION,
    )
}

__all__ = ["EXPERIMENTS"]
