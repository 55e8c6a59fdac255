"""Runs on the disk: begun in a folder, and read from it with their samples and networks."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

import fdkernels
from fdkernels import models
from fdkernels.models import SegmentationNetwork
from fdkernels.segmentation.config import PHASES, TrainingConfig
from fdkernels.segmentation.data import SegmentationSample, Split
from fdkernels.segmentation.data.scan import raise_problems
from fdkernels.segmentation.runfiles import (
    read_json,
    read_object,
    read_weights,
    remove_unfinished,
    write_json,
)

PARTS = ("train", "validation", "test")
# Fields that may differ from the run that is resumed: paths, and what only changes the time.
FREE_ON_RESUME = ("data", "novel_data", "output", "workers", "accelerator", "tensorboard")


def begin_run(config: TrainingConfig, described: Mapping[str, Any], resume: bool) -> None:
    """Write config.json and split.json into the folder of the run, unless that would mix two runs.

    Args:
        config: the run.
        described: the content of split.json.
        resume: the folder may hold this run already.

    Raises:
        ValueError: the folder holds a run and `resume` is False, or a run with another split.
    """
    folder = Path(config.output)
    if resume:
        check_split(config, described)
    else:
        check_free(folder)
    remove_unfinished(folder)
    write_json(folder / "config.json", {**config.as_json(), "versions": versions()})
    write_json(folder / "split.json", described)


def check_split(config: TrainingConfig, described: Mapping[str, Any]) -> None:
    """Refuse data that split otherwise than those with which the run in the folder began, if there is one.

    Args:
        config: the run.
        described: what split.json should hold.

    Raises:
        ValueError: it holds something else.
    """
    written = Path(config.output) / "split.json"
    if not written.exists():
        return
    if not same_split(read_object(written), described):
        raise ValueError(
            f"data {config.data} no longer splits as {written} says; resume with the files that "
            "the run began with"
        )


def same_split(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two contents of split.json name the same images in the same parts."""
    # Skipped files are told with the path of the data, which may have been moved.
    return {**one, "skipped": []} == {**other, "skipped": []}


def check_free(folder: Path) -> None:
    """Refuse a folder that already holds a run.

    Raises:
        ValueError: it does.
    """
    kept = [f"{phase}/{name}.ckpt" for phase in PHASES for name in ("best", "last")]
    if any(list(folder.glob(pattern)) for name in kept for pattern in (name, f"fold-*/{name}")):
        raise ValueError(f"output {folder} already holds a run; continue it with --resume, or name another")


def versions() -> dict[str, str]:
    """List the versions on which the numbers of a run depend."""
    packages = {name: metadata.version(name) for name in ("torch", "lightning", "torchmetrics", "numpy")}
    return {"fdkernels": fdkernels.__version__, "python": platform.python_version(), **packages}


@dataclass(frozen=True)
class SavedRun:
    """A run's folder with its configuration, as `read_run` finds it.

    Attributes:
        folder: of the run, in the layout of `train`.
        config: config.json.
        fold: number of the fold, None for a run without folds.
    """

    folder: Path
    config: TrainingConfig
    fold: int | None = None

    def finished_phases(self) -> list[str]:
        """List the phases that have been trained to their end, in their order."""
        return [phase for phase in PHASES if (self.folder / phase / "result.json").exists()]

    def load_network(self, phase: str) -> SegmentationNetwork:
        """Load the network with the best weights of a phase, in evaluation mode, on the CPU.

        Raises:
            ValueError: the phase is not finished, or its weights cannot be read or do not fit.
        """
        if phase not in self.finished_phases():
            whole = self.folder if self.fold is None else self.folder.parent
            raise ValueError(
                f"run {self.folder} has not finished phase {phase}: there is no {phase}/result.json; "
                f"continue it with fdkernels train --output {whole} --resume"
            )
        weights = self.folder / phase / "best.safetensors"
        return load_network(weights, self.config.model, self.config.base_channels)

    def data(self, moved: str | Path | None = None) -> Path:
        """Find the folder of the data, or where it was `moved`.

        Raises:
            ValueError: there is no such folder.
        """
        root = Path(self.config.data if moved is None else moved)
        if not root.is_dir():
            hint = "; if it has moved, say where it is now with --data" if moved is None else ""
            raise ValueError(f"data {root} of run {self.folder} must be a folder{hint}")
        return root

    def part(self, part: str, moved: str | Path | None = None) -> tuple[list[SegmentationSample], list[str]]:
        """Read the samples of a part from split.json, and their images' paths in the data.

        Raises:
            ValueError: the part is unknown or empty, split.json cannot be used, or files that it
                names are missing.
        """
        if part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part}")
        written, root = self.folder / "split.json", self.data(moved)
        described = read_json(written)
        try:
            with self.config.rules.applied():
                samples = list(getattr(Split.from_json(dict(described), root), part))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{written} cannot be used: {error}") from error
        if not samples:
            raise ValueError(f"part {part} of run {self.folder} holds no image")
        names = [str(entry["image"]) for entry in described[part]]
        raise_problems(
            root,
            [
                f"{file} is named in {written}, but missing"
                for sample in samples
                for file in (sample.image, *sample.masks)
                if not file.is_file()
            ],
        )
        return samples, names


