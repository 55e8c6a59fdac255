"""Effects with their uncertainty: paired differences of arms, rank tests, and correlations.

SciPy's functions need the extra `report`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from scipy import stats

from fdkernels.segmentation.comparison import SHARE, interval
from fdkernels.segmentation.data import DATASETS
from fdkernels.segmentation.experiments.plan import ScoreRow, Study
from fdkernels.segmentation.summary import worst_off_count

SCORES = ("dice", "iou")


def plain(value: float | None) -> float | None:
    """Make a number one that JSON holds: NaN and infinities are None."""
    return None if value is None or not math.isfinite(value) else float(value)


def mean(values: Iterable[float]) -> float | None:
    """Compute the mean of the finite values; None without any."""
    kept = [value for value in values if math.isfinite(value)]
    return statistics.fmean(kept) if kept else None


def over_seeds(rows: Sequence[ScoreRow], value: Callable[[ScoreRow], float]) -> dict[str, float]:
    """Average a number of each image over the seeds under which it was a test image; by image, in order.

    Images without a finite value are left out.
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        number = value(row)
        if math.isfinite(number):
            found.setdefault(row.sample, []).append(number)
    return {sample: statistics.fmean(found[sample]) for sample in sorted(found)}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values for their number by Holm's method; None stays None and does not count.

    Of m values the k-th smallest (k from 1) is multiplied by m - k + 1; a value is then at least as large as
    those before it, and at most 1.
    """
    known = [index for index, p in enumerate(p_values) if p is not None]
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(known, key=lambda one: p_values[one] or 0.0)):
        largest = max(largest, min(1.0, (len(known) - rank) * (p_values[index] or 0.0)))
        corrected[index] = largest
    return corrected


def paired_test(differences: Sequence[float]) -> dict[str, Any]:
    """Test whether paired differences are symmetric about 0: Wilcoxon's signed-rank test, two-sided.

    Returns:
        "statistic" and "p" by SciPy, pairs without a difference left out; the effect size "rank_biserial",
        (W+ - W-) / (W+ + W-) with W the sums of the ranks of |difference| by sign, from -1 to 1; and the
        number of pairs "improved", "worsened" and "unchanged". The first three are None without a difference.
    """
    values = np.asarray(differences, dtype=np.float64)
    counts = {
        "improved": int((values > 0).sum()),
        "worsened": int((values < 0).sum()),
        "unchanged": int((values == 0).sum()),
    }
    values = values[values != 0]
    if not len(values):
        return {"statistic": None, "p": None, "rank_biserial": None, **counts}
    tested = stats.wilcoxon(values, zero_method="wilcox")
    ranks = stats.rankdata(np.abs(values))
    signed = float((ranks * np.sign(values)).sum() / ranks.sum())
    return {
        "statistic": float(tested.statistic),
        "p": plain(float(tested.pvalue)),
        "rank_biserial": signed,
        **counts,
    }


def difference(
    rows: Sequence[ScoreRow], baseline: Sequence[ScoreRow], value: Callable[[ScoreRow], float]
) -> dict[str, Any]:
    """Compare a number of two arms, image by image and seed by seed: rows minus baseline.

    Returns:
        "mean" over images and seeds; its 95 % "interval" by a bootstrap over patients, with the seeds as
        blocks (None for one patient); and `paired_test` of the images' means over the seeds. All None where
        no image has the number in both arms.
    """
    before = {(row.seed, row.fold, row.sample): value(row) for row in baseline}
    # A run that failed has no rows.
    gains = [
        row._replace(dice=value(row) - before.get((row.seed, row.fold, row.sample), math.nan)) for row in rows
    ]
    gains = [row for row in gains if math.isfinite(row.dice)]
    values, patients, seeds = (
        [row.dice for row in gains],
        [row.patient for row in gains],
        [row.seed for row in gains],
    )
    return {
        "mean": mean(values),
        "interval": interval(values, patients, seeds) if gains else None,
        **paired_test(list(over_seeds(gains, lambda row: row.dice).values())),
    }


def sample_sets(study: Study) -> tuple[dict[str, set[str]], str]:
    """Choose the worst-off, best-off and all test images, and say by which rule.

    The worst-off are those with the lowest Dice, averaged over arms and seeds: chosen by one arm alone, they
    would seem to gain from any other (regression to the mean). Their share is that of Table 1.
    """
    dice = over_seeds(study.rows, lambda row: row.dice)
    chosen = worst_off_count(len(dice), DATASETS.get(study.config.dataset))
    worst = set(sorted(dice, key=lambda sample: (dice[sample], sample))[: chosen.count])
    rule = (
        f"{chosen.count} of {len(dice)} images, those with the lowest Dice in the mean over arms and seeds; "
        f"{chosen.reason}"
    )
    return {"worst_off": worst, "best_off": set(dice) - worst, "all": set(dice)}, rule


def compare_arms(study: Study, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Compare Dice and IoU of arms with their baselines over worst-off, best-off and all test images.

    Args:
        study: the finished experiment.
        pairs: (arm, baseline), each a name.

    Returns:
        "worst_off_rule"; the number of images of each set under "samples"; "means", by arm, set and score;
        and "comparisons", a list with arm, baseline, set, score, what `difference` gives, and "p_holm",
        corrected over all comparisons of the list.
    """
    sets, rule = sample_sets(study)
    names = dict.fromkeys([*(arm.name for arm in study.arms()), *(name for pair in pairs for name in pair)])
    means = {
        arm: {
            name: {
                score: mean(getattr(row, score) for row in study.of_arm(arm) if row.sample in members)
                for score in SCORES
            }
            for name, members in sets.items()
        }
        for arm in names
    }
    found: list[dict[str, Any]] = []
    for arm, baseline in pairs:
        for name, members in sets.items():
            ours, theirs = (
                [row for row in study.of_arm(one) if row.sample in members] for one in (arm, baseline)
            )
            found += [
                {
                    "arm": arm,
                    "baseline": baseline,
                    "set": name,
                    "score": score,
                    **difference(ours, theirs, attrgetter(score)),
                }
                for score in SCORES
            ]
    for one, corrected in zip(found, holm([one["p"] for one in found]), strict=True):
        one["p_holm"] = corrected
    return {
        "worst_off_rule": rule,
        "samples": {name: len(members) for name, members in sets.items()},
        "means": means,
        "comparisons": found,
    }


