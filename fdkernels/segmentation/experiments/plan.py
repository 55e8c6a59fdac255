"""What an experiment consists of: arms, runs, rows of scores, and the functions that make its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.run_data import RunData
from fdkernels.segmentation.saved_runs import SavedRun


@dataclass(frozen=True)
class Arm:
    """One way to train, repeated for each seed and fold.

    Attributes:
        name: of its folder under runs/, and in the tables.
        changes: fields of `TrainingConfig` in which it differs from the options that were given.
        goes_on_from: the arm whose first phase it takes as it is; None trains the first phase alone.
        scored: whether its rows are in scores.csv.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    goes_on_from: str | None = None
    scored: bool = True

    @property
    def phase(self) -> str:
        """The phase that it trains, whose best model is scored."""
        return "warm" if self.goes_on_from is None else "active"

    def config(self, given: TrainingConfig) -> dict[str, Any]:
        """Give the fields that differ from the options, those that make it train one phase included."""
        return {**({"epochs_active": 0} if self.goes_on_from is None else {}), **self.changes}


FIRST_PHASE = Arm("first-phase", {"fd_loss": True}, scored=False)


@dataclass(frozen=True)
class PlannedRun:
    """A run of one arm, seed and fold.

    Attributes:
        arm, seed, fold: of the run.
        config: as `fdkernels train` would have it; `output` is runs/ARM/seedS/foldF.
        data: the images.
        goes_on_from: the key of the run whose first phase it takes.
        trained: the folder where another experiment has trained the same run, or None.
    """

    arm: Arm
    seed: int
    fold: int
    config: TrainingConfig
    data: RunData
    goes_on_from: str | None
    trained: Path | None = None

    @property
    def key(self) -> str:
        """Name the run: its folder under runs/."""
        return run_key(self.arm.name, self.seed, self.fold)

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.config.output)

    @property
    def marker(self) -> Path:
        """The file that is written last: the run's scores."""
        return self.folder / "scores.json"

    @property
    def epochs(self) -> int:
        """How many epochs the run trains itself."""
        return self.config.epochs(self.arm.phase)


def run_key(arm: str, seed: int, fold: int) -> str:
    """Name the run of an arm, seed and fold."""
    return f"{arm}/seed{seed}/fold{fold}"


class ScoreRow(NamedTuple):
    """The scores of one network on one test image.

    Attributes:
        arm, seed, fold: of the run.
        patient: the patient of the image.
        sample: the image's path, relative to the folder of the data.
        dice, iou: of the prediction.
        layer_losses: L_fd by the name of the layer; NaN where it is not defined.
    """

    arm: str
    seed: int
    fold: int
    patient: str
    sample: str
    dice: float
    iou: float
    layer_losses: dict[str, float]


@dataclass(frozen=True)
class Study:
    """A finished experiment, from which its results are computed.

    Attributes:
        output: its folder.
        config: the options that were given, with size and learning rate.
        seeds, folds: of the runs.
        runs: all runs, in their order; in the end without those that failed.
        rows: the scores of the runs that are scored, in their order.
        measured: what `Experiment.measure` gave, by the key of the run.
    """

    output: Path
    config: TrainingConfig
    seeds: Sequence[int]
    folds: Sequence[int]
    runs: Sequence[PlannedRun] = ()
    rows: Sequence[ScoreRow] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)

    def arms(self) -> list[Arm]:
        """List the arms that are scored, in their order."""
        return list({run.arm.name: run.arm for run in self.runs if run.arm.scored}.values())

    def of_arm(self, arm: str) -> list[ScoreRow]:
        """List the rows of an arm."""
        return [row for row in self.rows if row.arm == arm]


@dataclass(frozen=True)
class Experiment:
    """An experiment of the paper.

    Attributes:
        name: on the command line.
        title: what it does, one clause.
        arms: lists the arms for the given options and the number of images of the second data set; an arm
            stands after the one that it goes on from.
        results: computes the results of a finished experiment, and may write pictures into its folder.
        sets: fields of `TrainingConfig` that its arms set, so that they cannot be given.
        needs_second_data: whether novel_dataset and novel_data must be given.
        least_samples: how many test images its results need.
        measure: further numbers of a finished run and phase, plain values that JSON holds.
    """

    name: str
    title: str
    arms: Callable[[TrainingConfig, int], list[Arm]]
    results: Callable[[Study], dict[str, Any]]
    sets: tuple[str, ...] = ("fd_loss",)
    needs_second_data: bool = False
    least_samples: int = 1
    measure: Callable[[SavedRun, str], Any] | None = None

    @property
    def trains(self) -> bool:
        """Whether it needs data at all."""
        return bool(self.sets)


__all__ = ["FIRST_PHASE", "Arm", "Experiment", "PlannedRun", "ScoreRow", "Study", "run_key"]
