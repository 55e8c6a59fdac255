"""The JSON files of pytest-benchmark as measurements that the report can ask."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


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
        call. host_seconds: by contender, from the call to the moment when its result is there. ratios,
        host_ratios: likewise, of two contenders within a round, under `a/b`. peak_bytes, errors, launches: by
        contender.
    """

    seconds: dict[str, Spread]
    ratios: dict[str, Spread]
    host_seconds: dict[str, Spread]
    host_ratios: dict[str, Spread]
    peak_bytes: dict[str, int]
    errors: dict[str, dict[str, float]]
    launches: dict[str, int]
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
class DeviceResults:
    """The cases of one device in one file, with the conditions under which they were measured."""

    stem: str
    device: str
    machine: dict[str, Any]
    commit: dict[str, Any]
    when: str
    command: str
    quick: bool
    cases: list[CaseResult]

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


def read_results(folder: Path) -> list[DeviceResults]:
    """Everything under a folder, by file name, the CPU before the GPU; other JSON is passed over."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON, as after a run that was broken off: {error}") from error
        if isinstance(content, dict) and "benchmarks" in content and "machine_info" in content:
            stem = path.relative_to(folder).with_suffix("").as_posix()
            found += _by_device(stem, content)
    return found


def _by_device(stem: str, content: dict[str, Any]) -> list[DeviceResults]:
    entries = [entry["extra_info"] for entry in content["benchmarks"]]
    return [
        DeviceResults(
            stem=stem,
            device=device,
            machine=content["machine_info"],
            commit=content["commit_info"],
            when=content["datetime"],
            command=content["command"],
            quick=content["quick"],
            cases=_cases(info for info in entries if info["device"] == device),
        )
        for device in sorted({info["device"] for info in entries})
    ]


def _cases(entries: Iterable[dict[str, Any]]) -> list[CaseResult]:
    cases: dict[tuple[str, str, str], CaseResult] = {}
    for info in entries:
        key = info["case"], info["dtype"], info["layout"]
        if key not in cases:
            cases[key] = CaseResult(*key, info["layers"], info["feature_bytes"])
        cases[key].modes[info["mode"]] = Measurement(
            seconds=_spreads(info.get("device_seconds", info["seconds"])),
            ratios=_spreads(info.get("device_ratios", info["ratios"])),
            host_seconds=_spreads(info["seconds"]),
            host_ratios=_spreads(info["ratios"]),
            peak_bytes=info["peak_bytes"],
            errors=info["errors"],
            launches=info.get("launches", {}),
            rounds=info["rounds"],
            left_out=info["left_out"],
        )
    places = list(dict.fromkeys(case.name for case in cases.values()))
    return sorted(
        cases.values(), key=lambda c: (places.index(c.name), c.dtype != "float32", c.layout != "contiguous")
    )


def _spreads(quartiles: dict[str, dict[str, float]]) -> dict[str, Spread]:
    return {name: Spread(**values) for name, values in quartiles.items()}
