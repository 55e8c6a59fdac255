"""Experiments on the disk: scores.csv, summary.json and the runs of every arm."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from fdkernels.segmentation.comparison import interval
from fdkernels.segmentation.data import DATASETS
from fdkernels.segmentation.data.names import natural
from fdkernels.segmentation.report.page import is_number
from fdkernels.segmentation.report.runs import ReportedRun, in_depth, read_reported
from fdkernels.segmentation.report.words import counted
from fdkernels.segmentation.runfiles import read_object
from fdkernels.segmentation.summary import worst_off_count

LOSS = "L_fd_"
SETS = {"worst_off": "worst-off", "best_off": "best-off", "all": "all"}
_PLACE = re.compile(r"seed(\d+)/fold(\d+)")


@dataclass(frozen=True)
class ScoreRow:
    """A row of scores.csv.

    Attributes:
        arm, seed, fold, patient, sample: of which training and image.
        dice, iou: from 0 to 1.
        losses: L_fd by layer, where it is defined.
    """

    arm: str
    seed: int
    fold: int
    patient: str
    sample: str
    dice: float
    iou: float
    losses: dict[str, float]


@dataclass(frozen=True)
class ExperimentRun:
    """A run of an experiment, and of which arm, seed and fold it is."""

    arm: str
    seed: int
    fold: int
    run: ReportedRun


@dataclass(frozen=True)
class Experiment:
    """An experiment with all that its folder says.

    Attributes:
        folder: of it.
        name: "ablation" and so on.
        summary: the content of summary.json, empty where it cannot be read.
        rows: of scores.csv.
        runs: as far as they are begun.
        problems: what is missing or cannot be read, a sentence each.
        unread: how many runs could not be read.
    """

    folder: Path
    name: str
    summary: dict[str, Any]
    rows: tuple[ScoreRow, ...]
    runs: tuple[ExperimentRun, ...]
    problems: tuple[str, ...]
    unread: int

    @property
    def title(self) -> str:
        """How the report calls it."""
        return f"{self.name} ({self.folder.resolve().name})"

    @property
    def arms(self) -> list[str]:
        """The arms with scores, in the order of the summary."""
        scored = {row.arm for row in self.rows}
        stated = self.summary.get("arms")
        order = [str(arm) for arm in stated] if isinstance(stated, (list, dict)) else []
        return [arm for arm in dict.fromkeys([*order, *sorted(scored, key=natural)]) if arm in scored]

    @property
    def baseline(self) -> str | None:
        """The arm that the others are compared with: the one without the loss, or the first."""
        stated = self.summary.get("baseline")
        if stated in self.arms:
            return str(stated)
        plain = (arm for arm in self.arms if arm.replace("_", "-").startswith(("without", "none", "no-")))
        return next(plain, next(iter(self.arms), None))

    @property
    def comparisons(self) -> list[dict[str, Any]]:
        """The comparisons of arms that the experiment has made, as far as summary.json has them."""
        results = self.summary.get("results")
        stated = results.get("comparisons") if isinstance(results, dict) else None
        return [one for one in stated if isinstance(one, dict)] if isinstance(stated, list) else []

    @property
    def pairs(self) -> dict[str, str]:
        """Each arm that is compared, and with which: as the experiment does it, or all with one baseline."""
        arms = set(self.arms)
        stated: dict[str, str] = {}
        for one in self.comparisons:
            if one.get("arm") in arms and one.get("baseline") in arms:
                stated.setdefault(one["arm"], one["baseline"])
        if stated:
            return {arm: stated[arm] for arm in self.arms if arm in stated}
        return {arm: self.baseline for arm in self.arms if self.baseline is not None and arm != self.baseline}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the summary, or of the first run."""
        stated = self.summary.get("settings")
        if isinstance(stated, dict):
            return stated
        return self.runs[0].run.saved.config.as_json() if self.runs else {}

    @property
    def layers(self) -> list[str]:
        """The layers with a loss, from the network's input on."""
        return in_depth({layer for row in self.rows for layer in row.losses})

    def of_arm(self, arm: str) -> list[ScoreRow]:
        """Give the rows of an arm."""
        return [row for row in self.rows if row.arm == arm]

    def samples_of(self, chosen: str) -> set[str]:
        """Name the samples of a set, "worst_off", "best_off" or "all".

        The worst-off are those with the lowest Dice in the mean over all arms and seeds, which favours
        none of the arms; as many as Table 1's share.
        """
        values: dict[str, list[float]] = {}
        for row in self.rows:
            values.setdefault(row.sample, []).append(row.dice)
        if not values or chosen == "all":
            return set(values)
        means = {sample: sum(dice) / len(dice) for sample, dice in values.items()}
        count = worst_off_count(len(means), DATASETS.get(str(self.settings.get("dataset")))).count
        worst = set(sorted(means, key=lambda sample: (means[sample], sample))[:count])
        return worst if chosen == "worst_off" else set(means) - worst


@dataclass(frozen=True)
class Difference:
    """How an arm's score differs from the baseline's on the same samples, seeds and folds.

    Attributes:
        mean: arm minus baseline, in points of a hundred.
        ends: of the 95 % interval, None for fewer than two patients.
        pairs: how many samples and seeds are in both.
    """

    mean: float
    ends: Sequence[float] | None
    pairs: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.ends is not None and (self.ends[0] > 0 or self.ends[1] < 0)


