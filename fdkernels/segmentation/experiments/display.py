"""The live display of an experiment: a bar an arm, a line a run at work, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from fdkernels.segmentation.experiments.plan import PlannedRun
from fdkernels.segmentation.terminal import terminal


class _Bars(Progress):
    """Bars, and below them the time, which goes on between two epochs, and lines of text."""

    clock: Callable[[], str] = str
    lines: Sequence[str] = ()

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for line in (self.clock(), *self.lines):
            yield Text(line, style="dim")


class Board:
    """Show how far the runs of an experiment are, in epochs, with the time gone and the time left.

    Where the output is no terminal (a log file), a plain line is printed as each run ends.

    Args:
        title: name of the experiment.
        runs: all runs.
        finished: keys of those that are finished already.
        console: where to; None for the usual one.
        shown: show nothing where False.
    """

    def __init__(
        self,
        title: str,
        runs: Sequence[PlannedRun],
        finished: Collection[str] = (),
        console: Console | None = None,
        shown: bool = True,
    ) -> None:
        self.title = title
        self.runs = {run.key: run for run in runs}
        self.console = console or terminal(quiet=not shown)
        self._done = {run.key: run.epochs if run.key in finished else 0 for run in runs}
        self._finished = set(finished)
        self._working: dict[str, int] = {}
        self._begun, self._at_start = time.monotonic(), sum(self._done.values())
        self._bars: _Bars | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Board:
        self._begun = time.monotonic()
        if not self.console.is_terminal or self.console.quiet:
            return self
        self._bars = _Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            expand=True,
        )
        self._bars.clock = self.times
        for name in ("", *dict.fromkeys(run.arm.name for run in self.runs.values())):
            total = sum(run.epochs for run in self._of(name))
            self._tasks[name] = self._bars.add_task(name or f"{self.title}, epochs", total=total, note="")
        self._bars.start()
        self._show()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def trained(self, run: PlannedRun, epochs: int) -> None:
        """Note that a run at work has trained so many of its epochs."""
        if run.key not in self._working and epochs > self._done[run.key] + 1:
            # Epochs of an earlier sitting cost no time in this one.
            self._at_start += epochs - 1
        self._working[run.key] = epochs
        self._done[run.key] = epochs
        self._show()

    def finished(self, run: PlannedRun) -> None:
        """Note that a run is finished."""
        if self._working.pop(run.key, None) is None:
            # Trained elsewhere, or in an earlier sitting.
            self._at_start += run.epochs - self._done[run.key]
        self._finished.add(run.key)
        self._done[run.key] = run.epochs
        self._show()
        if self._bars is None:
            self.console.print(
                f"{self.title}: {_named(run)} is finished, {len(self._finished)} of {len(self.runs)} runs, "
                f"{self.times()}",
                soft_wrap=True,
            )

    def times(self) -> str:
        """Say the time gone, and the time left at the pace so far."""
        gone = time.monotonic() - self._begun
        left = sum(run.epochs - self._done[key] for key, run in self.runs.items() if self._will_train(run))
        pace = sum(self._done.values()) - self._at_start
        rest = "unknown" if pace <= 0 and left else _duration(gone / max(pace, 1) * left)
        return f"{_duration(gone)} gone, {rest} left"

    def _will_train(self, run: PlannedRun) -> bool:
        """Whether epochs of a run cost time: those of one that another experiment has trained do not."""
        return run.trained is None or run.key in self._working

    def _of(self, arm: str) -> list[PlannedRun]:
        return [run for run in self.runs.values() if arm in ("", run.arm.name)]

    def _show(self) -> None:
        if self._bars is None:
            return
        for name, task in self._tasks.items():
            runs = self._of(name)
            ended = sum(run.key in self._finished for run in runs)
            note = f"{ended} of {len(runs)} runs"
            self._bars.update(task, completed=sum(self._done[run.key] for run in runs), note=note)
        self._bars.lines = [
            f"{_named(self.runs[key])}: epoch {epochs} of {self.runs[key].epochs}"
            for key, epochs in self._working.items()
        ]


def _named(run: PlannedRun) -> str:
    return f"{run.arm.name}, seed {run.seed}, fold {run.fold}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


__all__ = ["Board"]