def read_run(folder: str | Path, fold: int | None = None) -> SavedRun:
    """Read the configuration of the run in a folder.

    Raises:
        ValueError: there is none, or its configuration cannot be used.
    """
    folder = Path(folder)
    written = folder / "config.json"
    if not written.exists():
        raise ValueError(f"run {folder} holds no run: there is no config.json and no fold-1")
    return SavedRun(folder, read_config(written), fold)


def read_config(path: Path) -> TrainingConfig:
    """Read config.json of a run.

    Raises:
        ValueError: the file cannot be read, or a field in it cannot be used; the message names both.
    """
    fields = read_object(path)
    try:
        return TrainingConfig.from_json(fields)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used by fdkernels {fdkernels.__version__}: {error}") from error


def read_result(path: Path, layers: Sequence[str] = ()) -> dict[str, Any]:
    """Read result.json of a finished phase.

    Args:
        path: the file.
        layers: names of the layers whose loss it holds.

    Raises:
        ValueError: the file cannot be read, or lacks a number that `train` writes.
    """
    result = read_object(path)
    for where, names in (
        (None, ("epochs", "best_epoch", "validation_dice")),
        ("test", ("dice", "iou", "images")),
        ("final_layer_losses", layers),
    ):
        part = result if where is None else result.get(where)
        for name in names:
            value = part.get(name) if isinstance(part, dict) else None
            if type(value) not in (int, float):
                field = name if where is None else f"{where}.{name}"
                raise ValueError(
                    f"{path} must hold a number as {field}, got {value!r}; remove the file to test that "
                    "phase again"
                )
    return result


def find_runs(folder: str | Path) -> list[SavedRun]:
    """Find the run in a folder, or the run of each fold where it holds fold-1, fold-2 and so on.

    Raises:
        ValueError: there is neither, a fold is missing between others, or as `read_run`.
    """
    folder = Path(folder)
    found = sorted(
        int(match[1])
        for match in (re.fullmatch(r"fold-([1-9]\d*)", entry.name) for entry in _entries(folder))
        if match
    )
    if not found:
        return [read_run(folder)]
    if missing := sorted(set(range(1, found[-1] + 1)) - set(found)):
        raise ValueError(f"run {folder} lacks fold-{missing[0]}, though it has fold-{found[-1]}")
    return [read_run(folder / f"fold-{fold}", fold) for fold in found]


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def load_network(weights: str | Path, model: str, base_channels: int | None = None) -> SegmentationNetwork:
    """Load a network with weights from a safetensors file, in evaluation mode, on the CPU.

    Raises:
        ValueError: the file is missing, no safetensors file, or does not fit the network.
    """
    network = models.create(model, base_channels=base_channels)
    fill_network(network, read_weights(Path(weights)), f"weights {weights}", model, base_channels)
    return network.eval()


def fill_network(
    network: SegmentationNetwork,
    state: Mapping[str, Tensor],
    source: str,
    model: str,
    base_channels: int | None,
) -> None:
    """Give a network the weights of a state dict.

    Args:
        network: is given them.
        state: tensors of any shape by name.
        source: where they are from, for the error: "weights PATH".
        model, base_channels: of which the network was made.

    Raises:
        ValueError: they do not fit the network.
    """
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:  # the last two: no state dict at all
        width = "as published" if base_channels is None else base_channels
        problems = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise ValueError(
            f"{source} do not fit {model} with base_channels {width}: {problems[0]}"
            + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
        ) from error


__all__ = [
    "FREE_ON_RESUME",
    "PARTS",
    "SavedRun",
    "begin_run",
    "check_free",
    "check_split",
    "fill_network",
    "find_runs",
    "load_network",
    "read_config",
    "read_result",
    "read_run",
    "same_split",
    "versions",
]
