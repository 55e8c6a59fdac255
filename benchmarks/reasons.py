"""What stands in the way of a figure that is not reached, as kept by hand in reasons.md."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.shortfalls import FIGURES

_FILE = Path(__file__).resolve().parent / "reasons.md"


def read_reasons(path: Path = _FILE) -> dict[str, str]:
    """The text under each heading `## KEY`, as one paragraph.

    Raises:
        ValueError: a heading that is no key of `shortfalls.FIGURES`.
    """
    _, *sections = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {}
    for section in sections:
        key, _, text = section.partition("\n")
        if key not in FIGURES:
            raise ValueError(f"a heading of {path.name} must be one of {', '.join(FIGURES)}, got {key!r}")
        found[key] = " ".join(text.split())
    return found
