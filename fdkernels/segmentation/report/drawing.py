"""How figures are drawn: colours and marks that print and colour-blind readers tell apart."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's colours, without the yellow that is pale on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2.5)), (0, (8, 2)))
MARKS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo")
DOTS = 150  # an inch

_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.7,
    "text.parse_math": False,  # names of files and arms are no formulas
    "hatch.linewidth": 0.6,
}


@contextmanager
def drawn() -> Iterator[None]:
    """Draw inside in the report's style; a name with letters that the font lacks warns of nothing."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def png(figure: Figure, cut: bool = False) -> bytes:
    """Give a figure as the content of a PNG file.

    Args:
        figure: to be drawn.
        cut: cut to what is drawn; beside pictures of a fixed shape the layout may leave no room for a title.
    """
    file = io.BytesIO()
    cutting: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.08} if cut else {}
    figure.savefig(file, format="png", dpi=DOTS, metadata={"Software": None}, **cutting)
    return file.getvalue()


def style(index: int, marks: bool = False) -> dict[str, Any]:
    """Give colour and line (and mark) of the curve of that index; each differs from those before in both."""
    # After the first seven the lines move on by one, so that no pair of colour and line comes twice.
    turn = (index + index // len(COLOURS)) % len(LINES)
    chosen = {"color": COLOURS[index % len(COLOURS)], "linestyle": LINES[turn]}
    return {**chosen, "marker": MARKS[turn]} if marks else chosen


def grid(panels: int, columns: int = 3, height: float = 2.7) -> tuple[Figure, list[Any]]:
    """Make a figure of so many panels in rows of `columns`; return it and the panels' axes."""
    across = max(1, min(columns, panels))
    down = max(1, -(-panels // across))
    width = {1: 7.2, 2: 8.8}.get(across, 9.6)
    figure = Figure(figsize=(width, height * down + 0.4), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten().tolist()
    for unused in axes[panels:]:
        unused.set_visible(False)
    return figure, axes[:panels]


def legend_below(figure: Figure, axis: Any, columns: int = 5) -> None:
    """Put the legend of a panel below the whole figure."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(handles)))


__all__ = ["COLOURS", "HATCHES", "drawn", "grid", "legend_below", "png", "style"]
