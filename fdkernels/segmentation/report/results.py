"""Show what summary.json holds as results, whatever its form: numbers by name become tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fdkernels.segmentation.report.page import EMPTY, Block, Notes, Table, Text, is_number, number

MOST_ROWS = 200
_DEEPEST = 6
_LONGEST = 12  # list that is written out in a cell


def result_blocks(results: Any, title: str = "results", depth: int = 0) -> list[Block]:
    """Tabulate nested objects and lists of numbers and words.

    Args:
        results: of JSON.
        title: of the table, the names that lead to it.
        depth: how many names these are.
    """
    if _is_cell(results):
        return [Text(f"{title}: {_cell(results)}")]
    if isinstance(results, Mapping):
        entries = {str(name): value for name, value in results.items()}
    elif isinstance(results, list):
        entries = {str(place): value for place, value in enumerate(results, start=1)}
    else:
        return []
    cells = {name: value for name, value in entries.items() if _is_cell(value)}
    # An object of cells is a row among others like it.
    rows = {name: value for name, value in entries.items() if _is_row(value)}
    deeper = {name: value for name, value in entries.items() if name not in cells and name not in rows}
    if len(rows) == 1:
        deeper, rows = {**rows, **deeper}, {}
    blocks: list[Block] = []
    if cells:
        blocks.append(_values_table(title, cells))
    if rows:
        blocks += _rows_table(title, rows, numbered=isinstance(results, list))
    for name, value in deeper.items():
        if not value:
            continue
        if depth >= _DEEPEST:
            blocks.append(Notes((f"{title}, {name}: nested too deeply to be shown; see summary.json.",)))
        elif _is_row(value):
            blocks.append(_values_table(f"{title}: {_named(name)}", value))
        else:
            blocks += result_blocks(value, f"{title}: {_named(name)}", depth + 1)
    return blocks


def _named(name: str) -> str:
    return name.replace("_", " ")


def _is_cell(value: Any) -> bool:
    if isinstance(value, list):
        return all(one is None or isinstance(one, (str, int, float)) for one in value)
    return value is None or isinstance(value, (str, bool, int, float))


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(_is_cell(one) for one in value.values())


def _cell(value: Any) -> str:
    if value is None or value == []:
        return EMPTY
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and len(value) > _LONGEST:
        return f"{len(value)} values"
    if isinstance(value, list):
        return (" to " if len(value) == 2 and not _is_words(value) else ", ").join(
            _cell(one) for one in value
        )
    return number(value, 4) if is_number(value) else str(value)


def _is_words(values: Sequence[Any]) -> bool:
    return any(isinstance(value, str) for value in values)


def _values_table(title: str, values: Mapping[str, Any]) -> Table:
    rows = tuple((_named(str(name)), _cell(value)) for name, value in values.items())
    texts = 2 if _is_words(list(values.values())) else 1
    return Table(f"{title}.", ("", "value"), rows, texts=texts)


def _rows_table(title: str, rows: Mapping[str, Mapping[str, Any]], numbered: bool) -> list[Block]:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    # Words go to the left, where they are aligned as words.
    words = [name for name in columns if _is_words([row.get(name) for row in rows.values()])]
    ordered = [*words, *(name for name in columns if name not in words)]
    shown = list(rows.items())[:MOST_ROWS]
    lines = []
    for name, row in shown:
        lead = () if numbered and words else (name if numbered else _named(name),)
        lines.append((*lead, *(_cell(row.get(column)) for column in ordered)))
    lead_column = () if numbered and words else ("",)
    table = Table(
        f"{title}.",
        (*lead_column, *(_named(str(name)) for name in ordered)),
        tuple(lines),
        texts=len(lead_column) + len(words),
    )
    if len(shown) == len(rows):
        return [table]
    return [table, Notes((f"{title}: the first {MOST_ROWS} of {len(rows)} rows; see summary.json.",))]


__all__ = ["MOST_ROWS", "result_blocks"]
