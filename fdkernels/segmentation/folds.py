"""A cross-validation: one run a fold, and what they come to together.

config.json   what was asked for
fold-1/ ...   a run each, as `run` describes it
folds.json    mean and standard deviation over the folds, written last
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from rich.console import Console

from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.phase import RunData
from fdkernels.segmentation.run import check_free, run_phases
from fdkernels.segmentation.runfiles import is_first_process, write_json


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1) and values of each score, by phase.

    Args:
        results: metrics.json of two folds or more.
    """
    phases: dict[str, Any] = {}
    for phase in results[0]["phases"]:
        scores = [_scores(result["phases"][phase]) for result in results]
        phases[phase] = {
            name: {
                "mean": statistics.fmean(score[name] for score in scores),
                "standard_deviation": statistics.stdev(score[name] for score in scores),
                "values": [score[name] for score in scores],
            }
            for name in scores[0]
        }
    return {"folds": len(results), "phases": phases}


def _scores(phase: Mapping[str, Any]) -> dict[str, float]:
    tested = {name: score for name, score in phase["test"].items() if name != "images"}
    return {"validation_dice": phase["validation_dice"], **tested}


def run_folds(
    config: TrainingConfig,
    runs: Mapping[int | None, RunData],
    *,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains every fold into OUTPUT/fold-K, one after the other; returns folds.json.

    Args:
        config: of the whole; each fold differs from it in `fold` and `output`.
        runs: the images of each fold.
        callbacks, progress: as in `run.run_phases`.
        resume: take finished folds as they are, go on with the one that was broken off.

    Raises:
        ValueError, RuntimeError: as `run.run_phases`.

    References:
        Section A.4: 5-fold cross-validation.
    """
    output, first = Path(config.output), is_first_process()
    if first and not resume:
        check_free(output)
    if first:
        write_json(output / "config.json", config.as_json())
    results = []
    for fold, data in runs.items():
        if progress and first:
            Console().print(f"\nFold {fold} of {len(runs)}", highlight=False)
        own = dataclasses.replace(config, fold=fold, output=str(output / f"fold-{fold}"))
        results.append(run_phases(own, data, callbacks=callbacks, resume=resume, progress=progress))
    summary = summarize(results)
    if first:
        write_json(output / "folds.json", summary)
    return summary


__all__ = ["run_folds", "summarize"]
