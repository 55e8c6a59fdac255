"""Figures of a run's logs: losses and scores over the epochs, alpha and L_fd of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fdkernels.segmentation.config import PHASES
from fdkernels.segmentation.report.drawing import COLOURS, HATCHES, drawn, grid, legend_below, png, style
from fdkernels.segmentation.report.page import Block, Picture, Table, number
from fdkernels.segmentation.report.runs import ReportedRun, in_depth

_SYMBOLS = {"alpha": "α", "discrepancy_loss": "L_fd"}


def _begin(run: ReportedRun, phase: str) -> int:
    """Count the epochs before a phase."""
    return run.saved.config.epochs("warm") if phase == "active" else 0


def whole_curve(run: ReportedRun, name: str) -> tuple[list[int], list[float]]:
    """Give a number of the log over both phases; the epochs of phase two go on after those of phase one."""
    epochs: list[int] = []
    values: list[float] = []
    for phase in PHASES:
        own, numbers = run.curve(name, phase)
        epochs += [epoch + _begin(run, phase) for epoch in own]
        values += numbers
    return epochs, values


def _mark_phases(axis: Any, runs: Sequence[ReportedRun]) -> None:
    """Draw a line where phase two begins, if the runs agree on it, and name the axis."""
    begins = {_begin(run, "active") for run in runs if run.saved.config.epochs("active")}
    if len(begins) == 1 and (begin := begins.pop()):
        axis.axvline(begin + 0.5, color="0.45", linewidth=1, linestyle=(0, (2, 2)))
        place = {"transform": axis.get_xaxis_transform(), "verticalalignment": "bottom", "fontsize": 8}
        axis.text(begin + 0.5, 1.0, "phase 1 | phase 2", horizontalalignment="center", color="0.25", **place)
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _plot(axis: Any, curve: tuple[list[int], list[float]], label: str, index: int) -> bool:
    epochs, values = curve
    if values:
        # A mark shows the one epoch that makes no line.
        marker = "o" if len(values) == 1 else None
        axis.plot(epochs, values, label=label, marker=marker, **style(index))
    return bool(values)


def learning_curves(name: str, title: str, runs: Sequence[ReportedRun]) -> Picture | None:
    """Draw training loss and validation scores of a run, or validation Dice of each of several.

    Args:
        name: of the picture.
        title: what the caption calls the runs.
        runs: one run, or the folds of a cross-validation.
    """
    with drawn():
        figure, (left, right) = grid(2, columns=2, height=3.2)
        several = len(runs) > 1
        any_curve = False
        for index, run in enumerate(runs):
            label = f"fold {run.saved.fold}" if several else ""
            any_curve |= _plot(
                left, whole_curve(run, "train/loss"), label or "whole loss", index if several else 0
            )
            any_curve |= _plot(right, whole_curve(run, "val/dice"), label or "Dice", index if several else 0)
            if not several:
                _plot(left, whole_curve(run, "train/segmentation_loss"), "Dice loss + BCE alone", 1)
                _plot(right, whole_curve(run, "val/iou"), "IoU", 1)
        if not any_curve:
            return None
        left.set_ylabel("training loss")
        right.set_ylabel("validation Dice" if several else "validation score")
        for axis in (left, right):
            _mark_phases(axis, runs)
            axis.legend()
        content = png(figure)
    said = "; ".join(sentence for run in runs if (sentence := _end_of(run)))
    return Picture(
        name,
        content,
        f"Learning curves of {title}: training loss on the left, scores on the validation images on the "
        "right.",
        f"Two line charts over the epochs of {title}. {said}.",
    )


def _end_of(run: ReportedRun) -> str:
    _, dice = whole_curve(run, "val/dice")
    if not dice:
        return ""
    first, most, last = (number(value) for value in (dice[0], max(dice), dice[-1]))
    return f"Validation Dice of {run.title} begins at {first}, is at most {most} and ends at {last}"


def mean_curve(runs: Sequence[ReportedRun], name: str) -> tuple[list[int], list[float]]:
    """Average a number of the log over runs, over the epochs that all of them have."""
    curves = [dict(zip(*whole_curve(run, name), strict=True)) for run in runs]
    epochs = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return epochs, [sum(curve[epoch] for curve in curves) / len(curves) for epoch in epochs]


def layer_curves(name: str, title: str, runs: Sequence[ReportedRun]) -> Picture | None:
    """Draw alpha and L_fd of each layer over the epochs, the mean over runs; None where no log has them.

    Args:
        name: of the picture.
        title: what the caption calls the runs.
        runs: those whose logs are averaged.
    """
    kept = [run for run in runs if run.layers("alpha")]
    layers = in_depth({layer for run in kept for layer in run.layers("alpha")})
    if not layers:
        return None
    with drawn():
        figure, axes = grid(2, columns=2, height=3.6)
        for axis, (kind, symbol) in zip(axes, _SYMBOLS.items(), strict=True):
            for index, layer in enumerate(layers):
                _plot(axis, mean_curve(kept, f"{kind}/{layer}"), layer, index)
            axis.set_ylabel(symbol)
            _mark_phases(axis, kept)
        legend_below(figure, axes[0])
        content = png(figure)
    averaged = f", mean of {len(kept)} runs" if len(kept) > 1 else ""
    return Picture(
        name,
        content,
        f"α (left) and the discrepancy loss L_fd (right) of each layer over the training of {title}"
        f"{averaged}. The smaller L_fd, the farther apart are the features of foreground and background.",
        f"Two line charts with a curve for each of {len(layers)} layers of {title}. {_layers_in_words(kept)}",
    )


def mean_final(runs: Sequence[ReportedRun]) -> dict[str, float]:
    """Average the final alpha of each layer over runs."""
    values: dict[str, list[float]] = {}
    for run in runs:
        for layer, alpha in run.final_alpha().items():
            values.setdefault(layer, []).append(alpha)
    return {layer: sum(own) / len(own) for layer, own in values.items()}


def _layers_in_words(runs: Sequence[ReportedRun]) -> str:
    final = mean_final(runs)
    if not final:
        return "The second phase has no α yet."
    most, least = (choose(final, key=lambda name: final[name]) for choose in (max, min))
    return (
        f"At the end α is largest in {most}, {number(final[most])}, and smallest in {least}, "
        f"{number(final[least])}."
    )


def layers_table(runs: Sequence[ReportedRun]) -> Table | None:
    """Tabulate the final alpha of each layer, a column a run, and L_fd; None without alpha."""
    kept = [run for run in runs if run.final_alpha()]
    if not kept:
        return None
    several = len(kept) > 1
    rows = []
    for layer in in_depth({name for run in kept for name in run.final_alpha()}):
        alphas = [number(run.final_alpha().get(layer), 4) for run in kept]
        losses = [number(_mean_end(kept, f"discrepancy_loss/{layer}", phase)) for phase in PHASES]
        rows.append((layer, *alphas, *losses))
    alpha_columns = [f"final α, {run.title}" for run in kept] if several else ["final α"]
    of_runs = ", mean of the runs" if several else ""
    loss_columns = [f"L_fd after phase {phase}{of_runs}" for phase in ("one", "two")]
    return Table(
        "Final α and L_fd of each layer, L_fd over the last epoch of the phase.",
        ("layer", *alpha_columns, *loss_columns),
        tuple(rows),
    )


def _mean_end(runs: Sequence[ReportedRun], name: str, phase: str) -> float | None:
    ends = [values[-1] for run in runs if (values := run.curve(name, phase)[1])]
    return sum(ends) / len(ends) if ends else None


def layer_bars(
    name: str, values: Mapping[str, Mapping[str, float]], label: str, caption: str
) -> Picture | None:
    """Draw a number of each layer as bars, a group of bars a layer; None without numbers.

    Args:
        name: of the picture.
        values: by title (a run, an arm) the number by layer.
        label: what the number is.
        caption: of the picture.
    """
    layers = in_depth({layer for own in values.values() for layer in own})
    if not layers:
        return None
    with drawn():
        figure = Figure(figsize=(9.0, 3.2), layout="constrained")
        axis = figure.subplots()
        width = 0.8 / len(values)
        for index, (title, own) in enumerate(values.items()):
            places = [place - 0.4 + (index + 0.5) * width for place in range(len(layers))]
            axis.bar(
                places,
                [own.get(layer, float("nan")) for layer in layers],
                width,
                label=title,
                color=COLOURS[index % len(COLOURS)],
                edgecolor="white",
                hatch=HATCHES[index % len(HATCHES)],
            )
        axis.set_xticks(range(len(layers)), layers)
        axis.grid(visible=False, axis="x")
        axis.axhline(0, color="0.2", linewidth=0.8)
        axis.set_ylabel(label)
        if len(values) > 1:
            legend_below(figure, axis, 4)
        content = png(figure)
    said = "; ".join(
        f"{title}: " + ", ".join(f"{layer} {number(value)}" for layer, value in own.items())
        for title, own in list(values.items())[:8]
    )
    return Picture(name, content, caption, f"Bar chart of {label} of each layer. {said}.")


def run_blocks(prefix: str, title: str, runs: Sequence[ReportedRun]) -> list[Block]:
    """Give the figures and the table of a group's logs."""
    blocks: list[Block] = []
    curves = learning_curves(f"{prefix}-learning-curves", title, runs)
    if curves is not None:
        blocks.append(curves)
    layers = layer_curves(f"{prefix}-layers", title, runs)
    if layers is not None:
        blocks.append(layers)
    finals = {run.title: final for run in runs if (final := run.final_alpha())}
    caption = f"Final α of each layer of {title}."
    bars = layer_bars(f"{prefix}-final-alpha", finals, "final α", caption)
    table = layers_table(runs)
    return [*blocks, *(block for block in (bars, table) if block is not None)]


__all__ = [
    "layer_bars",
    "layer_curves",
    "layers_table",
    "learning_curves",
    "mean_final",
    "run_blocks",
    "whole_curve",
]
