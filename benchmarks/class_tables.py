"""What the pages say of several classes and the Fisher convention, from the files of kind `classes`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks.markdown import NONE, STEP, Entry, label, median, memory_share, table, timing

PEERS = ("single calls", "einsum", "compiled")


def class_rows(entries: Mapping[str, Sequence[Entry]]) -> str:
    """The table of the page: forward and backward of each form of the case that was measured first, or "".

    Args:
        entries: those of each machine, by its letter.
    """
    steps = {
        letter: {(entry["form"], _case(entry)): entry for entry in of_machine if entry["mode"] == STEP}
        for letter, of_machine in entries.items()
    }
    listed = dict.fromkeys(key for of_machine in steps.values() for key in of_machine)
    rows = []
    for form, case in (key for key in listed if key[1] == next(iter(listed))[1]):
        cells = [f"`{form}`, {label(case)}"]
        for of_machine in steps.values():
            entry = of_machine.get((form, case))
            floor = median(entry, "op/floor")
            cells.append(NONE if floor is None else f"{floor:.2f}")
            for value in (median(entry, f"{name}/op") for name in PEERS):
                text = NONE if value is None else f"{value:.3g}×"
                cells.append(f"**{text}**" if value is not None and value < 1 else text)
            shares = (memory_share(entry, name) for name in ("op", "einsum")) if entry else ()
            cells.append(" / ".join(f"{share:.1%}" for share in shares) or NONE)
        rows.append(cells)
    if not rows:
        return ""
    names = ("over floors", *PEERS, "memory, op / einsum")
    return table(["form", *(f"{letter} {name}" for letter in steps for name in names)], rows)


def class_losses(entries: Mapping[str, Iterable[Entry]]) -> Iterator[tuple[str, str]]:
    """By mode, where peers are faster on each machine: the worst, and how many there are."""
    found: dict[str, list[str]] = {}
    for letter, of_machine in entries.items():
        lost: dict[str, list[tuple[float, str]]] = {}
        for entry in of_machine:
            for name in PEERS:
                factor = median(entry, f"{name}/op") or 1
                if factor < 1:
                    where = f"{1 / factor:.2f} times the time of `{name}` (`{entry['form']}`, "
                    lost.setdefault(entry["mode"], []).append((1 / factor, where + label(_case(entry))))
        for mode, of_mode in lost.items():
            count = f", {len(of_mode)} in all" if len(of_mode) > 1 else ""
            found.setdefault(mode, []).append(f"{letter} {max(of_mode)[1]}{count})")
    for mode, texts in found.items():
        yield mode, "; ".join(texts)


def class_tables(entries: Sequence[Entry]) -> str:
    """The tables of a file: times of each mode, and peak memory."""
    parts = []
    for mode in dict.fromkeys(entry["mode"] for entry in entries):
        of_mode = [entry for entry in entries if entry["mode"] == mode]
        names = dict.fromkeys(name for entry in of_mode for name in entry["seconds"])
        for title, show in (("ms", timing), ("peak memory", _peak)):
            rows = [
                [
                    f"`{entry['form']}`, {label(_case(entry))}",
                    f"{entry['feature_bytes'] / 2**20:.3g}",
                    *(show(entry, name) if name in entry["seconds"] else NONE for name in names),
                ]
                for entry in of_mode
            ]
            parts.append(f"### {mode.capitalize()}, {title}\n\n{table(['form', 'MiB', *names], rows)}")
    return "\n\n".join(parts)


def _peak(entry: Entry, name: str) -> str:
    return f"{memory_share(entry, name):.1%}"


def _case(entry: Entry) -> tuple[str, str, str]:
    return entry["case"], entry["dtype"], entry["layout"]
