"""The table of docs/versions.md: read, joined with new rows, and written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parents[2] / "docs" / "versions.md"

HEAD = """# Versions

Written by `make test-matrix`: the wheel of a Python is built once, with the CPU kernels, and installed
unchanged beside each torch; then the tests of the op, the loss, the module and the taps run there, also under
`torch.compile` and with Triton's kernels interpreted. What a version or the machine lacks (a GPU, a newer
Triton) is skipped. `python_tests/matrix/test_versions.py` holds pyproject.toml to this table. A version that
is not here has not been run on the present code.

"""


class Row(NamedTuple):
    """One combination: what was installed, and how many tests passed."""

    python: str
    torch: str
    triton: str = "-"
    numpy: str = "-"
    backends: str = "-"
    passed: str = "0"
    skipped: str = "0"
    failed: str = "not run"
    machine: str = "-"
    date: str = "-"


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, by which versions are put in order."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def read_rows(page: Path) -> list[Row]:
    """The rows of a page, none where there is no page."""
    if not page.exists():
        return []
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.read_text("utf-8").splitlines()
        if line.startswith("|")
    ]
    return [Row(*row) for row in cells[2:]]


def write_rows(page: Path, rows: Iterable[Row]) -> None:
    """Write a page; of rows with the same versions the first stays, and one without NumPy did not run."""
    kept: list[Row] = []
    for row in rows:
        same = [other for other in kept if (other.python, other.torch) == (row.python, row.torch)]
        if not any(row.numpy in (other.numpy, "-") for other in same):
            kept.append(row)
    ordered = sorted(kept, key=lambda row: tuple(map(numbers, (row.torch, row.python, row.numpy))))
    names = [*Row._fields]
    marks = ["---"] * 5 + ["---:"] * 2 + ["---"] * 3
    table = [names, marks, *([cell.replace("|", "/") for cell in row] for row in ordered)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(HEAD + "".join(f"| {' | '.join(cells)} |\n" for cells in table), "utf-8")
