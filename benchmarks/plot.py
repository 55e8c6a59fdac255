"""A picture of the times of a forward and backward, over those of the op."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt

from benchmarks.results import DeviceResults, Measurement
from benchmarks.shortfalls import STEP

# Colours that differ in brightness too, and a marker each, for readers without colours.
_STYLES = {
    "floor": ("|", "black"),
    "single calls": ("d", "#999999"),
    "bmm": ("s", "#E69F00"),
    "compiled": ("^", "#0072B2"),
    "eager": ("o", "#D55E00"),
}


def plot_times(results: DeviceResults, path: Path) -> None:
    """Write an SVG: a line for a case, a marker for a contender, on a logarithmic axis with the op at 1."""
    cases = [case for case in results.cases if STEP in case.modes]
    # The same input gives the same file.
    with mpl.rc_context({"svg.hashsalt": "fdkernels", "svg.fonttype": "none"}):
        figure, axes = plt.subplots(figsize=(8, 1.2 + 0.22 * len(cases)), layout="constrained")
        for name, (marker, color) in _STYLES.items():
            points = [
                (_over_op(case.modes[STEP], name), row)
                for row, case in enumerate(cases)
                if name in case.modes[STEP].seconds
            ]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, marker, color=color, label=name, markersize=6, alpha=0.9)
        axes.axvline(1, color="black", linewidth=1, label="the op")
        axes.set_xscale("log")
        axes.set_xlabel("time of forward and backward over the op's; left of the line is faster")
        axes.set_yticks(range(len(cases)), [f"{case.name} {case.dtype} {case.layout}" for case in cases])
        axes.tick_params(labelsize=8)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        figure.legend(loc="outside upper center", ncols=6, fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)


def _over_op(measurement: Measurement, name: str) -> float:
    if name == "floor":
        return 1 / measurement.ratios["op/floor"].median
    return measurement.ratios[f"{name}/op"].median
