"""Tables of what was asked for: settings, versions, seeds and time of every run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fdkernels.segmentation.report.page import EMPTY, Block, Notes, Table, duration, number
from fdkernels.segmentation.report.runs import ReportedRun

# What differs between runs anyway and is in other columns.
_ELSEWHERE = ("output", "seed", "fold")
_PHASE_NAMES = {"warm": "one (α = 0)", "active": "two"}


def shown(value: Any) -> str:
    """Write the value of a setting."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, (str, int)) else json.dumps(value, ensure_ascii=False)


def results_table(runs: Sequence[ReportedRun]) -> Table:
    """Tabulate the results of every run and phase."""
    rows = []
    for run in runs:
        for phase in run.phases:
            result = run.results.get(phase)
            if result is None:
                rows.append((run.title, _PHASE_NAMES[phase], *[EMPTY] * 6))
                continue
            test = result["test"]
            scores = (result["validation_dice"], test["dice"], test["iou"])
            counts = (number(result["epochs"], 0), number(result["best_epoch"], 0))
            cells = (*counts, *(number(score, 4) for score in scores), number(test["images"], 0))
            rows.append((run.title, _PHASE_NAMES[phase], *cells))
    return Table(
        "Results of the best epoch of each phase, chosen by validation Dice. Dice and IoU are means over "
        "the test images, from 0 to 1.",
        ("run", "phase", "epochs", "best epoch", "validation Dice", "test Dice", "test IoU", "test images"),
        tuple(rows),
        texts=2,
    )


def settings_blocks(runs: Sequence[ReportedRun], names_of: Sequence[str] | None = None) -> list[Block]:
    """Tabulate the settings of the runs: those that all share, and those that differ.

    Args:
        runs: at least one.
        names_of: of each run, such as its arm; runs of one name with the same settings make one row. None
            takes their titles.
    """
    if not runs:
        return []
    fields = [run.saved.config.as_json() for run in runs]
    names = [name for name in fields[0] if name not in _ELSEWHERE]
    same = [name for name in names if all(one[name] == fields[0][name] for one in fields)]
    differ = [name for name in names if name not in same]
    whose = "of the run" if len(runs) == 1 else f"that all {len(runs)} runs share"
    blocks: list[Block] = [
        Table(
            f"Settings {whose}.",
            ("setting", "value"),
            tuple((name, shown(fields[0][name])) for name in same),
            texts=2,
        )
    ]
    if differ:
        heading = "run" if names_of is None else "arm"
        titles = [run.title for run in runs] if names_of is None else names_of
        lines = (
            (title, *(shown(one[name]) for name in differ)) for title, one in zip(titles, fields, strict=True)
        )
        rows = tuple(dict.fromkeys(lines))
        blocks.append(
            Table("Settings that differ between the runs.", (heading, *differ), rows, texts=1 + len(differ))
        )
    return blocks


def runs_blocks(runs: Sequence[ReportedRun]) -> list[Block]:
    """Tabulate seed, fold, state, time and versions of every run."""
    packages = list(dict.fromkeys(name for run in runs for name in run.versions))
    rows = []
    for run in runs:
        config = run.saved.config
        fold = config.fold if run.saved.fold is None else run.saved.fold
        cells = (run.title, run.state, *(run.versions.get(name, EMPTY) for name in packages))
        rows.append((*cells, str(config.seed), EMPTY if fold is None else str(fold), duration(run.seconds)))
    blocks: list[Block] = [
        Table(
            "Every run: how far it is, versions, seed, fold, and time. Unless an experiment has measured it, "
            "the time is that between the files split.json and metrics.json, for a run that was resumed "
            "that of its last sitting alone.",
            ("run", "state", *packages, "seed", "fold", "time"),
            tuple(rows),
            texts=2 + len(packages),
        )
    ]
    if any(not run.versions for run in runs):
        blocks.append(Notes(("Some runs do not say with which versions they were trained.",)))
    return blocks


__all__ = ["results_table", "runs_blocks", "settings_blocks", "shown"]
