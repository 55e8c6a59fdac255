"""One run of an experiment: its first phase taken over, its own phase trained, its test images scored."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fdkernels.segmentation.evaluation import EvaluationOptions, evaluate
from fdkernels.segmentation.experiments.plan import Experiment, PlannedRun, ScoreRow
from fdkernels.segmentation.experiments.reuse import begins_alike
from fdkernels.segmentation.module import NotFiniteError
from fdkernels.segmentation.runfiles import read_object, replacing, write_json
from fdkernels.segmentation.saved_runs import read_run
from fdkernels.segmentation.scoring import SampleScores
from fdkernels.segmentation.train import train_run

# Files of a phase that are only ever replaced whole, so that two folders may share them on the disk.
_SHARED = (".ckpt", ".safetensors")


def carry_out(
    experiment: Experiment, run: PlannedRun, first: Path | None, report: Callable[[int], Any]
) -> None:
    """Train and score a run, from wherever it was broken off; its scores are written last.

    A second phase whose numbers do not stay finite is finished too, without scores: so it would end again.

    Args:
        experiment: to which the run belongs.
        run: the run.
        first: the folder of the run whose first phase it goes on from.
        report: called with the number of epochs that are trained, after each.

    Raises:
        ValueError: as `train_run` and `evaluate`.
        RuntimeError: as `train_run`.
    """
    begun = time.monotonic()
    if first is not None:
        adopt(first / "warm", run.folder / "warm")
    trained_in = run.trained if begins_alike(run, first) else None
    if trained_in is not None:
        adopt(trained_in / run.arm.phase, run.folder / run.arm.phase)
    with one_thread():
        try:
            train_run(run.config, run.data, callbacks=[_Epochs(report)], resume=True, progress=False)
        except NotFiniteError as error:
            if run.goes_on_from is None:
                raise  # without the first phase there is nothing to compare
            seconds = {"training": time.monotonic() - begun, "scoring": 0.0}
            write_json(
                run.marker, {"seconds": seconds, "samples": [], "measured": None, "failed": str(error)}
            )
            return
        trained = time.monotonic()
        training = trained - begun
        if trained_in is not None:  # the time it took there
            there = dataclasses.replace(run.config, output=str(trained_in))
            training = read_scores(dataclasses.replace(run, config=there)).seconds["training"]
        samples: list[dict[str, Any]] = []
        measured = None
        if run.arm.scored:
            options = EvaluationOptions(
                batch_size=run.config.batch_size,
                workers=run.config.workers,
                device="cpu" if run.config.accelerator == "cpu" else "auto",
            )
            found = evaluate(run.folder, phases=[run.arm.phase], options=options)
            samples = [_as_json(row) for row in found.samples]
        if run.arm.scored and experiment.measure is not None:
            measured = experiment.measure(read_run(run.folder), run.arm.phase)
    write_json(
        run.marker,
        {
            "seconds": {"training": training, "scoring": time.monotonic() - trained},
            "samples": samples,
            "measured": measured,
            "failed": None,
            "trained_in": None if trained_in is None else str(trained_in),
        },
    )


def adopt(source: Path, target: Path) -> None:
    """Take over a finished phase: link its weights, copy the rest, result.json last.

    Whatever is broken off in between is done again, as the phase counts as finished by result.json alone.
    """
    if (target / "result.json").exists():
        return
    shutil.rmtree(target, ignore_errors=True)  # or logs of a training that was broken off would stay
    files = [path for path in source.rglob("*") if path.is_file() and path.name != "result.json"]
    for path in (*files, source / "result.json"):
        with replacing(target / path.relative_to(source)) as temporary:
            if path.suffix in _SHARED:
                _link(path, temporary)
            else:
                shutil.copyfile(path, temporary)


def _link(path: Path, place: Path) -> None:
    """Let `place` be the same file as `path`; copy where the file system has no links."""
    place.unlink()
    try:
        os.link(path, place)
    except OSError:
        shutil.copyfile(path, place)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: by their number sums are rounded, and with it any later number of a training.

    So the numbers depend neither on the cores of the machine nor on how many runs share it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Epochs(Callback):
    """Report each epoch."""

    def __init__(self, report: Callable[[int], Any]) -> None:
        self.report = report

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report(trainer.current_epoch + 1)


def _as_json(row: SampleScores) -> dict[str, Any]:
    scores = {name: _number(value) for name, value in row.scores.items()}
    losses = {name: _number(value) for name, value in row.layer_losses.items()}
    return {"patient": row.patient, "sample": row.image, **scores, **row.counts, "layer_losses": losses}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


class RunScores(NamedTuple):
    """What scores.json of a finished run holds.

    Attributes:
        seconds: of its "training" and "scoring", in the sitting that ended each.
        rows: one a test image; none where the arm is not scored.
        measured: what `Experiment.measure` gave.
        failed: why it has no scores, where its numbers did not stay finite; else None.
        trained_in: the folder of the other experiment that it was taken from, or None.
    """

    seconds: dict[str, float]
    rows: list[ScoreRow]
    measured: Any
    failed: str | None
    trained_in: str | None


def read_scores(run: PlannedRun) -> RunScores:
    """Read the scores of a finished run.

    Raises:
        ValueError: its scores.json cannot be read, or is not as a run writes it.
    """
    content = read_object(run.marker)
    try:
        rows = [
            ScoreRow(
                run.arm.name,
                run.seed,
                run.fold,
                one["patient"],
                one["sample"],
                float(one["dice"]),
                float(one["iou"]),
                {
                    layer: math.nan if loss is None else float(loss)
                    for layer, loss in one["layer_losses"].items()
                },
            )
            for one in content["samples"]
        ]
        seconds = {name: float(value) for name, value in content["seconds"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{run.marker} is not as a run of an experiment writes it ({type(error).__name__}: {error}); "
            "remove it to score that run again"
        ) from error
    further = (content.get(name) for name in ("measured", "failed", "trained_in"))
    return RunScores(seconds, rows, *further)


__all__ = ["RunScores", "adopt", "carry_out", "one_thread", "read_scores"]
