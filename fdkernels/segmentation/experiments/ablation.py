"""With and without the loss, from the same first phase and with equal steps (Table 2)."""

from __future__ import annotations

from typing import Any

from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.experiments.effects import compare_arms, layer_means
from fdkernels.segmentation.experiments.features import feature_means, measure
from fdkernels.segmentation.experiments.plan import FIRST_PHASE, Arm, Experiment, Study

WITHOUT = Arm("without", {"fd_loss": False}, goes_on_from=FIRST_PHASE.name)
WITH = Arm("with", {"fd_loss": True}, goes_on_from=FIRST_PHASE.name)


def arms(config: TrainingConfig, novel_images: int) -> list[Arm]:
    """List the first phase and the two arms that go on from it."""
    return [FIRST_PHASE, WITHOUT, WITH]


def results(study: Study) -> dict[str, Any]:
    """Compare the arms over worst-off, best-off and all test images; give features and L_fd of each layer."""
    return {
        **compare_arms(study, [(WITH.name, WITHOUT.name)]),
        "features": feature_means(study),
        "discrepancy_loss": {arm.name: layer_means(study.of_arm(arm.name)) for arm in study.arms()},
    }


ABLATION = Experiment(
    "ablation", "With and without the loss, from the same first phase.", arms, results, measure=measure
)

__all__ = ["ABLATION", "WITH", "WITHOUT", "arms", "results"]
