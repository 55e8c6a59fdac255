"""The figures of single experiments, made from scores.csv and the logs of the runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from statistics import fmean, quantiles, stdev

import numpy as np

from fdkernels.segmentation.comparison import interval
from fdkernels.segmentation.report.curves import layer_bars, layer_curves, mean_final
from fdkernels.segmentation.report.drawing import COLOURS, drawn, grid, legend_below, png, style
from fdkernels.segmentation.report.experiment import Experiment, ScoreRow, over_seeds
from fdkernels.segmentation.report.page import Block, Notes, Picture, Table, interval_text, number
from fdkernels.segmentation.report.runs import ReportedRun, in_depth
from fdkernels.segmentation.report.statistics import correlation, correlation_interval, regression

MOST_ARMS = 6
_BATCH = re.compile(r"(?P<method>.*?)[-_ /+]*(?P<images>\d+)")


def correlation_blocks(prefix: str, experiment: Experiment) -> list[Block]:
    """Draw Dice against L_fd of every sample and layer, with regression line and correlation (figure 1)."""
    blocks: list[Block] = []
    for place, arm in enumerate(experiment.arms[:MOST_ARMS], start=1):
        rows = over_seeds(experiment.of_arm(arm))
        layers = [layer for layer in experiment.layers if any(layer in row.losses for row in rows)]
        if layers:
            blocks += _correlation_of(f"{prefix}-correlation-{place}", arm, rows, layers)
    return blocks


def _correlation_of(name: str, arm: str, rows: Sequence[ScoreRow], layers: Sequence[str]) -> list[Block]:
    lines = []
    with drawn():
        figure, axes = grid(len(layers), columns=3, height=2.7)
        for axis, layer in zip(axes, layers, strict=True):
            kept = [row for row in rows if layer in row.losses]
            x, y = [row.losses[layer] for row in kept], [row.dice for row in kept]
            r, line = correlation(x, y), regression(x, y)
            ends = correlation_interval(x, y, [row.patient for row in kept])
            axis.plot(x, y, "o", color=COLOURS[0], markersize=3, alpha=0.5, markeredgewidth=0)
            if line is not None:
                across = np.array([min(x), max(x)])
                axis.plot(across, line[0] * across + line[1], color=COLOURS[1], linewidth=2)
            axis.set_title(f"{layer}: r = {number(r, 2)}")
            axis.set_xlabel("L_fd")
            axis.set_ylabel("Dice")
            slope = None if line is None else line[0]
            patients = len({row.patient for row in kept})
            counts = (str(len(kept)), str(patients))
            lines.append((layer, *counts, number(r), interval_text(ends), number(slope, signed=True)))
        content = png(figure)
    said = ", ".join(f"{line[0]} {line[3]}" for line in lines)
    return [
        Picture(
            name,
            content,
            f"Dice against L_fd of each layer, a point a sample of {arm} (the mean over its seeds), "
            "with the regression line.",
            f"Scatter charts for {len(layers)} layers of {arm}. Correlation r: {said}.",
        ),
        Table(
            f"Correlation r (Pearson) of Dice and L_fd under {arm}, with its 95 % interval by a bootstrap "
            "over patients, and the slope of the regression line, Dice by unit of L_fd.",
            ("layer", "points", "patients", "r", "95 % interval", "slope"),
            tuple(lines),
        ),
    ]


def shift_blocks(prefix: str, experiment: Experiment) -> list[Block]:
    """Draw the distributions of Dice and of L_fd of each arm, before and after phase two (figure 4)."""
    arms = experiment.arms[:MOST_ARMS]
    values: dict[str, dict[str, list[float]]] = {"Dice": {}, "L_fd, mean of the layers": {}}
    for arm in arms:
        rows = experiment.of_arm(arm)
        values["Dice"][arm] = [row.dice for row in rows]
        means = [fmean(row.losses.values()) for row in rows if row.losses]
        if means:
            values["L_fd, mean of the layers"][arm] = means
    kept = {title: by_arm for title, by_arm in values.items() if by_arm}
    with drawn():
        figure, axes = grid(len(kept), columns=2, height=3.3)
        for axis, (title, by_arm) in zip(axes, kept.items(), strict=True):
            together = [value for one in by_arm.values() for value in one]
            edges = np.histogram_bin_edges(together, bins=20)
            for index, (arm, own) in enumerate(by_arm.items()):
                colour = style(index)
                axis.hist(own, edges, histtype="stepfilled", color=colour["color"], alpha=0.15)
                axis.hist(
                    own,
                    edges,
                    histtype="step",
                    linewidth=1.8,
                    label=arm,
                    edgecolor=colour["color"],
                    linestyle=colour["linestyle"],
                )
                axis.axvline(fmean(own), linewidth=1, **colour)
            axis.set_xlabel(title)
            axis.set_ylabel("samples")
        legend_below(figure, axes[0], 3)
        content = png(figure)
    lines = [
        (title, arm, str(len(own)), *_spread(own))
        for title, by_arm in kept.items()
        for arm, own in by_arm.items()
    ]
    said = "; ".join(
        f"mean {title} of {arm} {number(fmean(own))}"
        for title, by_arm in kept.items()
        for arm, own in by_arm.items()
    )
    return [
        Picture(
            f"{prefix}-shift",
            content,
            f"How Dice and L_fd are distributed over samples and runs, by arm: {', '.join(arms)}. The thin "
            "lines are the means.",
            f"Histograms by arm. {said}.",
        ),
        Table(
            "The distributions above: mean, standard deviation, quartiles.",
            ("", "arm", "values", "mean", "deviation", "lower quartile", "median", "upper quartile"),
            tuple(lines),
            texts=2,
        ),
    ]


def _spread(values: Sequence[float]) -> tuple[str, ...]:
    if len(values) < 2:
        return (number(values[0]), *[number(None)] * 4)
    return tuple(
        number(value) for value in (fmean(values), stdev(values), *quantiles(values, n=4, method="inclusive"))
    )


def alpha_blocks(prefix: str, experiment: Experiment) -> list[Block]:
    """Draw alpha and L_fd of each layer over training for each arm, and the final alpha (figure 5)."""
    by_arm: dict[str, list[ReportedRun]] = {}
    for one in experiment.runs:
        # The first phase, which arms without the loss share with the others, has logged the loss.
        if (
            one.run.saved.config.fd_loss
            and one.run.layers("alpha")
            and one.arm in (experiment.arms or [one.arm])
        ):
            by_arm.setdefault(one.arm, []).append(one.run)
    blocks: list[Block] = []
    for place, (arm, runs) in enumerate(list(by_arm.items())[:MOST_ARMS], start=1):
        curves = layer_curves(f"{prefix}-layers-{place}", arm, runs)
        if curves is not None:
            blocks.append(curves)
    if len(by_arm) > MOST_ARMS:
        blocks.append(Notes((f"The curves of the first {MOST_ARMS} of {len(by_arm)} arms are drawn.",)))
    finals = {arm: final for arm, runs in by_arm.items() if (final := mean_final(runs))}
    caption = "Final α of each layer, mean over the runs of an arm."
    bars = layer_bars(f"{prefix}-final-alpha", finals, "final α", caption)
    if bars is None:
        return blocks
    layers = in_depth({layer for final in finals.values() for layer in final})
    rows = tuple((layer, *(number(final.get(layer), 4) for final in finals.values())) for layer in layers)
    return [*blocks, bars, Table("The final α of the figure above.", ("layer", *finals), rows)]


def addition_blocks(prefix: str, experiment: Experiment) -> list[Block]:
    """Draw Dice and IoU on the first data set against the images added from the second (figure 6)."""
    places = _batches(experiment)
    if not places:
        return [Notes(("No arm names a number of added images, so that there is no curve over them.",))]
    rows = []
    with drawn():
        figure, axes = grid(2, columns=2, height=3.4)
        for index, (method, by_count) in enumerate(places.items()):
            counts = sorted(by_count)
            for axis, (score, title) in zip(axes, (("dice", "Dice"), ("iou", "IoU")), strict=True):
                means, ends = [], []
                for count in counts:
                    own = experiment.of_arm(by_count[count])
                    values = [getattr(row, score) for row in own]
                    means.append(fmean(values))
                    ends.append(interval(values, [row.patient for row in own], [row.seed for row in own]))
                    if score == "dice":
                        rows.append([method, str(count), number(100 * means[-1], 2), _hundred(ends[-1])])
                    else:
                        line = next(row for row in rows if row[:2] == [method, str(count)])
                        line += [number(100 * means[-1], 2), _hundred(ends[-1])]
                how = style(index, marks=True)
                axis.plot(counts, means, label=method, markersize=6, **how)
                if all(end is not None for end in ends):
                    low, high = ([end[side] for end in ends if end is not None] for side in (0, 1))
                    axis.fill_between(counts, low, high, color=how["color"], alpha=0.12, linewidth=0)
                axis.set_xlabel("images added")
                axis.set_ylabel(f"{title} on the first data set")
        legend_below(figure, axes[0], 3)
        content = png(figure)
    said = "; ".join(f"{row[0]} with {row[1]} images {row[2]}" for row in rows)
    return [
        Picture(
            f"{prefix}-addition",
            content,
            "Scores on the first data set against the number of images added from the second; bands are 95 % "
            "intervals of the mean over patients and seeds.",
            f"Line charts over the number of added images. Dice in percent: {said}.",
        ),
        Table(
            "Scores on the first data set in percent, by method and number of added images.",
            ("method", "images added", "Dice", "95 % interval", "IoU", "95 % interval"),
            tuple(tuple(row) for row in rows),
        ),
    ]


def _batches(experiment: Experiment) -> dict[str, dict[int, str]]:
    """Find the arm of each method and number of added images, by the results or else by its name."""
    arms = set(experiment.arms)
    results = experiment.summary.get("results")
    curves = results.get("curves") if isinstance(results, dict) else None
    if isinstance(curves, dict) and curves:
        try:
            return {
                method: {int(one["images"]): one["arm"] for one in points if one["arm"] in arms}
                for method, points in curves.items()
            }
        except (KeyError, TypeError, ValueError):
            pass  # of another form
    places: dict[str, dict[int, str]] = {}
    for arm in experiment.arms:
        match = _BATCH.fullmatch(arm)
        if match:
            places.setdefault(match["method"] or "added", {})[int(match["images"])] = arm
    return places


def _hundred(ends: Sequence[float] | None) -> str:
    if ends is None:
        return interval_text(None)
    return f"{number(100 * ends[0], 2)} to {number(100 * ends[1], 2)}"


# What is drawn for an experiment besides the comparison of its arms.
FIGURES: dict[str, Callable[[str, Experiment], list[Block]]] = {
    "correlation": correlation_blocks,
    "shift": shift_blocks,
    "ablation": alpha_blocks,
    "conventions": alpha_blocks,
    "alpha": alpha_blocks,
    "addition": addition_blocks,
}

__all__ = ["FIGURES", "MOST_ARMS", "addition_blocks", "alpha_blocks", "correlation_blocks", "shift_blocks"]
