"""Images of a second data set added to the first in batches, under three methods (Figure 6)."""

from __future__ import annotations

from typing import Any

from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.experiments.effects import compare_arms
from fdkernels.segmentation.experiments.plan import FIRST_PHASE, Arm, Experiment, Study

# By method the fields that it sets.
METHODS: dict[str, dict[str, Any]] = {
    "none": {"fd_loss": False},
    "fd": {"fd_loss": True},
    "fd_exchange": {"fd_loss": True, "exchange": "pooled"},
}
# Images that are added at a time, by base and second data set (section 4); ten for others.
STEPS = {("tnbc", "monuseg"): 10, ("us-tnbc", "udiat"): 15}
_USUAL_STEP = 10
_NO_SECOND = dict.fromkeys(("novel_dataset", "novel_data", "novel_images", "novel_mask_values"))


def numbers(config: TrainingConfig, novel_images: int) -> list[int]:
    """List how many images are added: 0, then batch by batch, up to novel_images or all.

    Args:
        config: names both data sets; its novel_images is the most to add.
        novel_images: images of the second data set.
    """
    step = STEPS.get((config.dataset, config.novel_dataset or ""), _USUAL_STEP)
    most = novel_images if config.novel_images is None else min(config.novel_images, novel_images)
    return [*range(0, most, step), most]


def arms(config: TrainingConfig, novel_images: int) -> list[Arm]:
    """List a first phase for each number of images, and the three methods that go on from it.

    Without an image of the second data set there is nothing to exchange with: L_fd alone stands for both.
    """
    found = []
    for count in numbers(config, novel_images):
        added: dict[str, Any] = {"novel_images": count} if count else _NO_SECOND
        first = Arm(f"{FIRST_PHASE.name}+{count}", {"fd_loss": True, **added}, scored=False)
        found.append(first)
        for method, fields in METHODS.items():
            if count or method != "fd_exchange":
                found.append(Arm(f"{method}+{count}", {**fields, **added}, goes_on_from=first.name))
    return found


def arm_of(method: str, count: int) -> str:
    """Name the arm that stands for a method and a number of added images."""
    return f"{'fd' if method == 'fd_exchange' and not count else method}+{count}"


def results(study: Study) -> dict[str, Any]:
    """Compare the methods on the test images of the base.

    Returns:
        "curves" by method: a list with "images", "arm", and mean "dice" and "iou" over all test images; and
        what `compare_arms` gives for each method against no penalty at the same number of images, and
        against itself without any.
    """
    counts = sorted({int(arm.name.partition("+")[2]) for arm in study.arms()})
    pairs = [
        (arm_of(method, count), arm_of("none", count))
        for count in counts
        for method in METHODS
        if method != "none"
    ]
    pairs += [(arm_of(method, count), arm_of(method, 0)) for count in counts[1:] for method in METHODS]
    compared = compare_arms(study, list(dict.fromkeys(pairs)))
    curves = {
        method: [
            {"images": count, "arm": arm_of(method, count), **compared["means"][arm_of(method, count)]["all"]}
            for count in counts
        ]
        for method in METHODS
    }
    return {"curves": curves, **compared}


ADDITION = Experiment(
    "addition",
    "Images of a second data set added in batches, under three methods.",
    arms,
    results,
    sets=("fd_loss", "exchange"),
    needs_second_data=True,
)

__all__ = ["ADDITION", "METHODS", "arm_of", "arms", "numbers", "results"]
