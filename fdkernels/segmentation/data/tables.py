"""Read a table that a user wrote by hand or exported from a spreadsheet."""

from __future__ import annotations

import csv
from pathlib import Path


def read_table(path: Path) -> tuple[str, csv.DictReader[str]]:
    """Read a CSV file: its first line, and its rows by the names of the columns in lower case.

    Columns are separated by comma, semicolon or tab, as the first line shows; a cell that is not there is
    empty.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    lines = path.read_text("utf-8-sig").splitlines()
    header = lines[0] if lines else ""
    delimiter = next((sign for sign in ";\t" if sign in header), ",")
    rows = csv.DictReader(lines, delimiter=delimiter, restval="")
    rows.fieldnames = [(name or "").strip().casefold() for name in rows.fieldnames or ()]
    return header, rows


__all__ = ["read_table"]