def layer_means(rows: Sequence[ScoreRow]) -> dict[str, float | None]:
    """Compute the mean L_fd of each layer over images and seeds."""
    layers = rows[0].layer_losses if rows else {}
    return {layer: mean(row.layer_losses[layer] for row in rows) for layer in layers}


def correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """Fit y = slope x + intercept, and correlate the two.

    Returns:
        "samples", "slope", "intercept"; "pearson" and "spearman", each with "r", "p" and the 95 % "interval"
        by Fisher's transformation, with the standard error 1 / sqrt(n - 3) for Pearson's and
        sqrt((1 + r²/2) / (n - 3)) (Bonett and Wright) for Spearman's. All but "samples" are None for fewer
        than 4 points, or where x or y is the same for all.
    """
    if len(x) < 4 or len(set(x)) < 2 or len(set(y)) < 2:
        names = ("slope", "intercept", "pearson", "spearman")
        return {"samples": len(x), **dict.fromkeys(names)}
    line, pearson, spearman = stats.linregress(x, y), stats.pearsonr(x, y), stats.spearmanr(x, y)
    r = float(spearman.statistic)
    errors = {"pearson": 1 / math.sqrt(len(x) - 3), "spearman": math.sqrt((1 + r**2 / 2) / (len(x) - 3))}
    return {
        "samples": len(x),
        "slope": float(line.slope),
        "intercept": float(line.intercept),
        **{
            name: {
                "r": float(one.statistic),
                "p": plain(float(one.pvalue)),
                "interval": fisher_interval(float(one.statistic), errors[name]),
            }
            for name, one in (("pearson", pearson), ("spearman", spearman))
        },
    }


def fisher_interval(r: float, error: float) -> list[float]:
    """Compute the 95 % interval of a correlation by Fisher's transformation: tanh(artanh r ± 1.96 error)."""
    if abs(r) >= 1:
        return [r, r]
    reach = float(stats.norm.ppf((1 + SHARE) / 2)) * error
    return [math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach)]


def loss_of(layer: str) -> Callable[[ScoreRow], float]:
    """Make the function that reads L_fd of a layer from a row."""
    return lambda row: row.layer_losses[layer]


__all__ = [
    "SCORES",
    "compare_arms",
    "correlation",
    "difference",
    "fisher_interval",
    "holm",
    "layer_means",
    "loss_of",
    "mean",
    "over_seeds",
    "paired_test",
    "plain",
    "sample_sets",
]
