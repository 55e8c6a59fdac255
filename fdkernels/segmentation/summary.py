"""Summarize the scores of many samples: worst-off, best-off and all, folds, and Dice against L_fd."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from fdkernels.segmentation.comparison import compare, mean_dice
from fdkernels.segmentation.data import DatasetPreset
from fdkernels.segmentation.metrics import COUNTS, SCORES, pooled_scores
from fdkernels.segmentation.scoring import SampleScores

SETS = ("worst_off", "best_off", "all")

# The share of Table 1's two nearest data sets, TNBC (10 of 50) and UDIAT (35 of 163).
_USUAL_SHARE = (1, 5)


@dataclass(frozen=True)
class WorstOff:
    """The number of worst-off samples, and its reason.

    Attributes:
        count: number of samples.
        reason: for the summary, one clause.
    """

    count: int
    reason: str


def worst_off_count(samples: int, preset: DatasetPreset | None = None, asked: int | None = None) -> WorstOff:
    """Compute the number of worst-off samples among `samples`.

    Table 1 counts the worst-off among all images of a data set, each of which is a test image once
    in five folds. A part of them has the same share:

        count = max(1, round(samples · worst-off of Table 1 / images of Table 1))

    Args:
        samples: number of samples, at least 1.
        preset: of the data set; without one, or where Table 1 lacks it, the share is a fifth.
        asked: the number that the user gave.

    Raises:
        ValueError: `asked` is below 1 or above the number of samples.
    """
    if asked is not None:
        if not 1 <= asked <= samples:
            raise ValueError(f"worst_off must be from 1 to the number of samples, {samples}, got {asked}")
        return WorstOff(asked, "as asked for")
    if preset is None or preset.worst_off is None or preset.all_samples is None:
        worst, total = _USUAL_SHARE
        reason = "a fifth, since Table 1 does not have the data set"
    else:
        worst, total = preset.worst_off, preset.all_samples
        reason = f"the share of {worst} of {total} in Table 1"
    return WorstOff(min(max(1, round(samples * worst / total)), samples), reason)


def worst_off(
    rows: Sequence[SampleScores], count: int, baseline: Sequence[SampleScores] = ()
) -> set[tuple[int, str, str]]:
    """Find the keys of the `count` samples with the lowest Dice (`mean_dice`); ties go to the first key."""
    dice = mean_dice(rows, baseline)
    return set(sorted(dice, key=lambda key: (dice[key], key))[:count])


def describe(values: Iterable[float]) -> dict[str, Any]:
    """Compute mean, standard deviation (n - 1) and number of the finite values.

    Undefined values (mean of none, deviation of one) are None.
    """
    kept = [value for value in values if math.isfinite(value)]
    return {
        "mean": statistics.fmean(kept) if kept else None,
        "std": statistics.stdev(kept) if len(kept) > 1 else None,
        "count": len(kept),
    }


def _of_set(rows: Sequence[SampleScores]) -> dict[str, Any]:
    pooled = None
    if rows:
        pooled = pooled_scores(
            {name: torch.tensor([row.counts[name] for row in rows], device="cpu") for name in COUNTS}
        )
    return {
        "images": len(rows),
        **{name: describe(row.scores[name] for row in rows) for name in (*SCORES, "foreground_share")},
        "pooled": pooled,
    }


def of_sets(
    rows: Sequence[SampleScores], worst: Collection[tuple[int, str, str]]
) -> dict[str, dict[str, Any]]:
    """Summarize each score over the worst-off samples, over the best-off (all others) and over all.

    References:
        Tables 1 and 2: "the worst-off samples are the test samples with the lower dice scores".
    """
    return {
        "worst_off": _of_set([row for row in rows if row.key in worst]),
        "best_off": _of_set([row for row in rows if row.key not in worst]),
        "all": _of_set(rows),
    }


def of_folds(rows: Sequence[SampleScores]) -> dict[str, Any]:
    """Compute mean Dice and IoU of each fold, and mean and deviation of these means over the folds."""
    by_fold: dict[int, list[SampleScores]] = {}
    for row in rows:
        by_fold.setdefault(row.fold or 0, []).append(row)
    means = {
        str(fold): {
            "images": len(members),
            **{name: statistics.fmean(row.scores[name] for row in members) for name in ("dice", "iou")},
        }
        for fold, members in sorted(by_fold.items())
    }
    return {
        "each": means,
        **{name: describe(fold[name] for fold in means.values()) for name in ("dice", "iou")},
    }


def of_layers(rows: Sequence[SampleScores]) -> dict[str, dict[str, Any]]:
    """Summarize L_fd of each layer: mean, deviation, and its correlation with Dice over the samples.

    "pearson" and "spearman" correlate Dice with L_fd over the "count" samples where L_fd is
    finite; they are None for fewer than two, or where either is the same for all.

    References:
        Figure 1.
    """
    found = {}
    for name in rows[0].layer_losses if rows else ():
        pairs = [
            (row.scores["dice"], row.layer_losses[name])
            for row in rows
            if math.isfinite(row.layer_losses[name])
        ]
        found[name] = {**describe(loss for _, loss in pairs), **_correlations(pairs)}
    return found


def _correlations(pairs: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    if len({dice for dice, _ in pairs}) < 2 or len({loss for _, loss in pairs}) < 2:
        return {"pearson": None, "spearman": None}
    dice, losses = torch.tensor(pairs, dtype=torch.float64, device="cpu").unbind(dim=1)  # [N] each
    # Neither value depends on the scale; at unit scale torchmetrics takes no deviation for zero.
    dice, losses = ((values - values.mean()) / values.std() for values in (dice, losses))
    return {
        "pearson": pearson_corrcoef(dice, losses).item(),
        "spearman": spearman_corrcoef(dice, losses).item(),
    }


def differences(
    ours: Mapping[str, Mapping[str, Any]], theirs: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float | None]]:
    """Subtract mean Dice and IoU of each set, ours minus theirs; None for an empty set."""
    return {
        name: {
            score: None
            if ours[name][score]["mean"] is None
            else ours[name][score]["mean"] - theirs[name][score]["mean"]
            for score in ("dice", "iou")
        }
        for name in SETS
    }


def of_phase(
    rows: Sequence[SampleScores],
    baseline: Sequence[SampleScores],
    preset: DatasetPreset | None,
    asked: int | None,
) -> dict[str, Any]:
    """Summarize one phase: sets, folds, L_fd by layer, and the differences to a baseline.

    The sets are chosen by the mean Dice of both runs if there is a baseline, so that both are compared
    on the same samples and neither gains from the choice. They count images in their own orientation
    alone; the correlation with L_fd takes the other symmetries as well, where these were scored.
    (Section 3.1 also selects the worst-off with these symmetries, but Table 1 counts images; so do the
    sets.)
    """
    plain, compared = ([row for row in part if row.symmetry == "identity"] for part in (rows, baseline))
    chosen = worst_off_count(len(plain), preset, asked)
    worst = worst_off(plain, chosen.count, compared)
    where = " in the mean of both runs" if compared else ""
    summary: dict[str, Any] = {
        "worst_off_rule": f"{chosen.count} of {len(plain)} images, those with the lowest Dice{where}; "
        f"{chosen.reason}",
        "sets": of_sets(plain, worst),
    }
    if any(row.fold for row in plain):
        summary["folds"] = of_folds(plain)
    summary["discrepancy_loss"] = of_layers(rows)
    if compared:
        summary["baseline"] = {"sets": of_sets(compared, worst), "discrepancy_loss": of_layers(baseline)}
        summary["difference"] = differences(summary["sets"], summary["baseline"]["sets"])
        keys = {row.key for row in plain}
        sets = {"worst_off": worst, "best_off": keys - worst, "all": keys}
        summary["comparison"] = compare(plain, compared, sets)
    return summary


__all__ = [
    "SETS",
    "WorstOff",
    "describe",
    "differences",
    "of_folds",
    "of_layers",
    "of_phase",
    "of_sets",
    "worst_off",
    "worst_off_count",
]
