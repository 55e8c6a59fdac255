"""One run: a phase with alpha at 0, a phase with the loss acting, the best of each.

It lives in one folder:

    config.json  split.json          what was asked for, who is in which part
    warm/  active/                   one folder a phase
        best.ckpt  best.safetensors  the epoch with the highest validation Dice
        last.ckpt                    from where the phase is resumed
        logs/version_N/metrics.csv   losses, Dice, alpha and L of each layer, by epoch
        tensorboard/version_N/       the same for TensorBoard
        result.json                  written when the phase is complete
    metrics.json                     the results of both phases, written last
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, seed_everything

import fdkernels as fdk
from fdkernels.segmentation.config import PHASES, TrainingConfig
from fdkernels.segmentation.data import Split
from fdkernels.segmentation.display import PhaseProgress, RunHeader, phase_title, quiet_lightning
from fdkernels.segmentation.phase import RunData, build_module, run_phase
from fdkernels.segmentation.runfiles import (
    is_first_process,
    read_json,
    remove_unfinished,
    write_json,
)


def _versions() -> dict[str, str]:
    """Of what a run's numbers depend on."""
    packages = {name: metadata.version(name) for name in ("torch", "lightning", "torchmetrics", "numpy")}
    return {"fdkernels": fdk.__version__, "python": platform.python_version(), **packages}


def _described(config: TrainingConfig, data: RunData) -> dict[str, Any]:
    """The content of split.json."""
    described: dict[str, Any] = {"seed": config.seed, "fold": config.fold, **data.split.as_json(config.data)}
    described["skipped"] = list(data.skipped)
    if config.novel_data is not None:
        novel = Split(data.novel, (), ()).as_json(config.novel_data)
        described["novel"] = novel["train"]
    return described


def check_free(folder: Path) -> None:
    """Refuses a folder that holds a run already.

    Raises:
        ValueError: it does.
    """
    kept = [f"{phase}/{name}.ckpt" for phase in PHASES for name in ("best", "last")]
    if any(list(folder.glob(pattern)) for name in kept for pattern in (name, f"fold-*/{name}")):
        raise ValueError(f"output {folder} already holds a run; continue it with --resume, or name another")


def _begin(config: TrainingConfig, data: RunData, resume: bool) -> None:
    """Writes configuration and split into the folder, unless that would mix two runs."""
    folder = Path(config.output)
    if not resume:
        check_free(folder)
    described = _described(config, data)
    written = folder / "split.json"
    if resume and written.exists():
        # What was skipped is told with the path of the data, which may have been moved.
        before, now = ({**content, "skipped": []} for content in (read_json(written), described))
        if before != now:
            raise ValueError(
                f"data {config.data} no longer splits as {written} says; resume with the files that "
                "the run began with"
            )
    remove_unfinished(folder)
    write_json(folder / "config.json", {**config.as_json(), "versions": _versions()})
    write_json(written, described)


def run_phases(
    config: TrainingConfig,
    data: RunData | Split,
    *,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains both phases and tests the best model of each; returns metrics.json.

    The second phase starts from the best model of the first, the one with the highest Dice on the
    validation images, and with a fresh optimizer. Without the loss the phases are the same, so
    that runs with and without it spend equal steps from equal starts.

    Args:
        config: with `lr` set (`TrainingConfig.resolved`).
        data: what to train, validate and test on.
        callbacks: further Lightning callbacks, for both phases.
        resume: go on from what the folder holds: finished phases are taken as they are, an
            unfinished one from its last checkpoint.
        progress: say on what the run computes, and show a live line for each phase.

    Raises:
        ValueError: the folder already holds a run and `resume` is False; it is resumed with another
            split than before; or the configuration names what the network or the loss do not know.
        RuntimeError: the training loss is no longer finite.
    """
    if isinstance(data, Split):
        data = RunData(data)
    first = is_first_process()
    seed_everything(config.seed, workers=True, verbose=False)
    module = build_module(config)
    if first:
        _begin(config, data, resume)
    shown: list[Callback] = [RunHeader(config, data)] if progress and first else []
    phases: dict[str, dict[str, Any]] = {}
    with quiet_lightning():
        for phase in PHASES:
            if config.epochs(phase) == 0:
                continue
            if progress and first:
                shown[1:] = [PhaseProgress(phase_title(phase, config.fd_loss))]
            phases[phase] = run_phase(
                module, config, data, phase, [*callbacks, *shown], resume, phases.get("warm")
            )
    metrics = {"phases": phases}
    if first:
        write_json(Path(config.output) / "metrics.json", metrics)
    return metrics


__all__ = ["check_free", "run_phases"]
