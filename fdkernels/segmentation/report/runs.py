"""Runs of `fdkernels train` as a report needs them: settings, state, results, logs and time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fdkernels.alpha import bounds_of
from fdkernels.models.blocks import TAP_NAMES
from fdkernels.segmentation.config import PHASES
from fdkernels.segmentation.logs import read_rows
from fdkernels.segmentation.runfiles import read_object
from fdkernels.segmentation.saved_runs import SavedRun, read_result, read_run

# Alpha is kept within [0, 1] where a run does not say otherwise: it is what `train` passes to the loss.
_ALPHA_MAX = 1.0
_FOLD = re.compile(r"fold-([1-9]\d*)")


@dataclass(frozen=True)
class ReportedRun:
    """A run with all that its folder says.

    Attributes:
        title: how the report calls it.
        saved: its folder and configuration.
        versions: of the packages on which its numbers depend, as far as config.json has them.
        results: result.json of each finished phase.
        rows: the log of each phase, a row an epoch, cells as text.
        seconds: how long it took, None where nothing says it.
        problems: what cannot be read, a sentence each.
    """

    title: str
    saved: SavedRun
    versions: dict[str, str]
    results: dict[str, dict[str, Any]]
    rows: dict[str, list[dict[str, Any]]]
    seconds: float | None
    problems: tuple[str, ...] = ()

    @property
    def phases(self) -> list[str]:
        """The phases that the run is to have."""
        return [phase for phase in PHASES if self.saved.config.epochs(phase)]

    @property
    def finished(self) -> bool:
        """Whether every phase is trained and tested."""
        return all(phase in self.results for phase in self.phases)

    @property
    def last(self) -> str | None:
        """The last finished phase."""
        return next((phase for phase in reversed(self.phases) if phase in self.results), None)

    @property
    def state(self) -> str:
        """How far the run is, in words."""
        if self.finished:
            return "finished"
        phase = next(phase for phase in self.phases if phase not in self.results)
        done, epochs = len(self.rows[phase]), self.saved.config.epochs(phase)
        number = PHASES.index(phase) + 1
        if not done:
            return "not begun" if phase == self.phases[0] else f"before phase {number}"
        return f"unfinished: {done} of {epochs} epochs of phase {number}"

    def curve(self, name: str, phase: str) -> tuple[list[int], list[float]]:
        """Give the epochs of a phase, from 1, that have a number of the log, and these numbers."""
        found = [(int(row["epoch"]) + 1, _float(row.get(name))) for row in self.rows[phase]]
        kept = [(epoch, value) for epoch, value in found if value is not None]
        return [epoch for epoch, _ in kept], [value for _, value in kept]

    def layers(self, kind: str) -> list[str]:
        """Name the layers of which the log has a number ("alpha", "discrepancy_loss"), from the input on."""
        names = {
            name.partition("/")[2]
            for rows in self.rows.values()
            for row in rows
            for name, value in row.items()
            if name.startswith(f"{kind}/") and value
        }
        return in_depth(names)

    def final_alpha(self) -> dict[str, float]:
        """Give alpha of each layer where the second phase ended, or as far as it has come."""
        stored = self.results.get("active", {}).get("final_alpha")
        if isinstance(stored, dict):
            return {name: float(stored[name]) for name in in_depth(stored)}
        curves = {name: self.curve(f"alpha/{name}", "active")[1] for name in self.layers("alpha")}
        return {name: values[-1] for name, values in curves.items() if values}

    def stuck_alpha(self) -> dict[str, float]:
        """Give the layers whose alpha ended at a bound of its rule, at 0 or at the greatest, with that bound.

        A `ramp` ends at its greatest alpha by design, and `descent` has no bounds.
        """
        rule = self.saved.config.alpha_rule
        if rule not in ("ascent", "clipped"):
            return {}
        bounds = bounds_of(rule, _ALPHA_MAX)
        return {
            name: bound for name, alpha in self.final_alpha().items() for bound in bounds if alpha == bound
        }


@dataclass(frozen=True)
class RunGroup:
    """One run, or the folds of a cross-validation.

    Attributes:
        title: how the report calls it.
        runs: in their order.
        problems: folders that were left out, a sentence each.
    """

    title: str
    runs: tuple[ReportedRun, ...]
    problems: tuple[str, ...] = field(default=())


def in_depth(names: Any) -> list[str]:
    """Sort names of layers from the network's input to its output, names that it does not have last."""
    return sorted(
        names, key=lambda name: (TAP_NAMES.index(name) if name in TAP_NAMES else len(TAP_NAMES), name)
    )


def is_run(folder: Path) -> bool:
    """Tell whether a folder holds a run or its folds."""
    return (folder / "config.json").is_file() or bool(_folds(folder))


def _folds(folder: Path) -> dict[int, Path]:
    found = {}
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = _FOLD.fullmatch(entry.name)
        if match and entry.is_dir():
            found[int(match[1])] = entry
    return dict(sorted(found.items()))


def read_group(folder: Path, title: str) -> RunGroup:
    """Read the run or the folds in a folder; what cannot be read is named and left out."""
    runs, problems = [], []
    folds = _folds(folder)
    if folds and (missing := sorted(set(range(1, max(folds) + 1)) - set(folds))):
        problems.append(f"{title} lacks fold-{missing[0]}, though it has fold-{max(folds)}.")
    for fold, place in folds.items() or [(None, folder)]:
        try:
            runs.append(read_reported(place, title if fold is None else f"{title}, fold {fold}", fold))
        except ValueError as error:
            problems.append(f"Left out: {error}.")
    return RunGroup(title, tuple(runs), tuple(problems))


def read_reported(
    folder: Path, title: str, fold: int | None = None, seconds: float | None = None
) -> ReportedRun:
    """Read a run.

    Args:
        folder: of the run.
        title: how the report calls it.
        fold: its number in a cross-validation.
        seconds: how long it took, where that is known better than from the files' times.

    Raises:
        ValueError: there is none, or its configuration cannot be used.
    """
    saved = read_run(folder, fold)
    problems = []
    results = {}
    for phase in PHASES:
        written = folder / phase / "result.json"
        if not written.exists():
            continue
        try:
            results[phase] = read_result(written)
        except ValueError as error:
            problems.append(f"Left out: {error}.")
    versions = read_object(folder / "config.json").get("versions")
    return ReportedRun(
        title=title,
        saved=saved,
        versions=dict(versions) if isinstance(versions, Mapping) else {},
        results=results,
        rows={phase: read_rows(folder / phase / "logs") for phase in PHASES},
        seconds=_seconds(folder) if seconds is None else seconds,
        problems=tuple(problems),
    )


def _seconds(folder: Path) -> float | None:
    """Measure from split.json, written where a run begins or is resumed, to metrics.json, by their times."""
    try:
        begun, ended = ((folder / name).stat().st_mtime for name in ("split.json", "metrics.json"))
    except OSError:
        return None
    return ended - begun if ended > begun else None  # copied files have lost their times


def _float(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


__all__ = ["ReportedRun", "RunGroup", "in_depth", "is_run", "read_group", "read_reported"]
