"""Compare the arms of an experiment: a table like Table 2, and its differences as a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

from fdkernels.segmentation.report.drawing import COLOURS, drawn, grid, legend_below, png
from fdkernels.segmentation.report.experiment import SETS, Difference, Experiment, difference
from fdkernels.segmentation.report.page import (
    EMPTY,
    Block,
    Picture,
    Table,
    interval_text,
    is_number,
    number,
)

SCORES = {"dice": "Dice", "iou": "IoU"}
_MARKS = {"worst_off": "v", "best_off": "^", "all": "o"}


class Compared(NamedTuple):
    """An arm's differences to its baseline on a set, by score."""

    arm: str
    baseline: str
    chosen: str
    by_score: dict[str, Difference | None]


def compared(experiment: Experiment) -> Iterator[Compared]:
    """Compare arms on every set, each with its baseline."""
    for arm, baseline in experiment.pairs.items():
        rows, before = experiment.of_arm(arm), experiment.of_arm(baseline)
        for chosen in SETS:
            samples = experiment.samples_of(chosen)
            by_score = {score: difference(rows, before, samples, score) for score in SCORES}
            yield Compared(arm, baseline, chosen, by_score)


def arms_blocks(prefix: str, experiment: Experiment) -> list[Block]:
    """Give the table and the figure."""
    if not experiment.rows:
        return []
    found = list(compared(experiment))
    blocks: list[Block] = [_table(experiment, found)]
    if any(one.by_score["dice"] for one in found):
        blocks.append(_figure(f"{prefix}-differences", experiment, found))
    return blocks


def corrected(experiment: Experiment) -> dict[tuple[str, str, str], float]:
    """Read the p-values of the experiment's own test by arm, set and score, corrected for their number."""
    return {
        (str(one.get("arm")), str(one.get("set")), str(one.get("score"))): float(one["p_holm"])
        for one in experiment.comparisons
        if is_number(one.get("p_holm")) and one.get("baseline") == experiment.pairs.get(str(one.get("arm")))
    }


def _named(experiment: Experiment) -> str:
    """Name the baseline of all arms, or say that each has its own."""
    baselines = set(experiment.pairs.values())
    return baselines.pop() if len(baselines) == 1 else "the arm that it is compared with"


def _table(experiment: Experiment, found: Sequence[Compared]) -> Table:
    by_place = {(one.arm, one.chosen): one.by_score for one in found}
    tested = corrected(experiment)
    several = len(set(experiment.pairs.values())) > 1
    rows = []
    for chosen, title in SETS.items():
        samples = experiment.samples_of(chosen)
        for arm in experiment.arms:
            kept = [row for row in experiment.of_arm(arm) if row.sample in samples]
            counts = (str(len({getattr(row, name) for row in kept})) for name in ("sample", "patient"))
            cells = [title, arm, *([experiment.pairs.get(arm, EMPTY)] if several else []), *counts]
            for score in SCORES:
                cells.append(number(100 * fmean(getattr(row, score) for row in kept), 2) if kept else EMPTY)
                gain = by_place.get((arm, chosen), {}).get(score)
                if experiment.pairs:
                    cells.append(EMPTY if gain is None else number(gain.mean, 2, signed=True))
                    cells.append(EMPTY if gain is None else interval_text(gain.ends, 2))
                if tested:
                    cells.append(number(tested.get((arm, chosen, score)), 3))
            rows.append(tuple(cells))
    names = SCORES.values()
    headings = [heading for name in names for heading in (name, f"Δ {name}", "95 % interval", "p")]
    if not experiment.pairs:
        headings = list(names)
    elif not tested:
        headings = [heading for heading in headings if heading != "p"]
    return Table(
        _caption(experiment, bool(tested)),
        ("samples", "arm", *(["compared with"] if several else []), "images", "patients", *headings),
        tuple(rows),
        texts=3 if several else 2,
    )


def _caption(experiment: Experiment, tested: bool) -> str:
    sentences = ["Dice and IoU in percent, means over samples and seeds."]
    if experiment.pairs:
        sentences.append(
            f"Δ is the difference to {_named(experiment)} on the same samples, seeds and folds, in points, "
            "with its interval by a bootstrap over patients, each with all its samples, and over seeds."
        )
    if tested:
        sentences.append(
            "p is that of Wilcoxon's signed-rank test over the images' means, corrected for the number of "
            "comparisons by Holm's method."
        )
    sentences.append(
        "Worst-off are the samples with the lowest Dice in the mean over all arms and seeds, best-off the "
        "others."
    )
    return " ".join(sentences)


def _figure(name: str, experiment: Experiment, found: Sequence[Compared]) -> Picture:
    arms = list(dict.fromkeys(one.arm for one in found))
    with drawn():
        figure, axes = grid(2, columns=2, height=1.2 + 0.75 * len(arms))
        for axis, (score, title) in zip(axes, SCORES.items(), strict=True):
            axis.axvline(0, color="0.35", linewidth=1)
            for one in found:
                gain = one.by_score[score]
                if gain is None:
                    continue
                place = arms.index(one.arm) + 0.25 * (list(SETS).index(one.chosen) - 1)
                colour = COLOURS[list(SETS).index(one.chosen)]
                if gain.ends is not None:
                    axis.plot(gain.ends, (place, place), color=colour, linewidth=2)
                label = SETS[one.chosen] if one.arm == arms[0] else None
                axis.plot(gain.mean, place, _MARKS[one.chosen], color=colour, markersize=7, label=label)
            axis.set_yticks(range(len(arms)), arms if axis is axes[0] else [""] * len(arms))
            axis.set_ylim(len(arms) - 0.5, -0.5)
            axis.grid(visible=False, axis="y")
            axis.set_xlabel(f"Δ {title} in points")
        legend_below(figure, axes[0], 3)
        content = png(figure)
    said = "; ".join(
        f"{one.arm}, {SETS[one.chosen]}: {number(gain.mean, 2, signed=True)}"
        for one in found
        if (gain := one.by_score["dice"]) is not None
    )
    return Picture(
        name,
        content,
        f"Difference to {_named(experiment)} in Dice (left) and IoU (right) with 95 % intervals. An "
        "interval that crosses the line at 0 leaves open whether there is a difference.",
        f"Points with intervals for each arm and set of samples. Differences of Dice in points: {said}.",
    )


__all__ = ["SCORES", "Compared", "arms_blocks", "compared", "corrected"]