def difference(
    rows: Sequence[ScoreRow], baseline: Sequence[ScoreRow], samples: Collection[str], score: str
) -> Difference | None:
    """Compare two arms on the samples that both have; None where there are none.

    Args:
        rows, baseline: of the two arms.
        samples: the set.
        score: "dice" or "iou".
    """
    before = {(row.seed, row.fold, row.sample): row for row in baseline}
    pairs = [
        (row, before[row.seed, row.fold, row.sample])
        for row in rows
        if row.sample in samples and (row.seed, row.fold, row.sample) in before
    ]
    if not pairs:
        return None
    gains = [100 * (getattr(after, score) - getattr(first, score)) for after, first in pairs]
    ends = interval(gains, [row.patient for row, _ in pairs], [row.seed for row, _ in pairs])
    return Difference(sum(gains) / len(gains), ends, len(pairs))


def over_seeds(rows: Sequence[ScoreRow]) -> list[ScoreRow]:
    """Average the scores and losses of each sample over the seeds under which it was tested."""
    by_sample: dict[str, list[ScoreRow]] = {}
    for row in rows:
        by_sample.setdefault(row.sample, []).append(row)
    return [
        replace(
            own[0],
            dice=fmean(row.dice for row in own),
            iou=fmean(row.iou for row in own),
            losses={
                layer: fmean(row.losses[layer] for row in own if layer in row.losses)
                for layer in {layer for row in own for layer in row.losses}
            },
        )
        for own in by_sample.values()
    ]


def is_experiment(folder: Path) -> bool:
    """Tell whether a folder holds an experiment, begun or done."""
    if (folder / "scores.csv").is_file():
        return True
    try:
        return "experiment" in read_object(folder / "summary.json")
    except ValueError:
        return False


def read_experiment(folder: Path) -> Experiment:
    """Read an experiment; what is missing or cannot be read is named and left out."""
    problems: list[str] = []
    summary: dict[str, Any] = {}
    try:
        summary = read_object(folder / "summary.json")
    except ValueError as error:
        problems.append(f"The summary is missing: {error}.")
    rows, lines = _read_scores(folder / "scores.csv")
    if lines:
        are = "is" if lines == 1 else "are"
        problems.append(f"{counted(lines, 'line')} of scores.csv cannot be read and {are} left out.")
    if not rows and summary.get("experiment") != "mediation":
        problems.append("There are no scores yet: scores.csv is missing or empty.")
    runs, unread = [], 0
    for arm, seed, fold, place in _places(folder):
        try:
            seconds = _seconds(summary, arm, seed, fold)
            run = read_reported(place, f"{arm} (seed {seed}, fold {fold})", seconds=seconds)
        except ValueError as error:
            problems.append(f"Left out: {error}.")
            unread += 1
            continue
        problems += run.problems
        runs.append(ExperimentRun(arm, seed, fold, run))
    name = summary.get("experiment") or next((row[0] for row in rows), "experiment")
    return Experiment(
        folder, str(name), summary, tuple(row for _, row in rows), tuple(runs), tuple(problems), unread
    )


def _read_scores(path: Path) -> tuple[list[tuple[str, ScoreRow]], int]:
    """Read scores.csv: the experiment's name and the row of each line, and how many cannot be read."""
    if not path.is_file():
        return [], 0
    found, lines = [], 0
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for cells in csv.DictReader(file):
            row = _score_row(cells)
            if row is None:
                lines += 1
            else:
                found.append((cells.get("experiment") or "", row))
    return found, lines


def _score_row(cells: Mapping[Any, Any]) -> ScoreRow | None:
    try:
        row = ScoreRow(
            arm=cells["arm"],
            seed=int(cells["seed"]),
            fold=int(cells["fold"] or 0),
            patient=cells["patient"],
            sample=cells["sample"],
            dice=float(cells["dice"]),
            iou=float(cells["iou"]),
            losses={
                name.removeprefix(LOSS): float(cell)
                for name, cell in cells.items()
                if isinstance(name, str) and name.startswith(LOSS) and cell
            },
        )
    except (KeyError, TypeError, ValueError):
        return None
    if not (math.isfinite(row.dice) and math.isfinite(row.iou)):
        return None
    finite = {name: value for name, value in row.losses.items() if math.isfinite(value)}
    return ScoreRow(**{**vars(row), "losses": finite})


def _places(folder: Path) -> Iterator[tuple[str, int, int, Path]]:
    """Find runs/ARM/seedS/foldF: arm, seed, fold and folder, in their order."""
    found = []
    for place in (folder / "runs").glob("**/seed*/fold*"):
        match = _PLACE.fullmatch(f"{place.parent.name}/{place.name}")
        if match and place.is_dir():
            arm = place.parent.parent.relative_to(folder / "runs").as_posix()
            found.append((arm, int(match[1]), int(match[2]), place))
    return iter(sorted(found, key=lambda one: (natural(one[0]), one[1:3])))


def _seconds(summary: Mapping[str, Any], arm: str, seed: int, fold: int) -> float | None:
    """Look up how long a run took: a number, or its training and scoring by name."""
    known = summary.get("seconds")
    seconds = known.get(f"{arm}/seed{seed}/fold{fold}") if isinstance(known, Mapping) else None
    parts: list[Any] = list(seconds.values()) if isinstance(seconds, Mapping) else [seconds]
    return float(sum(parts)) if parts and all(map(is_number, parts)) else None


__all__ = [
    "SETS",
    "Difference",
    "Experiment",
    "ExperimentRun",
    "ScoreRow",
    "difference",
    "is_experiment",
    "over_seeds",
    "read_experiment",
]
