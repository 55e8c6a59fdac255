"""The paper's training protocol, top to bottom: folds, a run, a phase.

A run lies in one folder:

    config.json  split.json          what was asked for, who is in which part
    warm/  active/                   one folder a phase
        best.ckpt  best.safetensors  the epoch with the highest validation Dice
        last.ckpt                    from where the phase is resumed
        logs/version_0/metrics.csv   losses, Dice, alpha and L of each layer, a row an epoch
        tensorboard/version_0/       the same for TensorBoard
        result.json                  written when the phase is complete
    metrics.json                     the results of both phases, written last

A cross-validation holds config.json, a run in each fold-1/ to fold-5/, and folds.json, written last.

References:
    Sections 3.1, 4 and A.4.
"""

from __future__ import annotations

import dataclasses
import signal
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from fdkernels.segmentation.checkpoints import (
    SaveBestAndLast,
    foreign_checkpoint,
    read_checkpoint,
)
from fdkernels.segmentation.config import PHASES, TrainingConfig
from fdkernels.segmentation.console import RunHeader, phase_title, quiet_lightning
from fdkernels.segmentation.data import Split, derive_seed
from fdkernels.segmentation.logs import EpochLog
from fdkernels.segmentation.module import SeedSteps, SegmentationModule
from fdkernels.segmentation.progress import PhaseProgress
from fdkernels.segmentation.run_data import RunData, RunLoaders, find_data, split_data
from fdkernels.segmentation.runfiles import is_first_process, read_weights, write_json, write_weights
from fdkernels.segmentation.saved_runs import begin_run, check_free, fill_network, read_result
from fdkernels.segmentation.signals import ending_on_signals
from fdkernels.segmentation.terminal import terminal
from fdkernels.segmentation.trainer import check_possible, make_trainer


