"""Compare two runs on the same images: the difference with its interval, and images that improved."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from fdkernels.segmentation.scoring import SampleScores

Key = tuple[int, str, str]

DRAWS = 10_000
SHARE = 0.95
SEED = 0


def mean_dice(rows: Sequence[SampleScores], baseline: Sequence[SampleScores]) -> dict[Key, float]:
    """Compute the Dice of each image, with a baseline the mean of both runs.

    Images that are worst under one run are so partly by chance, and score better under any other run:
    chosen by the baseline's Dice, the worst-off would seem to gain from nothing (regression to the
    mean). Their mean favours neither run.
    """
    dice = {row.key: row.scores["dice"] for row in rows}
    for row in baseline:
        dice[row.key] = (dice[row.key] + row.scores["dice"]) / 2
    return dice


def interval(
    differences: Sequence[float], groups: Sequence[str], blocks: Sequence[int] | None = None
) -> list[float] | None:
    """Compute the 95 % interval of the mean of `differences` by a bootstrap over groups.

    Draws as many groups as there are, with replacement and all values of each, 10,000 times, and takes
    the 2.5 % and 97.5 % quantiles of the means. With blocks these are drawn in the same way, each whole, and
    a value counts as often as its group and its block were drawn, multiplied. The draws are the same in each
    call.

    Args:
        differences: one value an image, or an image and block.
        groups: the patient of each; images of one patient are not independent.
        blocks: the seed of each, where several networks were scored on the images: all images share what
            one seed does to them.

    Returns:
        The two ends, or None for fewer than two groups.
    """
    names, place = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        return None
    values = np.asarray(differences, dtype=np.float64)
    seeds, row = np.unique(np.zeros(len(values)) if blocks is None else blocks, return_inverse=True)
    shape, flat = (len(seeds), len(names)), row * len(names) + place
    sums = np.bincount(flat, values, minlength=shape[0] * shape[1]).reshape(shape)  # [B, G]
    sizes = np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape)  # [B, G]
    generator = np.random.default_rng(SEED)
    drawn, together = (
        generator.multinomial(count, np.full(count, 1 / count), DRAWS) for count in (len(names), len(seeds))
    )  # [DRAWS, G] and [DRAWS, B]
    sizes_drawn = (drawn @ sizes.T * together).sum(axis=1)  # [DRAWS]
    # A seed need not have seen every patient: a draw without any value has no mean.
    kept = sizes_drawn > 0
    means = (drawn @ sums.T * together).sum(axis=1)[kept] / sizes_drawn[kept]
    low, high = np.quantile(means, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return [float(low), float(high)]


def compare(
    rows: Sequence[SampleScores], baseline: Sequence[SampleScores], sets: Mapping[str, Collection[Key]]
) -> dict[str, Any]:
    """Compare a run with its baseline, image by image.

    Args:
        rows, baseline: of the same images.
        sets: the keys of the images of each set.

    Returns:
        "resampled", what was drawn for the intervals, and for each set the "dice" and "iou" interval of
        the mean difference, run minus baseline, and the number of images whose Dice "improved",
        "worsened" or is "unchanged".
    """
    before = {row.key: row for row in baseline}
    patients = {(row.fold or 0, row.patient) for row in rows}
    unit = "patients" if len(patients) < len(rows) else "images"
    found: dict[str, Any] = {"resampled": unit}
    for name, keys in sets.items():
        members = [row for row in rows if row.key in keys]
        groups = [f"{row.fold or 0} {row.patient if unit == 'patients' else row.image}" for row in members]
        gains = {
            score: [row.scores[score] - before[row.key].scores[score] for row in members]
            for score in ("dice", "iou")
        }
        found[name] = {
            **{score: interval(values, groups) for score, values in gains.items()},
            "improved": sum(gain > 0 for gain in gains["dice"]),
            "worsened": sum(gain < 0 for gain in gains["dice"]),
            "unchanged": sum(gain == 0 for gain in gains["dice"]),
        }
    return found


__all__ = ["compare", "interval", "mean_dice"]
