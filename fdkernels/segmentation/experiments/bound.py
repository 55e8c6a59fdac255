"""Whether the bound of lemmas 5 and 7 holds, image by image, and with which k.

Lemma 7 says -log(Dice (k + 1)) <= L_fd = -log FD, thus FD <= Dice (k + 1). Its proof goes as follows, with k'
the ratio of predicted to true foreground, so that Dice (1 + k') / 2 = TP / (TP + FN), the sensitivity:

    FD <= 1 + 2 |S_fg| / |S|            by the triangle inequality; always true
    |S_fg| / |S| <= Dice (1 + k') / 2   "substituting"; true where the foreground's share of the features
                                        is at most the sensitivity
    FD <= 1 + Dice (1 + k')             from both: what the proof shows where the second line is true
    FD <= Dice (1 + k), k = 1 - k'      as stated; it does not follow

The third line is the fourth with k = k' + 1 / Dice, which is not constant. So for each image and layer three
k are looked at: the "stated" 1 - k', the "derived" k' + 1 / Dice, and the "needed", the smallest with which
the inequality is true, FD / Dice - 1. Lemma 5 states the inequality for L_fd of equation 1, here that of the
run's convention; the needed k is then exp(-L_fd) / Dice - 1.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from typing import Any

from fdkernels.segmentation.experiments.correlation import arms
from fdkernels.segmentation.experiments.features import measure
from fdkernels.segmentation.experiments.plan import Experiment, Study
from fdkernels.segmentation.runfiles import replacing
from fdkernels.segmentation.sample_table import cell

LEMMAS = ("lemma5", "lemma7")
# Why the stated inequality fails, in the order in which reasons are looked for.
REASONS = {
    "dice": "Dice is 0, so that the bound is infinite",
    "empty": "the truth has no foreground, so that k' is not defined",
    "negative": "k' is 2 or more, so that 1 + k is not positive",
    "substitution": "the foreground's share of the features is above the sensitivity, so that the proof's "
    "substitution is not true",
    "constant": "FD is at most 1 + Dice (1 + k'), as the proof shows, but above Dice (1 + k) with k = 1 - k'",
    "other": "L_fd of the convention is below the bound, though the proof's FD satisfies it",
}
_COLUMNS = (
    *("arm", "seed", "fold", "patient", "sample", "layer", "dice", "size_ratio", "sensitivity"),
    *("feature_distance", "foreground_share", "stated_k", "derived_k"),
)


def results(study: Study) -> dict[str, Any]:
    """Look at every image and layer; write bound.csv, and count where the inequality is true.

    Returns:
        "lemmas": by lemma, arm and layer, of how many "samples" the inequality "holds" with the stated k, of
        how many with the derived one ("holds_derived"), "needed_k" with its median, maximum and number of
        finite values, and "fails", the number by reason; "reasons" says them in words; "table" names
        bound.csv.
    """
    rows = list(_rows(study))
    with (
        replacing(study.output / "bound.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        columns = [
            *_COLUMNS,
            *(
                f"{lemma}_{what}"
                for lemma in LEMMAS
                for what in ("loss", "holds", "derived", "needed_k", "reason")
            ),
        ]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _text(row[name]) for name in columns} for row in rows)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    return {
        "lemmas": {
            lemma: {
                arm.name: {
                    layer: _count(
                        [row for row in rows if (row["arm"], row["layer"]) == (arm.name, layer)], lemma
                    )
                    for layer in layers
                }
                for arm in study.arms()
            }
            for lemma in LEMMAS
        },
        "reasons": REASONS,
        "table": "bound.csv",
    }


def _rows(study: Study) -> list[dict[str, Any]]:
    found = []
    places = {(row.arm, row.seed, row.fold, row.sample): row for row in study.rows}
    for run in study.runs:
        for image in study.measured.get(run.key) or ():
            row = places[run.arm.name, run.seed, run.fold, image["sample"]]
            for layer, numbers in image["layers"].items():
                found.append(
                    {
                        "arm": row.arm,
                        "seed": row.seed,
                        "fold": row.fold,
                        "patient": row.patient,
                        "sample": row.sample,
                        "layer": layer,
                        **judge(
                            image["dice"],
                            image["size_ratio"],
                            image["sensitivity"],
                            numbers["feature_distance"],
                            numbers["foreground_share"],
                            row.layer_losses[layer],
                        ),
                    }
                )
    return found


def judge(
    dice: float,
    size_ratio: float | None,
    sensitivity: float | None,
    feature_distance: float | None,
    foreground_share: float | None,
    loss: float,
) -> dict[str, Any]:
    """Judge one image and layer under both lemmas.

    Args:
        dice: of the prediction.
        size_ratio: k', predicted over true foreground; None without foreground in the truth.
        sensitivity: TP / (TP + FN); None likewise.
        feature_distance: FD; None where the features add up to 0.
        foreground_share: |S_fg| / |S|; None likewise.
        loss: L_fd in the convention of the run.

    Returns:
        The arguments, "stated_k" and "derived_k", and for each lemma its "_loss", whether it "_holds" with
        the stated k, whether with the "_derived" one, the "_needed_k", and the "_reason" where it does not
        hold: a key of `REASONS`, else None. None where a number is not defined.
    """
    stated = None if size_ratio is None else 1 - size_ratio
    derived = None if size_ratio is None or dice == 0 else size_ratio + 1 / dice
    fd = math.nan if feature_distance is None else feature_distance
    found: dict[str, Any] = {
        "dice": dice,
        "size_ratio": size_ratio,
        "sensitivity": sensitivity,
        "feature_distance": feature_distance,
        "foreground_share": foreground_share,
        "stated_k": stated,
        "derived_k": derived,
    }
    for lemma, distance in (("lemma5", math.exp(min(-loss, 700.0))), ("lemma7", fd)):
        known = math.isfinite(distance)
        holds = known and stated is not None and distance <= dice * (1 + stated)
        reason = None
        if known and not holds:
            reason = _reason(dice, stated, sensitivity, foreground_share, fd, derived)
        found |= {
            f"{lemma}_loss": -math.log(distance) if known and distance > 0 else None,
            f"{lemma}_holds": holds if known else None,
            f"{lemma}_derived": distance <= dice * (1 + derived) if known and derived is not None else None,
            f"{lemma}_needed_k": distance / dice - 1 if known and dice > 0 else None,
            f"{lemma}_reason": reason,
        }
    return found


def _reason(
    dice: float,
    stated: float | None,
    sensitivity: float | None,
    share: float | None,
    fd: float,
    derived: float | None,
) -> str:
    if dice == 0:
        return "dice"
    if stated is None:
        return "empty"
    if 1 + stated <= 0:
        return "negative"
    if share is not None and sensitivity is not None and share > sensitivity:
        return "substitution"
    if derived is not None and dice * (1 + stated) < fd <= dice * (1 + derived):
        return "constant"
    return "other"


def _count(rows: Sequence[dict[str, Any]], lemma: str) -> dict[str, Any]:
    known = [row for row in rows if row[f"{lemma}_holds"] is not None]
    needed = [row[f"{lemma}_needed_k"] for row in known if row[f"{lemma}_needed_k"] is not None]
    reasons = [row[f"{lemma}_reason"] for row in known]
    return {
        "samples": len(known),
        "holds": sum(row[f"{lemma}_holds"] for row in known),
        "holds_derived": sum(row[f"{lemma}_derived"] is True for row in known),
        "needed_k": {
            "median": statistics.median(needed) if needed else None,
            "max": max(needed, default=None),
            "count": len(needed),
        },
        "fails": {reason: reasons.count(reason) for reason in REASONS if reason in reasons},
    }


def _text(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return cell(value) if isinstance(value, float) else "" if value is None else value


BOUND = Experiment(
    "bound",
    "Whether the bound of lemmas 5 and 7 holds for each test image and layer.",
    arms,
    results,
    measure=measure,
)

__all__ = ["BOUND", "LEMMAS", "REASONS", "judge", "results"]
