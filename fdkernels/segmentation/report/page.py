"""What a page consists of, before it is HTML or Markdown: sections of paragraphs, tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

EMPTY = "–"  # a cell without a number


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Notes:
    """What is missing or to be borne in mind, one sentence an item."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: what it shows.
        columns: headings.
        rows: cells, as many as there are columns.
        texts: how many columns from the left hold words; the others hold numbers and are aligned right.
        own: rows that are the user's own among others, which are set off.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1
    own: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if wrong := [row for row in self.rows if len(row) != len(self.columns)]:
            raise ValueError(f"a row must have {len(self.columns)} cells, got {wrong[0]}")


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        name: of its file, letters, digits and hyphens, without ending.
        png: the file's content.
        caption: what it shows.
        alt: what one who cannot see it should know.
    """

    name: str
    png: bytes
    caption: str
    alt: str


Block = Text | Notes | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading with what is below it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: its heading.
        summary: in plain words what the numbers show and what they do not, a paragraph for each source.
        sections: the rest.
    """

    title: str
    summary: tuple[str, ...]
    sections: tuple[Section, ...]


def number(value: Any, digits: int = 3, signed: bool = False) -> str:
    """Write a number with so many digits after the point and a true minus sign; `EMPTY` for none or NaN."""
    if not is_number(value) or math.isnan(value):
        return EMPTY
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if isinstance(value, int):
        return str(value).replace("-", "−")
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    if digits and float(text) == 0 and value != 0:  # too small to be seen so
        text = f"{value:{'+' if signed else ''}.2g}"
    return text.replace("-", "−")


def interval_text(ends: Sequence[float] | None, digits: int = 3) -> str:
    """Write the two ends of an interval of differences, or `EMPTY` where there is none."""
    if ends is None:
        return EMPTY
    low, high = (number(end, digits, signed=True) for end in ends)
    return f"{low} to {high}"


def duration(seconds: float | None) -> str:
    """Write a time: 41 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return EMPTY
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def is_number(value: Any) -> bool:
    """Tell whether a value read from JSON is a number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


__all__ = [
    "EMPTY",
    "Block",
    "Notes",
    "Page",
    "Picture",
    "Section",
    "Table",
    "Text",
    "duration",
    "interval_text",
    "is_number",
    "number",
]
