"""Makes the pages from the JSON files: `python -m benchmarks.page`. Every number on them is theirs.

README.md is page.md with what a reader needs, all machines side by side; `tables.md` beside the JSON has the
rest. page.json has the rows of the table and the figures to hold.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.class_tables import class_losses, class_rows, class_tables
from benchmarks.kind_tables import KIND_TABLES
from benchmarks.markdown import (
    FORWARD,
    NONE,
    STEP,
    Entry,
    bullet,
    label,
    median,
    memory_share,
    span,
    table,
    timing,
)

HERE = Path(__file__).resolve().parent
_TEXTS = json.loads((HERE / "page.json").read_text(encoding="utf-8"))
ROWS: list[tuple[str, ...]] = [tuple(row.split()) for row in _TEXTS["rows"]]
TARGETS: dict[str, dict[str, Any]] = _TEXTS["targets"]
LIMITS = {name: target["limit"] for name, target in TARGETS.items()}
MAX_ROWS = 6  # of a table
PEERS = ("eager", "compiled", "bmm")
SMALL_PYRAMIDS = ("pyramid-32", "deep-256")
PICTURES: dict[str, str] = _TEXTS["pictures"]

Case = tuple[str, ...]  # name, dtype and layout
Modes = dict[str, Entry]  # a case: the entry of each mode


class ResultFile(NamedTuple):
    """A JSON file: its folder within that of the results, its kind, its head, and its measurements."""

    folder: str
    kind: str
    head: dict[str, Any]
    entries: list[Entry]


class Machine(NamedTuple):
    """The calls measured on a device; `cases` by name, dtype and layout; the cache is 0 if unknown."""

    name: str
    device: str
    cache_bytes: int
    file: ResultFile
    cases: dict[Case, Modes]


class Miss(NamedTuple):
    """A number that misses one of `TARGETS`, by which factor, and the number as text."""

    target: str
    case: Case
    mode: str
    severity: float
    text: str


def read_files(folder: Path) -> list[ResultFile]:
    """Every file of results under a folder, by name; other JSON is passed over, no JSON is a ValueError."""
    found = []
    for path in sorted(folder.rglob("[!.]*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if isinstance(content, dict) and "measurements" in content:
            place = path.parent.relative_to(folder).as_posix()
            found.append(ResultFile(place, content["kind"], content, content["measurements"]))
    return found


def machines_of(files: Iterable[ResultFile]) -> list[Machine]:
    """The calls of each device in each file; on a GPU `seconds` and `ratios` are those of the device."""
    found = []
    for file in (file for file in files if file.kind == "calls"):
        for device in sorted({entry["device"] for entry in file.entries}):
            cases: dict[Case, Modes] = {}
            for entry in (entry for entry in file.entries if entry["device"] == device):
                times: Entry = {}
                if "device_seconds" in entry:
                    times = {"seconds": entry["device_seconds"], "ratios": entry["device_ratios"]}
                    times |= {"host_seconds": entry["seconds"], "host_ratios": entry["ratios"]}
                cases.setdefault(_key(entry), {})[entry["mode"]] = entry | times
            names, about = [key[0] for key in cases], file.head["machine"]
            ordered = {key: cases[key] for key in sorted(cases, key=lambda key: names.index(key[0]))}
            name, cache = ("gpu", "gpu_cache_bytes") if device == "cuda" else ("cpu_model", "cpu_cache_bytes")
            found.append(Machine(about[name], device, about[cache] or 0, file, ordered))
    return found


def _key(entry: Entry) -> Case:
    return entry["case"], entry["dtype"], entry["layout"]


def best_peer(entry: Entry | None) -> tuple[float | None, str]:
    """Time of the fastest peer over the op's, None where there is no peer, and its name."""
    found = [(value, name) for name in PEERS if (value := median(entry, f"{name}/op")) is not None]
    return min(found, default=(None, ""))


def missed_targets(machine: Machine) -> list[Miss]:
    """Every number that misses a target, by target, the worst first."""
    found = [miss for case in machine.cases.items() for miss in _missed(*case, machine.cache_bytes)]
    return sorted(found, key=lambda miss: ([*TARGETS].index(miss.target), -miss.severity))


