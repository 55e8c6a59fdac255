"""The tables of what is measured beside calls: steps, trainings, instructions, launches, the host's part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.markdown import NONE, Entry, bullet, ratio, table, timing


def _steps(entries: Sequence[Entry]) -> str:
    """Steps or trainings."""
    names = ("op", "tap", "free", "norms", "plain")
    rows = []
    for entry in entries:
        peaks, width = entry["peak_bytes"], entry["base_channels"] or "published"
        sizes = (f"{peaks[n] / 2**20:.4g}" if n in peaks else NONE for n in ("without", *names))
        what = [entry.get("preset", entry["network"]), entry["mode"], f"{entry['images']}, {width}"]
        ratios = [ratio(entry, f"{name}/without") for name in names] + [ratio(entry, "free/norms")]
        rows.append([*what, timing(entry, "without"), *ratios, " / ".join(sizes)])
    header = ["network", "mode", "images, base channels", "without, ms"]
    header += [*(f"{n} / without" for n in names), "free / norms", "peak MiB"]
    reasons = sorted({f"`{name}`: {why}" for entry in entries for name, why in entry["left_out"].items()})
    return table(header, rows) + "".join(f"\n\n{bullet(reason)}" for reason in reasons)


def _instructions(entries: Sequence[Entry]) -> str:
    rows = ((entry["figure"], f"{entry['instructions']:,}", entry["instruction_set"]) for entry in entries)
    return table(("figure", "instructions of a call", "kernels"), rows)


def _counted(entries: Sequence[Entry]) -> str:
    """Launches of the backend `triton`; bytes from the shapes over one read and one write of the features."""
    rows = []
    for entry in entries:
        moved = sum(stage["read"] + stage["written"] for stage in entry["stages"]) / entry["feature_bytes"]
        tap = " / ".join(f"{size / 2**20:.3g}" for size in entry["tap_bytes"])
        counts = (", ".join(f"{n} × {k}" for k, n in entry[way].items()) for way in ("forward", "backward"))
        rows.append([f"`{entry['case']}`", str(entry["num_layers"]), f"{moved / 2:.3f}", tap, *counts])
    header = ("case", "layers", "bytes over the floor", "MiB of backward, `tap` / separate")
    return table([*header, "launches forward", "launches backward"], rows)


def _host(entries: Sequence[Entry]) -> str:
    """Microseconds without kernels, a column for each road."""
    named = {entry["road"]: entry["microseconds"] for entry in entries}
    calls = dict.fromkeys(call for of_road in named.values() for call in of_road)
    rows = [[call, *(f"{of_road[call]:.0f}" for of_road in named.values())] for call in calls]
    return table(["call without its kernels", *(f"`{road}`, µs" for road in named)], rows)


# By the kind of a file of results.
KIND_TABLES: dict[str, Callable[[Sequence[Entry]], str]] = {
    "steps": _steps,
    "training": _steps,
    "instructions": _instructions,
    "launches": _counted,
    "host": _host,
}
