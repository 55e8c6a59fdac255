"""Runs that other experiments have trained already: the same options, images and versions."""

from __future__ import annotations

import dataclasses
import filecmp
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.experiments.plan import PlannedRun
from fdkernels.segmentation.fields import FieldError
from fdkernels.segmentation.runfiles import read_object
from fdkernels.segmentation.saved_runs import FREE_ON_RESUME, read_config, same_split, versions


def with_trained(runs: Sequence[PlannedRun], folders: Sequence[Path]) -> list[PlannedRun]:
    """Give each run the folder where an experiment in `folders` has trained it to the end, if one has.

    Raises:
        FieldError: a folder holds no experiment.
        ValueError: a run in it cannot be read.
    """
    trained: dict[str, list[Path]] = {}
    for folder in folders:
        if not (folder / "summary.json").exists():
            raise FieldError(
                "reuse", f"must name the folder of an experiment, got {folder} without summary.json"
            )
        for written in sorted(folder.glob("runs/*/*/*/config.json")):
            if read_object(written).get("versions") == versions():
                trained.setdefault(_identity(read_config(written)), []).append(written.parent)
    return [
        dataclasses.replace(run, trained=_find(run, trained.get(_identity(run.config), ()))) for run in runs
    ]


# They decide on nothing where the loss does not act. (An exchange does: a last batch of one is left out.)
_OF_ALPHA = ("alpha_lr", "alpha_max", "alpha_rule", "alpha_target")


def _identity(config: TrainingConfig) -> str:
    """Name what decides on a run's numbers: its options without those that may differ on a resume."""
    fields: dict[str, Any] = config.as_json()
    idle = {*FREE_ON_RESUME, *(() if config.fd_loss and config.epochs_active else _OF_ALPHA)}
    return json.dumps({name: fields[name] for name in sorted(fields) if name not in idle})


def _find(run: PlannedRun, folders: Sequence[Path]) -> Path | None:
    """Find the first folder where the phase of the run is finished and scored, on the same images."""
    described = run.data.as_json(run.config)
    for folder in folders:
        files = (f"{run.arm.phase}/result.json", run.marker.name)
        finished = all((folder / file).exists() for file in files)
        if finished and folder != run.folder and same_split(read_object(folder / "split.json"), described):
            return folder
    return None


def begins_alike(run: PlannedRun, first: Path | None) -> bool:
    """Whether the run that `run.trained` holds went on from the same weights as this one does.

    The same options on another machine give others, by rounding.
    """
    if run.trained is None or first is None:
        return run.trained is not None
    ours, theirs = (folder / "warm" / "best.safetensors" for folder in (first, run.trained))
    return theirs.exists() and filecmp.cmp(ours, theirs, shallow=False)


__all__ = ["begins_alike", "with_trained"]