def _missed(case: Case, modes: Modes, cache: int) -> Iterator[Miss]:
    size = next(iter(modes.values()))["feature_bytes"]
    where = "in" if 2 * size <= cache else "beyond"
    for mode, entry in modes.items():
        for name in (*PEERS, "single calls"):
            factor = median(entry, f"{name}/op") or 1
            noise = ", within the noise" if factor < 1 <= entry["ratios"][f"{name}/op"]["q3"] else ""
            if factor < 1:
                text = f"{1 / factor:.2f} times the time of `{name}`{noise}"
                yield Miss(f"slower, {where} the cache", case, mode, 1 / factor, text)
        floor = median(entry, "kernel/floor" if mode == "kernel backward" else "op/floor")
        if mode in LIMITS and 0 < cache < size and floor and floor > LIMITS[mode]:
            yield Miss(mode, case, mode, floor / LIMITS[mode], f"{floor:.2f}")
        share = memory_share(entry) if mode in (FORWARD, STEP) else 0
        if share >= LIMITS["memory"]:
            yield Miss("memory", case, mode, share / LIMITS["memory"], f"{share:.1%}")
    aims = {"eager": (median(modes.get(STEP), "eager/op"), "eager")}
    if case[2] == "channels_last" or where == "in":
        aims["best peer"] = best_peer(modes.get(STEP))
    if case[0] in SMALL_PYRAMIDS:
        aims["single calls"] = (median(modes.get(STEP), "single calls/op"), "single calls")
    for target, (value, name) in aims.items():
        if value is not None and value < LIMITS[target]:
            yield Miss(target, case, STEP, LIMITS[target] / value, f"{value:.2f} (`{name}`)")


def page(files: Sequence[ResultFile], way: str = "", pictures: Iterable[str] = ()) -> str:
    """README.md, at most 120 lines whatever was measured; `way` leads to the folder of the results."""
    machines = dict(zip("ABCDEFGH", machines_of(files), strict=False))
    classes = {
        letter: [
            entry
            for file in files
            if (file.folder, file.kind) == (machine.file.folder, "classes")
            for entry in file.entries
            if entry["device"] == machine.device
        ]
        for letter, machine in machines.items()
    }
    classes = {letter: entries for letter, entries in classes.items() if entries}
    worst = "; ".join(f"{mode} {losses}" for mode, losses in class_losses(classes))
    lost = [_TEXTS["classes"].format(worst=worst)] if worst else []
    about = [f"**{letter}**: {_summary(machine, files, way)}" for letter, machine in machines.items()]
    filled = {
        "MACHINES": "\n".join(map(bullet, about)) or "Nothing has been measured yet.",
        "TABLE": "\n\n".join(_rows_tables(machines)),
        "PICTURES": "\n".join(f"![{PICTURES[name]}]({Path(way, name).as_posix()}.png)" for name in pictures),
        "CLASSES": class_rows(classes) or "Nothing of it has been measured yet.",
        "LOSSES": "\n".join(map(bullet, [*_losses(machines), *lost])) or "Nowhere: every figure is held.",
    }
    text = (HERE / "page.md").read_text(encoding="utf-8")
    return re.sub(f"^({'|'.join(filled)})$", lambda found: filled[found[0]], text, flags=re.MULTILINE)


def _rows_tables(machines: dict[str, Machine]) -> Iterator[str]:
    """A table of the machines that measured on a CPU, and one of the others."""
    for device in ("cpu", "cuda"):
        of_device = {letter: machine for letter, machine in machines.items() if machine.device == device}
        if of_device:
            yield _rows_table(of_device)


def _rows_table(machines: dict[str, Machine]) -> str:
    """The rows that the most machines have measured."""
    measured = {row: sum(row in machine.cases for machine in machines.values()) for row in ROWS}
    chosen = sorted((row for row in ROWS if measured[row]), key=lambda row: -measured[row])[:MAX_ROWS]
    rows = []
    for row in (row for row in ROWS if row in chosen):
        cells = [label(row)]
        for modes in (machine.cases.get(row, {}) for machine in machines.values()):
            for mode in ("kernel forward", "kernel backward"):
                value = median(modes.get(mode), "kernel/floor")
                cells.append(NONE if value is None else f"{value:.2f}")
            for value in (median(modes.get(STEP), f"{name}/op") for name in PEERS):
                text = NONE if value is None else f"{value:.3g}×"
                cells.append(f"**{text}**" if value is not None and value < 1 else text)
        rows.append(cells)
    names = ("forward", "backward", *PEERS)
    return table(["case", *(f"{letter} {name}" for letter in machines for name in names)], rows)