def train(
    config: TrainingConfig,
    *,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train on a named data set: one run, or with fold "all" one for each fold, one after the other.

    Args:
        config: the run; size and learning rate come from the data set's preset where None. Each fold
            differs from it in `fold` and `output`, which is OUTPUT/fold-K.
        callbacks, progress: as for `train_run`.
        resume: as for `train_run`; finished folds are taken as they are.

    Returns:
        The content of metrics.json, or of folds.json with fold "all".

    Raises:
        ValueError: the data cannot be used or split, and as `train_run`.
        RuntimeError: as `train_run`.
        SystemExit: SIGTERM or SIGHUP has come, with 128 + its number, or Ctrl-C while Lightning trains.

    References:
        Section A.4: 5-fold cross-validation.
    """
    config = config.resolved()
    # Before the images are read, which takes minutes where there are many.
    check_possible(config)
    if is_first_process() and not resume:
        check_free(Path(config.output))
    with ending_on_signals():
        runs = split_data(config, *find_data(config))
        if progress and is_first_process():
            found = next(iter(runs.values()))
            for sentence in (*(f"Left out: {each}" for each in found.skipped), *found.notes):
                terminal(stderr=True).print(sentence, soft_wrap=True)
        if config.fold == "all":
            return _train_folds(config, runs, callbacks, resume, progress)
        (data,) = runs.values()
        return train_run(config, data, callbacks=callbacks, resume=resume, progress=progress)


def _train_folds(
    config: TrainingConfig,
    runs: Mapping[int | None, RunData],
    callbacks: Sequence[Callback],
    resume: bool,
    progress: bool,
) -> dict[str, Any]:
    """Train a run for each fold, and return the content of folds.json."""
    output, first = Path(config.output), is_first_process()
    if first:
        write_json(output / "config.json", config.as_json())
    results = []
    for fold, data in runs.items():
        if progress and first:
            terminal().print(f"\nFold {fold} of {len(runs)}")
        own = dataclasses.replace(config, fold=fold, output=str(output / f"fold-{fold}"))
        results.append(train_run(own, data, callbacks=callbacks, resume=resume, progress=progress))
    summary = summarize_folds(results)
    if first:
        write_json(output / "folds.json", summary)
    return summary


def train_run(
    config: TrainingConfig,
    data: RunData | Split,
    *,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train both phases and test the best model of each; return the content of metrics.json.

    The second phase starts from the best model of the first, the one with the highest Dice on the
    validation images, and with a fresh optimizer. Without the loss the phases are the same, so
    that runs with and without it spend equal steps from equal starts.

    Args:
        config: with `lr` set (`TrainingConfig.resolved`).
        data: images to train, validate and test on.
        callbacks: further Lightning callbacks, for both phases.
        resume: take finished phases as they are and continue an unfinished one from its last checkpoint.
        progress: print a header, and show a live line for each phase.

    Raises:
        ValueError: the folder already holds a run and `resume` is False; it is resumed with another
            split than before; or the network or the loss does not know a name in the configuration.
        RuntimeError: the training loss is no longer finite.
        SystemExit: as `train`.
    """
    with ending_on_signals():
        data = RunData(data) if isinstance(data, Split) else data
        return _train_run(config, data, callbacks, resume, progress)


def _train_run(
    config: TrainingConfig, data: RunData, callbacks: Sequence[Callback], resume: bool, progress: bool
) -> dict[str, Any]:
    first = is_first_process()
    seed_everything(config.seed, workers=True, verbose=False)
    module = SegmentationModule.from_config(config)
    if first:
        begin_run(config, data.as_json(config), resume)
    header = RunHeader(config, data)
    phases: dict[str, dict[str, Any]] = {}
    with quiet_lightning():
        for phase in PHASES:
            if config.epochs(phase) == 0:
                continue
            shown: list[Callback] = []
            if progress and first:
                shown = [header, PhaseProgress(phase_title(phase, config.fd_loss))]
            phases[phase] = _train_phase(module, config, data, phase, [*callbacks, *shown], resume)
    metrics = {"phases": phases}
    if first:
        write_json(Path(config.output) / "metrics.json", metrics)
    return metrics


def _train_phase(
    module: SegmentationModule,
    config: TrainingConfig,
    data: RunData,
    phase: str,
    callbacks: Sequence[Callback],
    resume: bool,
) -> dict[str, Any]:
    """Train and test one phase, or take it as found; leave the module with its best weights.

    Args:
        module: with the weights to start from.
        phase: "warm" or "active".

    Returns:
        The result, which is also written as PHASE/result.json.
    """
    folder = Path(config.output) / phase
    written = folder / "result.json"
    result: dict[str, Any]
    criterion, names = module.criterion, module.model.tap_names
    if resume and written.exists():
        result = read_result(written, () if criterion is None else names)
        path = folder / "best.safetensors"
        fill_network(module.model, read_weights(path), f"weights {path}", config.model, config.base_channels)
        return result
    if criterion is not None and phase == "warm":
        criterion.freeze()
    elif criterion is not None:
        criterion.target = config.alpha_target
        criterion.activate()

    loaders = RunLoaders(config, data, seed=derive_seed(config.seed, PHASES.index(phase)))
    log, saved = EpochLog(folder, config.tensorboard), SaveBestAndLast(folder)
    trainer = make_trainer(
        config, [SeedSteps(loaders.seed), *callbacks, log, saved], max_epochs=config.epochs(phase)
    )
    last = saved.last if resume and saved.last.exists() else None
    try:
        with _ending_ranks(trainer):
            trainer.fit(module, datamodule=loaders, ckpt_path=last, weights_only=True)
    except Exception as error:
        # Until training has begun, Lightning takes the checkpoint apart and stumbles over whatever it lacks.
        if last is None or log.begun or str(last) in str(error):
            raise
        raise foreign_checkpoint(last, error) from error

    layers: dict[str, Any] = {}
    if criterion is not None:
        layers = {
            "final_alpha": dict(zip(names, criterion.alpha.detach().tolist(), strict=True)),
            "final_layer_losses": dict(zip(names, module.epoch_layer_losses.tolist(), strict=True)),
        }
    if criterion is not None and phase == "active":
        layers["alpha_target"] = criterion.target
    described, weights = _best(saved.best)
    fill_network(module.model, weights, f"weights in {saved.best}", config.model, config.base_channels)
    if trainer.is_global_zero:
        header = {"model": config.model, "phase": phase, "epoch": str(described["best_epoch"])}
        write_weights(folder / "best.safetensors", weights, header)
    tester = make_trainer(config, [])
    with _ending_ranks(tester):
        (scores,) = tester.test(module, datamodule=loaders, verbose=False)
    test: dict[str, Any] = {name.removeprefix("test/"): value for name, value in scores.items()}
    result = {
        "epochs": config.epochs(phase),
        **described,
        "test": {**test, "images": int(test["images"])},
        "weights": f"{phase}/best.safetensors",
        "checkpoint": f"{phase}/best.ckpt",
        **layers,
    }
    if trainer.is_global_zero:
        write_json(written, result)
    return result


@contextmanager
def _ending_ranks(trainer: Trainer) -> Iterator[None]:
    """End the processes that the Trainer has started where the block fails: they would wait, or train on."""
    try:
        yield
    except BaseException:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        raise


def _best(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read best.ckpt: what the result says of it, and the network's state dict."""
    checkpoint, prefix = read_checkpoint(path), "model."
    try:
        weights = {
            name.removeprefix(prefix): tensor
            for name, tensor in checkpoint["state_dict"].items()
            if name.startswith(prefix)
        }
        described = {
            "best_epoch": int(checkpoint["epoch"]) + 1,
            "validation_dice": float(checkpoint["validation_dice"]),
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise foreign_checkpoint(path, error) from error
    return described, weights


def summarize_folds(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute mean, standard deviation (n - 1) and values of each score, by phase.

    Args:
        results: metrics.json of two folds or more.

    Returns:
        The content of folds.json.
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


__all__ = [
    "summarize_folds",
    "train",
    "train_run",
]
