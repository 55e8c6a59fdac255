"""The numbers of a measurement, and how they are written in Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

NONE = "–"
FORWARD, STEP = "forward", "forward+backward"

Entry = dict[str, Any]


def median(entry: Entry | None, ratio: str) -> float | None:
    """The median of a ratio such as `op/floor`, or None."""
    value: float | None = entry["ratios"].get(ratio, {}).get("median") if entry else None
    return value


def memory_share(entry: Entry, name: str = "op") -> float:
    """Peak memory over the features' bytes, beyond the gradient that backward has to write."""
    gradient = entry["feature_bytes"] if entry["mode"] == STEP else 0
    return (entry["peak_bytes"][name] - gradient) / entry["feature_bytes"]


def timing(entry: Entry, name: str, by: str = "") -> str:
    first = next(iter(entry["seconds"]))
    over = f"{name}/floor" if name == first else f"{name}/{first}"
    text = f"{1e3 * entry[f'{by}seconds'][name]['median']:.3g}"
    return f"{text}, {ratio(entry, over, by)}" if over in entry["ratios"] else text


def ratio(entry: Entry, name: str, by: str = "") -> str:
    found = entry[f"{by}ratios"].get(name)
    return f"{found['median']:.3g} [{found['q1']:.3g}–{found['q3']:.3g}]" if found else NONE


def span(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys((f"{min(values):.3g}", f"{max(values):.3g}")))


def bullet(text: str) -> str:
    options = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(f"- {text}", 120, **options)


def label(case: Sequence[str]) -> str:
    return f"`{case[0]}` {case[1]} {case[2]}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