def _losses(machines: dict[str, Machine]) -> Iterator[str]:
    """What misses each target on each machine, and why."""
    missed = {letter: missed_targets(machine) for letter, machine in machines.items()}
    for name, target in TARGETS.items():
        worst = []
        for letter, misses in missed.items():
            found = [miss for miss in misses if miss.target == name]
            if found:
                count = f", {len(found)} in all" if len(found) > 1 else ""
                worst.append(f"{letter} {found[0].text} ({label(found[0].case)}{count})")
        if worst:
            yield f"**{target['title'].format(**target)}**: {'; '.join(worst)}. {target['reason']}"


def _summary(machine: Machine, files: Iterable[ResultFile], way: str) -> str:
    """What the machine is, from what to what its ratios go, and what a training step costs there."""
    head, about, folder = machine.file.head, machine.file.head["machine"], machine.file.folder
    sets = about.get("instruction_set") or "/".join(about["build"]["isa"])
    name = f"[{machine.name}]({Path(way, folder, 'tables.md').as_posix()})"
    size = f"{about['cpu_cores']} cores, {sets}, cache {machine.cache_bytes / 2**20:.0f} MiB"
    size += f", a copy moves {about['copy_bytes_per_second'][machine.device] / 1e9:.3g} GB/s"
    build = f"torch {about['versions']['torch']}, commit {str(head['commit'].get('id'))[:7]}"
    parts = [f"{name}, {size}; {build}, {head['when'][:10]}"]
    steps = [modes[STEP] for modes in machine.cases.values() if STEP in modes]
    best = [value for value, _ in map(best_peer, steps) if value is not None]
    eager = [value for value in (median(step, "eager/op") for step in steps) if value is not None]
    if best and eager:
        times = f"{span(best)} times as fast as the best peer, {span(eager)} times as fast as eager"
        parts.append(f"Forward and backward are {times}")
    # A step with the best of `op`, `tap` and `free` over the step without the loss.
    costs: dict[str, list[float]] = {}
    for file in (file for file in files if (file.folder, file.kind) == (folder, "steps")):
        for step in (step for step in file.entries if step["device"] == machine.device):
            word = "A compiled one" if "compiled" in step["mode"] else "A training step"
            keys = [key for key in ("op/without", "tap/without", "free/without") if key in step["ratios"]]
            ratios = [step["ratios"][key]["median"] for key in keys]
            costs.setdefault(word, []).extend([min(ratios)] if ratios else [])
    for word, found in sorted(costs.items(), reverse=True):
        parts += [f"{word} with the loss on nine layers takes {span(found)} times as long as without"]
    return ". ".join(parts) + "."


def tables(files: Sequence[ResultFile]) -> str:
    """tables.md: all that the files of one folder hold."""
    parts = ["# All measurements\n", _TEXTS["tables"], ""]
    shown: dict[str, Callable[[Entry, str], str]] = {
        "Peak memory": lambda entry, name: f"{memory_share(entry, name):.1%}",
        "As the host sees it": lambda entry, name: timing(entry, name, "host_"),
        "Launches": lambda entry, name: str(entry["launches"][name]),
    }
    for machine in machines_of(files):
        parts += [f"## Calls, {machine.name}\n", *_conditions(machine.file)]
        modes = dict.fromkeys(mode for modes in machine.cases.values() for mode in modes)
        for mode in modes:
            parts += [f"### {mode.capitalize()}\n", _mode_table(machine, mode, timing), ""]
        for title, show in [*shown.items()][: None if machine.device == "cuda" else 1]:
            for mode in (FORWARD, STEP):
                parts += [f"### {title}, {mode}\n", _mode_table(machine, mode, show), ""]
        rows = [(label(miss.case), miss.mode, miss.target, miss.text) for miss in missed_targets(machine)]
        parts += ["### Figures missed\n", table(("case", "mode", "figure", "measured"), rows), ""]
    makers = {"classes": class_tables, **KIND_TABLES}
    for file in (file for file in files if file.kind in makers):
        made = makers[file.kind](file.entries)
        parts += [f"## {file.kind.capitalize()}\n", *_conditions(file), made, ""]
    return "\n".join(parts)


