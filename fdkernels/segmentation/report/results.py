"""Show what summary.json holds as results, whatever its form: numbers by name become tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fdkernels.segmentation.report.page import EMPTY, Block, Notes, Table, Text, is_number, number

MOST_ROWS = 200
_DEEPEST = 6
_LONGEST = 12  # list that is written out in a cell


def result_blocks(results: Any) -> list[Block]:
    """Tabulate nested objects and lists of numbers and words; longer lists are named and left out."""
    long: list[str] = []
    blocks = _blocks(_without_long(results, "", long), "results", 0)
    if long:
        names = ", ".join(sorted(set(long)))
        blocks.append(Notes((f"Lists of more than {_LONGEST} values are in summary.json alone: {names}.",)))
    return blocks


def _without_long(value: Any, name: str, long: list[str]) -> Any:
    """Leave out the lists of many plain values; add their names to `long`."""
    if isinstance(value, list):
        if len(value) > _LONGEST and all(_is_plain(one) for one in value):
            long.append(_named(name))
            return None
        return [_without_long(one, name, long) for one in value]
    if isinstance(value, Mapping):
        kept = {key: _without_long(one, str(key), long) for key, one in value.items()}
        return {key: one for key, one in kept.items() if one is not None or value[key] is None}
    return value


def _blocks(results: Any, title: str, depth: int) -> list[Block]:
    """Make the tables of a value; `title` is the names that lead to it, and `depth` how many these are."""
    if _is_cell(results):
        return [] if results in (None, []) else [Text(f"{title}: {_cell(results)}")]
    if isinstance(results, Mapping):
        entries = {str(name): value for name, value in results.items()}
    elif isinstance(results, list):
        entries = {str(place): value for place, value in enumerate(results, start=1)}
    else:
        return []
    cells = {name: value for name, value in entries.items() if _is_cell(value)}
    # Objects of plain values are rows of one table.
    rows = {name: flat for name, value in entries.items() if (flat := _flat(value)) is not None}
    if len(rows) == 1 and isinstance(results, Mapping):
        rows = {}
    deeper = {name: value for name, value in entries.items() if name not in cells and name not in rows}
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
        else:
            blocks += _blocks(value, f"{title}: {_named(name)}", depth + 1)
    return blocks


def _named(name: str) -> str:
    return name.replace("_", " ")


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, bool, int, float))


def _is_cell(value: Any) -> bool:
    return _is_plain(value) or (isinstance(value, list) and all(_is_plain(one) for one in value))


def _flat(value: Any) -> dict[str, Any] | None:
    """Give the cells of an object by name, those of objects inside by both names; None if it has others.

    One without a cell of its own is None as well: it is a table itself.
    """
    if not isinstance(value, Mapping) or not any(_is_cell(one) for one in value.values()):
        return None
    flat: dict[str, Any] = {}
    for name, one in value.items():
        if _is_cell(one):
            flat[_named(str(name))] = one
        elif isinstance(one, Mapping) and all(_is_cell(inner) for inner in one.values()):
            flat |= {f"{_named(str(name))}: {_named(str(inner))}": cell for inner, cell in one.items()}
        else:
            return None
    return flat


def _cell(value: Any) -> str:
    if value is None or value == []:
        return EMPTY
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        as_interval = len(value) == 2 and all(is_number(one) for one in value)
        return (" to " if as_interval else ", ").join(_cell(one) for one in value)
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
    named_by_words = numbered and bool(words)
    lines = [
        (*(() if named_by_words else (_named(name),)), *(_cell(row.get(column)) for column in ordered))
        for name, row in shown
    ]
    lead = () if named_by_words else ("",)
    table = Table(f"{title}.", (*lead, *ordered), tuple(lines), texts=len(lead) + len(words))
    if len(shown) == len(rows):
        return [table]
    return [table, Notes((f"{title}: the first {MOST_ROWS} of {len(rows)} rows; see summary.json.",))]


__all__ = ["MOST_ROWS", "result_blocks"]
