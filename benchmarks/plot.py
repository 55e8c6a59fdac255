"""The pictures of the page, as PNG: the same results give the same files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from benchmarks.results import CaseResult, DeviceResults, Measurement, Spread
from benchmarks.shortfalls import FORWARD, STEP, bytes_moved, memory_share
from benchmarks.steps_report import StepResult

# Colours that stay apart for the colour-blind and in print, and a marker each.
_STYLES = {
    "op": ("o", "#009E73"),
    "tap": ("D", "#0072B2"),
    "compiled": ("^", "#0072B2"),
    "bmm": ("s", "#E69F00"),
    "eager": ("v", "#D55E00"),
    "plain": ("v", "#D55E00"),
    "single calls": ("d", "#7F7F7F"),
    "floor": ("|", "#000000"),
}
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 110,
}
_ROW = 0.24  # inches of a case


def draw(results: DeviceResults, steps: Sequence[StepResult], folder: Path) -> dict[str, Path]:
    """Draw what there are measurements for; the files by the name of the picture."""
    pictures: dict[str, Callable[[], Figure | None]] = {
        "scaling": lambda: _scaling(results),
        "times": lambda: _times(results),
        "memory": lambda: _memory(results),
        "steps": lambda: _steps(steps),
    }
    found = {}
    with mpl.rc_context(_STYLE):
        for name, make in pictures.items():
            figure = make()
            if figure is not None:
                path = folder / f"{results.device}-{name}.png"
                _save(figure, path)
                plt.close(figure)
                found[name] = path
    return found


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG of few colours, a quarter of the size of one that has all."""
    with io.BytesIO() as whole:
        figure.savefig(whole, format="png")
        Image.open(whole).convert("RGB").quantize(64).save(path, optimize=True)


def _scaling(results: DeviceResults) -> Figure | None:
    """By size, the bytes that have to move over what a copy moves in that time."""
    cases = sorted(
        (case for case in results.cases if case.name.startswith("scaling")),
        key=lambda case: case.feature_bytes,
    )
    rate = results.copy_rate
    if len(cases) < 2 or not rate:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    titles = {FORWARD: "forward: features read", STEP: "forward and backward: read, gradient written"}
    for axes, (mode, title) in zip(panels, titles.items(), strict=True):
        for name in ("floor", "op", "compiled", "bmm", "eager"):
            points = [
                (case.feature_bytes / 2**20, 100 * bytes_moved(case, mode) / seconds.median / rate)
                for case in cases
                if mode in case.modes and (seconds := case.modes[mode].seconds.get(name)) is not None
            ]
            if points:
                marker, color = _STYLES[name]
                line = {"linestyle": "--", "marker": ""} if name == "floor" else {"marker": marker}
                axes.plot(*zip(*points, strict=True), color=color, label=name, markersize=5, **line)
        _sizes_axis(axes, [case.feature_bytes / 2**20 for case in cases])
        axes.set_title(title)
        axes.axhline(100, color="#7F7F7F", linewidth=0.8)
        if results.cache_bytes is not None:
            axes.axvline(results.cache_bytes / 2**20, color="#7F7F7F", linewidth=0.8, linestyle=":")
            axes.annotate(
                "cache",
                (results.cache_bytes / 2**20, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -4),
                textcoords="offset points",
                va="top",
                fontsize=8,
                color="#555555",
            )
    panels[0].set_ylabel("share of the copy rate, %")
    panels[0].set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def _times(results: DeviceResults) -> Figure | None:
    """Times of a forward and backward over the op's, a row for each case."""
    names = ("floor", "single calls", "bmm", "compiled", "eager")

    def value(case: CaseResult, name: str) -> float | None:
        measurement = case.modes[STEP]
        return _over_op(measurement, name) if name in measurement.seconds else None

    figure = _rows(results, names, value)
    if figure is None:
        return None
    (axes,) = figure.axes
    axes.axvline(1, color=_STYLES["op"][1], linewidth=1.5, zorder=1)
    axes.set_xlabel("time of forward and backward over that of the op (green line); left of it is faster")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    return figure


def _memory(results: DeviceResults) -> Figure | None:
    """Peak memory of forward and backward beyond the gradient, a row for each case."""

    def value(case: CaseResult, name: str) -> float | None:
        share = memory_share(case, case.modes[STEP], name, STEP)
        return None if share is None else max(100 * share, 0.01)

    figure = _rows(results, ("op", "bmm", "compiled", "eager"), value)
    if figure is None:
        return None
    (axes,) = figure.axes
    axes.set_xlabel("peak memory beyond the gradient, of the features' bytes; what is less stands at 0.01 %")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} %"))
    return figure


def _rows(
    results: DeviceResults, names: Sequence[str], value: Callable[[CaseResult, str], float | None]
) -> Figure | None:
    """A row for each case that is no step of the series by size, a marker for each contender; logarithmic."""
    cases = [case for case in results.listed if STEP in case.modes]
    if not cases:
        return None
    figure, axes = plt.subplots(figsize=(9, 1.4 + _ROW * len(cases)), layout="constrained")
    for name in names:
        points = [(x, row) for row, case in enumerate(cases) if (x := value(case, name)) is not None]
        if points:
            marker, color = _STYLES[name]
            weight = {"markeredgewidth": 2} if marker == "|" else {}
            axes.plot(*zip(*points, strict=True), marker, color=color, label=name, markersize=7, **weight)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if _decades(axes) < 2.5 else (1,)))
    labels = [f"{case.name}  {case.dtype}  {case.layout.replace('contiguous', 'contig.')}" for case in cases]
    axes.set_yticks(range(len(cases)), labels, fontsize=8.5)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.grid(axis="both", color="#DDDDDD", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=len(names))
    return figure


def _steps(steps: Sequence[StepResult]) -> Figure | None:
    """Time of a training step over that of the same step without the loss, with quartiles."""
    if not steps:
        return None
    figure, axes = plt.subplots(figsize=(9, 1.4 + 1.6 * _ROW * len(steps)), layout="constrained")
    for offset, name in ((-0.22, "op"), (0, "tap"), (0.22, "plain")):
        rows = [
            (row + offset, ratio)
            for row, step in enumerate(steps)
            if (ratio := step.over_without(name)) is not None
        ]
        if rows:
            _with_quartiles(axes, rows, name)
    axes.axvline(1, color="#000000", linewidth=1)
    axes.set_yticks(range(len(steps)), [f"{step.network}, {step.mode}" for step in steps], fontsize=9)
    axes.set_ylim(len(steps) - 0.5, -0.5)
    axes.set_xlabel("time of a training step over the same step without the loss; bars are quartiles")
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def _with_quartiles(axes: Axes, rows: Sequence[tuple[float, Spread]], name: str) -> None:
    marker, color = _STYLES[name]
    middle = [ratio.median for _, ratio in rows]
    reach = [[ratio.median - ratio.q1 for _, ratio in rows], [ratio.q3 - ratio.median for _, ratio in rows]]
    axes.errorbar(
        middle,
        [y for y, _ in rows],
        xerr=reach,
        fmt=marker,
        color=color,
        label=name,
        markersize=6,
        elinewidth=1.2,
    )


def _sizes_axis(axes: Axes, sizes: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(sizes))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1024 else f"{x / 1024:g}k"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8.5)
    axes.set_xlabel("features, MiB")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)


def _decades(axes: Any) -> float:
    low, high = axes.get_xlim()
    return math.log10(high / low)


def _over_op(measurement: Measurement, name: str) -> float:
    if name == "floor":
        return 1 / measurement.ratios["op/floor"].median
    return measurement.ratios[f"{name}/op"].median
