"""The folder of an experiment: whether it may be used, its scores.csv and its summary.json."""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from fdkernels.segmentation.config import EARLIER, TrainingConfig
from fdkernels.segmentation.experiments.plan import ScoreRow
from fdkernels.segmentation.fields import FieldError
from fdkernels.segmentation.runfiles import read_object, replacing, write_json
from fdkernels.segmentation.sample_table import cell
from fdkernels.segmentation.saved_runs import FREE_ON_RESUME

_LOCK = ".lock"


@contextmanager
def taken(output: Path) -> Iterator[None]:
    """Hold the folder for this process alone; the system lets go of it when the process ends, killed or not.

    Raises:
        ValueError: another process holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    fcntl = _fcntl()
    with (output / _LOCK).open("w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"output {output} is in use by another experiment that runs now; wait for it, or name "
                "another folder"
            ) from error
        yield


def _fcntl() -> ModuleType | None:
    """Import the module of file locks; None on Windows, which has none."""
    return importlib.import_module("fcntl") if os.name == "posix" else None


def check_folder(output: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Refuse a folder that holds something else than this experiment.

    Args:
        output: the folder.
        settings: as in summary.json: "experiment", "seeds", "folds" and "settings".
        resume: whether the folder holds this experiment already.

    Raises:
        ValueError: it holds something and `resume` is False, or nothing and `resume` is True.
        FieldError: it holds an experiment with another setting; names that.
    """
    # Hidden files are the lock, and what a process that was killed had begun to write.
    held = output.is_dir() and any(not entry.name.startswith(".") for entry in output.iterdir())
    if not resume:
        if held:
            raise ValueError(
                f"output {output} already holds something; go on with its experiment by --resume, or name "
                "another folder"
            )
        return
    before = read_summary(output)
    if before["experiment"] != settings["experiment"]:
        raise ValueError(
            f"output {output} holds experiment {before['experiment']}, got {settings['experiment']}; name "
            "another folder"
        )
    for name in ("seeds", "folds"):
        if before[name] != settings[name]:
            raise _differs(name, len(settings[name]), len(before[name]), output)
    for name, value in settings["settings"].items():
        began_with = {**EARLIER, **before["settings"]}.get(name)
        if name not in FREE_ON_RESUME and began_with != value:
            raise _differs(name, value, began_with, output)


def _differs(name: str, now: Any, before: Any, output: Path) -> FieldError:
    return FieldError(
        name,
        f"is {now}, but the experiment in {output} began with {before}; leave it out to go on, or name "
        "another folder",
    )


def read_summary(output: Path) -> dict[str, Any]:
    """Read summary.json of an experiment.

    Raises:
        ValueError: there is none, or it lacks what an experiment writes.
    """
    path = output / "summary.json"
    if not path.exists():
        raise ValueError(f"output {output} holds no experiment to resume: there is no summary.json")
    content = read_object(path)
    for name, kind in (("experiment", str), ("seeds", list), ("folds", list), ("settings", dict)):
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{path} must hold {name} as an experiment writes it, got {content.get(name)!r}")  # noqa: TRY004
    return content


def read_settings(output: Path) -> tuple[TrainingConfig, int, int]:
    """Read the options with which the experiment in a folder began, and the numbers of seeds and folds.

    Raises:
        ValueError: there is none, or it cannot be used.
    """
    content = read_summary(output)
    try:
        config = TrainingConfig.from_json(content["settings"])
    except ValueError as error:
        raise ValueError(f"{output / 'summary.json'} cannot be used: {error}") from error
    return config, len(content["seeds"]), len(content["folds"])


def write_scores(path: Path, experiment: str, rows: Sequence[ScoreRow]) -> None:
    """Write scores.csv whole or not at all: a row a sample, an undefined score as an empty cell."""
    layers = list(dict.fromkeys(layer for row in rows for layer in row.layer_losses))
    columns = ["experiment", "arm", "seed", "fold", "patient", "sample", "dice", "iou"]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*columns, *(f"L_fd_{layer}" for layer in layers)])
        for row in rows:
            losses = [cell(row.layer_losses.get(layer, float("nan"))) for layer in layers]
            scores = [cell(row.dice), cell(row.iou), *losses]
            writer.writerow([experiment, row.arm, row.seed, row.fold, row.patient, row.sample, *scores])


def write_summary(output: Path, content: Mapping[str, Any]) -> None:
    """Write summary.json whole or not at all."""
    write_json(output / "summary.json", dict(content))


__all__ = [
    "check_folder",
    "read_settings",
    "read_summary",
    "taken",
    "write_scores",
    "write_summary",
]
