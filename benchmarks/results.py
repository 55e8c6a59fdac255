"""The JSON files of measurements: written whole, one a line, and read as what the report can ask."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# What a file holds: `calls` of the loss, training `steps`, the `training` of presets, `instructions`, or
# `launches` and bytes.
KINDS = ("calls", "steps", "training", "instructions", "launches")


class Spread(NamedTuple):
    """A median with its quartiles."""

    median: float
    q1: float
    q3: float


@dataclass(frozen=True)
class Measurement:
    """One mode of a case, such as its forward.

    Attributes:
        seconds: by contender; on a GPU the time of the kernels, as long as that was measured, else of the
            call.
        host_seconds: by contender, from the call to the moment when its result is there.
        ratios, host_ratios: likewise, of two contenders within a round, under `a/b`.
        peak_bytes, errors, launches, ops: by contender.
        left_out: why a contender is not there.
    """

    seconds: dict[str, Spread]
    ratios: dict[str, Spread]
    host_seconds: dict[str, Spread]
    host_ratios: dict[str, Spread]
    peak_bytes: dict[str, int]
    errors: dict[str, dict[str, float]]
    launches: dict[str, int]
    ops: dict[str, int]
    rounds: int
    left_out: dict[str, str]


@dataclass(frozen=True)
class CaseResult:
    """All that was measured of a case."""

    name: str
    dtype: str
    layout: str
    layers: list[str]
    feature_bytes: int
    modes: dict[str, Measurement] = field(default_factory=dict)


@dataclass(frozen=True)
class Conditions:
    """Under what a file was measured."""

    machine: dict[str, Any]
    commit: dict[str, Any]
    when: str
    command: str
    quick: bool

    @property
    def commit_text(self) -> str:
        """The commit, and whether the tree had changes."""
        return f"{self.commit.get('id') or 'unknown'}{', with changes' if self.commit.get('dirty') else ''}"


@dataclass(frozen=True)
class DeviceResults:
    """The cases of one device in one file, with the conditions under which they were measured."""

    stem: str
    device: str
    conditions: Conditions
    cases: list[CaseResult]

    @property
    def machine(self) -> dict[str, Any]:
        """Processor, GPU, versions and copy rate."""
        return self.conditions.machine

    @property
    def listed(self) -> list[CaseResult]:
        """The cases that tables list; the series by size has one of its own."""
        return [case for case in self.cases if not case.name.startswith("scaling")]

    @property
    def copy_rate(self) -> float | None:
        """Bytes a second that a copy reads and writes."""
        rate: float | None = self.machine["copy_bytes_per_second"].get(self.device)
        return rate

    @property
    def cache_bytes(self) -> int | None:
        """The largest cache of the device."""
        size: int | None = self.machine["gpu_cache_bytes" if self.device == "cuda" else "cpu_cache_bytes"]
        return size

    def beyond_cache(self, case: CaseResult) -> bool:
        """Whether the features alone are larger than the cache; False where its size is not known."""
        return self.cache_bytes is not None and case.feature_bytes > self.cache_bytes

    def fits_cache(self, case: CaseResult) -> bool:
        """Whether features and gradient fit into the cache together; False where its size is not known."""
        return self.cache_bytes is not None and 2 * case.feature_bytes <= self.cache_bytes


class ResultFile(NamedTuple):
    """One file.

    Attributes:
        stem: its path from the folder of the results, without the suffix.
        kind: one of `KINDS`.
        conditions: under what it was measured.
        entries: its measurements as they were written.
    """

    stem: str
    kind: str
    conditions: Conditions
    entries: list[dict[str, Any]]


def write_results(
    path: Path, header: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], kind: str = "calls"
) -> None:
    """Write a file whole or not at all; an older one is there until then.

    Args:
        path: the file; folders that are missing are made.
        header: what `record.header` gives.
        entries: the measurements.
        kind: one of `KINDS`.
    """
    head = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {"kind": kind, **header}.items()]
    rows = ",\n".join(json.dumps(entry, allow_nan=False) for entry in entries)
    text = "{\n" + ",\n".join([*head, f'"measurements": [\n{rows}\n]']) + "\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def read_files(folder: Path) -> list[ResultFile]:
    """Every file of results under a folder, by name; other JSON is passed over.

    Raises:
        ValueError: a file is not JSON.
    """
    found = []
    for path in sorted(folder.rglob("[!.]*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if isinstance(content, dict) and content.get("kind") in KINDS:
            stem = path.relative_to(folder).with_suffix("").as_posix()
            conditions = Conditions(
                **{name: content[name] for name in ("machine", "commit", "when", "command", "quick")}
            )
            found.append(ResultFile(stem, content["kind"], conditions, content["measurements"]))
    return found


def read_results(folder: Path) -> list[DeviceResults]:
    """The calls of the loss under a folder, by file name, the CPU before the GPU."""
    return [
        DeviceResults(file.stem, device, file.conditions, _cases(file.entries, device))
        for file in read_files(folder)
        if file.kind == "calls"
        for device in sorted({entry["device"] for entry in file.entries})
    ]


def _cases(entries: Iterable[dict[str, Any]], device: str) -> list[CaseResult]:
    cases: dict[tuple[str, str, str], CaseResult] = {}
    for entry in entries:
        if entry["device"] != device:
            continue
        key = entry["case"], entry["dtype"], entry["layout"]
        if key not in cases:
            cases[key] = CaseResult(*key, entry["layers"], entry["feature_bytes"])
        cases[key].modes[entry["mode"]] = Measurement(
            seconds=spreads(entry.get("device_seconds", entry["seconds"])),
            ratios=spreads(entry.get("device_ratios", entry["ratios"])),
            host_seconds=spreads(entry["seconds"]),
            host_ratios=spreads(entry["ratios"]),
            peak_bytes=entry["peak_bytes"],
            errors=entry["errors"],
            launches=entry.get("launches", {}),
            ops=entry.get("ops", {}),
            rounds=entry["rounds"],
            left_out=entry["left_out"],
        )
    places = list(dict.fromkeys(case.name for case in cases.values()))
    return sorted(
        cases.values(), key=lambda c: (places.index(c.name), c.dtype != "float32", c.layout != "contiguous")
    )


def spreads(quartiles: dict[str, dict[str, float]]) -> dict[str, Spread]:
    """Medians and quartiles as `timing.summarize` gives them."""
    return {name: Spread(**values) for name, values in quartiles.items()}