def _conditions(file: ResultFile) -> list[str]:
    head = file.head
    about, build = head["machine"], head["machine"]["build"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    built = ", ".join([build["cpp_compiler"] or "no C++ compiler", *build["isa"], *build["cuda_archs"]])
    rates = ", ".join(f"{rate / 1e9:.3g} GB/s" for rate in about["copy_bytes_per_second"].values())
    changes = ", with changes" if head["commit"].get("dirty") else ""
    where = f"{about['cpu_model']}, {about['threads']} threads, {about['system']}; a copy moves {rates}"
    when = f"Commit {head['commit'].get('id')}{changes}, {head['when']}, `{head['command']}`"
    if "clock" in head:
        load = " to ".join(f"{average:.3g}" for average in head["load"])
        when += f". Times are {head['clock']}; load average {load}"
    said = [where, f"{versions}; built with {built}", when]
    earlier: dict[str, list[str]] = {}
    for entry in file.entries:
        if "commit" in entry:
            name = entry.get("case") or entry["network"]
            earlier.setdefault(entry["commit"], []).append(f"`{name}` {entry['mode']}")
    said += [f"Measured at {commit}: {', '.join(measured)}" for commit, measured in earlier.items()]
    return [*map(bullet, said), ""]


def _mode_table(machine: Machine, mode: str, show: Callable[[Entry, str], str]) -> str:
    """A row a case and a column a contender."""
    entries = [modes[mode] for modes in machine.cases.values() if mode in modes]
    names = dict.fromkeys(name for entry in entries for name in entry["seconds"])
    rows = []
    for entry in entries:
        cells = (show(entry, name) if name in entry["seconds"] else NONE for name in names)
        rows.append([label(_key(entry)), f"{entry['feature_bytes'] / 2**20:.3g}", *cells])
    return table(["case", "MiB", *names], rows)


def draw(machines: Sequence[Machine], folder: Path) -> list[str]:
    """Draw `PICTURES`, a panel for each machine, as far as there are numbers; the names of those drawn."""
    listed = dict.fromkeys(case for machine in machines for case in machine.cases)
    series = [case for case in listed if case[0].startswith("scaling")]
    rows = [case for case in listed if case not in series]
    drawn = {name: cases for name, cases in (("times", rows), ("scaling", series)) if len(cases) > 1}
    if not drawn:
        return []
    from matplotlib import pyplot as plt

    plt.switch_backend("agg")
    plt.style.use("tableau-colorblind10")
    for picture, cases in drawn.items():
        size, line, base = ((10, 1.5 + 0.19 * len(rows)), "", 10) if cases is rows else ((10, 3.5), "-", 2)
        options = {"figsize": size, "sharey": True, "squeeze": False, "layout": "constrained"}
        figure, panels = plt.subplots(1, len(machines), **options)
        for axes, machine in zip(panels[0], machines, strict=True):
            for name, style in _TEXTS["styles"].items():
                points = list(_points(machine, cases, name, cases is series))
                if points:
                    axes.plot(*zip(*points, strict=True), style + line, label=name, markersize=5)
            axes.set_title(machine.name, fontsize=10)
            axes.set_xscale("log", base=base)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(color="#DDDDDD", linewidth=0.6)
        if cases is rows:
            panels[0][0].set_yticks(range(len(rows)), [" ".join(case) for case in rows], fontsize=8)
            panels[0][0].invert_yaxis()
        figure.supxlabel(PICTURES[picture], fontsize=9)
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
        figure.savefig(folder / f"{picture}.png", dpi=90, pil_kwargs={"optimize": True})
        plt.close(figure)
    return list(drawn)


def _points(machine: Machine, cases: Sequence[Case], name: str, rates: bool) -> Iterator[tuple[float, float]]:
    """A contender's time over the op's, by row of the case; or its GB/s by MiB."""
    for row, case in enumerate(cases):
        entry = machine.cases.get(case, {}).get(STEP)
        if entry is not None and name in entry["seconds"]:
            size, own = entry["feature_bytes"], entry["seconds"][name]["median"]
            ours = entry["seconds"]["op"]["median"]
            yield (size / 2**20, 2 * size / own / 1e9) if rates else (own / ours, row)


def main() -> None:
    """Write the page, the tables and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON")
    parser.add_argument("--page", type=Path, default=HERE / "README.md", help="file to write")
    arguments = parser.parse_args()
    files = read_files(arguments.results)
    for folder in {file.folder for file in files}:
        text = tables([file for file in files if file.folder == folder])
        (arguments.results / folder / "tables.md").write_text(text, encoding="utf-8")
    try:
        pictures = draw(machines_of(files), arguments.results)
    except ImportError as error:
        pictures = []
        print(f"The page has no pictures: {error}")
    text = page(files, os.path.relpath(arguments.results, arguments.page.resolve().parent), pictures)
    arguments.page.write_text(text, encoding="utf-8")
    print(f"{arguments.page}: {len(text.splitlines())} lines from {len(files)} files of results")


if __name__ == "__main__":
    main()
