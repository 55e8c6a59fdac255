"""The readings of the loss and the rules of alpha side by side, each against no loss."""

from __future__ import annotations

from typing import Any

from fdkernels.alpha import ALPHA_RULES
from fdkernels.conventions import CONVENTIONS
from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.experiments.effects import compare_arms, layer_means
from fdkernels.segmentation.experiments.plan import FIRST_PHASE, Arm, Experiment, Study

NONE = "none"


def arms(config: TrainingConfig, novel_images: int) -> list[Arm]:
    """List no loss, each convention under the given rule, and each other rule under the given convention."""
    pairs = [(convention, config.alpha_rule) for convention in CONVENTIONS]
    pairs += [(config.convention, rule) for rule in ALPHA_RULES if rule != config.alpha_rule]
    return [
        FIRST_PHASE,
        Arm(NONE, {"fd_loss": False}, goes_on_from=FIRST_PHASE.name),
        *(
            Arm(
                f"{convention}-{rule}",
                {"convention": convention, "alpha_rule": rule},
                goes_on_from=FIRST_PHASE.name,
            )
            for convention, rule in pairs
        ),
    ]


def results(study: Study) -> dict[str, Any]:
    """Compare each arm with no loss, p-values corrected over all of them; give L_fd of each layer.

    L_fd is in each arm's own convention, so that it compares within an arm alone.
    """
    names = [arm.name for arm in study.arms()]
    return {
        **compare_arms(study, [(name, NONE) for name in names if name != NONE]),
        "discrepancy_loss": {name: layer_means(study.of_arm(name)) for name in names},
    }


CONVENTIONS_EXPERIMENT = Experiment(
    "conventions",
    "Conventions of the loss and rules of alpha side by side, each against no loss.",
    arms,
    results,
)

__all__ = ["CONVENTIONS_EXPERIMENT", "NONE", "arms", "results"]
