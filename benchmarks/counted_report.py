"""What was counted and not timed: bytes of a call by its stages, launches, instructions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.results import ResultFile
from benchmarks.tables import NONE, table


def counted_section(files: Iterable[ResultFile]) -> str:
    """Bytes and launches of a call, stage by stage; empty where they were not counted."""
    parts = []
    for file in files:
        if file.kind != "launches":
            continue
        what = (
            "Counted, not timed. Bytes: from the shapes, every tensor once for each pass that reads or "
            "writes it, in float32. Launches: of the backend `triton`, its kernels by the interpreter and "
            "the ops of torch beside them by the profiler, views and allocations aside. The floor of the "
            "bytes is one read of the features and one write of their gradient. By "
            f"`{file.conditions.command}`, commit {file.conditions.commit.get('id')}.\n"
        )
        parts = [
            "## Bytes and launches of a call\n",
            what,
            _bytes_table(file.entries) + "\n",
            _launches_table(file.entries) + "\n",
        ]
    return "\n".join(parts)


def instructions_section(files: Iterable[ResultFile]) -> str:
    """Instructions of a call on a CPU; empty where they were not counted."""
    parts = []
    for file in files:
        if file.kind != "instructions":
            continue
        sets = sorted({entry["instruction_set"] for entry in file.entries})
        if not parts:
            parts.append("## Instructions of a call on a CPU\n")
        rows = [[entry["figure"], f"{entry['instructions']:,}"] for entry in file.entries]
        what = (
            f"Counted by callgrind on one thread, kernels of {' and '.join(sets)}: a figure without noise, "
            "that says what a change of the code does to the work of a call and nothing about memory. By "
            f"`{file.conditions.command}`, commit {file.conditions.commit.get('id')}, torch "
            f"{file.conditions.machine['versions']['torch']}, Python "
            f"{file.conditions.machine['versions']['python']}.\n"
        )
        parts += [what, table(["figure", "instructions"], rows) + "\n"]
    return "\n".join(parts)


def _bytes_table(entries: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(stage["name"] for entry in entries for stage in entry["stages"]))
    rows = []
    for entry in entries:
        stages = {stage["name"]: stage for stage in entry["stages"]}
        total = sum(stage["read"] + stage["written"] for stage in entry["stages"])
        floor = 2 * entry["feature_bytes"]
        cells = [
            f"{_mib(stages[name]['read'])} + {_mib(stages[name]['written'])}" if name in stages else NONE
            for name in names
        ]
        tap, separate = entry["tap_bytes"]
        rows.append(
            [
                f"`{entry['case']}`",
                _mib(entry["feature_bytes"]),
                *cells,
                f"{total / floor:.3f}",
                f"{_mib(tap)} against {_mib(separate)}",
            ]
        )
    header = ["case", "features, MiB", *(f"{name}, read + written" for name in names)]
    return table([*header, "all over the floor", "backward by `tap`, against separate"], rows)


def _launches_table(entries: Sequence[dict[str, Any]]) -> str:
    rows = []
    for entry in entries:
        cells = []
        for direction in ("forward", "backward"):
            counts = entry[direction]
            listed = ", ".join(f"{count} × {name}" for name, count in counts.items())
            cells += [str(sum(counts.values())), listed or NONE]
        rows.append([f"`{entry['case']}`", str(entry["num_layers"]), *cells])
    return table(["case", "layers", "forward", "of which", "backward", "of which"], rows)


def _mib(size: int) -> str:
    return f"{size / 2**20:.3g}"
