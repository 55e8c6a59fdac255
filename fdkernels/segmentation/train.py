"""The paper's training protocol, top to bottom: folds, a run, a phase.

A run lies in one folder:

    config.json  split.json          what was asked for, who is in which part
    warm/  active/                   one folder a phase
        best.ckpt  best.safetensors  the epoch with the highest validation Dice
        last.ckpt                    from where the phase is resumed
        logs/version_N/metrics.csv   losses, Dice, alpha and L of each layer, by epoch
        tensorboard/version_N/       the same for TensorBoard
        result.json                  written when the phase is complete
    metrics.json                     the results of both phases, written last

A cross-validation holds config.json, a run in each fold-1/ to fold-5/, and folds.json, written last.

References:
    Sections 3.1, 4 and A.4.
"""

from __future__ import annotations

import dataclasses
import statistics
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from rich.console import Console
from torch import Tensor

from fdkernels.segmentation.checkpoints import SaveBestAndLast, WholeFiles
from fdkernels.segmentation.config import PHASES, TrainingConfig
from fdkernels.segmentation.console import PhaseProgress, RunHeader, phase_title, quiet_lightning
from fdkernels.segmentation.data import Split, derive_seed
from fdkernels.segmentation.module import SeedSteps, SegmentationModule
from fdkernels.segmentation.run_data import RunData, RunLoaders, find_data, split_data
from fdkernels.segmentation.runfiles import (
    is_first_process,
    read_json,
    read_weights,
    write_json,
    write_weights,
)
from fdkernels.segmentation.saved_runs import begin_run, check_free

# How long a run that is broken off waits for TensorBoard's writer.
_SECONDS_TO_CLOSE = 5.0


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

    References:
        Section A.4: 5-fold cross-validation.
    """
    config = config.resolved()
    runs = split_data(config, *find_data(config))
    first = is_first_process()
    if progress and first:
        found = next(iter(runs.values()))
        for sentence in (*(f"Left out: {each}" for each in found.skipped), *found.notes):
            Console(stderr=True).print(sentence, highlight=False, markup=False)
    if config.fold != "all":
        (data,) = runs.values()
        return train_run(config, data, callbacks=callbacks, resume=resume, progress=progress)
    output = Path(config.output)
    if first and not resume:
        check_free(output)
    if first:
        write_json(output / "config.json", config.as_json())
    results = []
    for fold, data in runs.items():
        if progress and first:
            Console().print(f"\nFold {fold} of {len(runs)}", highlight=False)
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
    """
    if isinstance(data, Split):
        data = RunData(data)
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
    if resume and written.exists():
        result = read_json(written)
        module.model.load_state_dict(read_weights(folder / "best.safetensors"))
        return result
    criterion, names = module.criterion, module.model.tap_names
    if criterion is not None and phase == "warm":
        criterion.freeze()
    elif criterion is not None:
        criterion.target = config.alpha_target
        criterion.activate()

    loaders = RunLoaders(config, data, seed=derive_seed(config.seed, PHASES.index(phase)))
    saved = SaveBestAndLast(folder)
    trainer = make_trainer(
        config,
        [SeedSteps(loaders.seed), *callbacks, saved],
        max_epochs=config.epochs(phase),
        logger=_loggers(folder, config),
    )
    trainer.fit(
        module,
        datamodule=loaders,
        ckpt_path=saved.last if resume and saved.last.exists() else None,
        weights_only=True,
    )

    layers: dict[str, Any] = {}
    if criterion is not None:
        layers = {
            "final_alpha": dict(zip(names, criterion.alpha.detach().tolist(), strict=True)),
            "final_layer_losses": dict(zip(names, module.epoch_layer_losses.tolist(), strict=True)),
        }
    if criterion is not None and phase == "active":
        layers["alpha_target"] = criterion.target
    best: dict[str, Any] = torch.load(saved.best, map_location="cpu", weights_only=True)
    weights = _network(best)
    if trainer.is_global_zero:
        described = {"model": config.model, "phase": phase, "epoch": str(best["epoch"] + 1)}
        write_weights(folder / "best.safetensors", weights, described)
    module.model.load_state_dict(weights)
    (scores,) = make_trainer(config, [], logger=False).test(module, datamodule=loaders, verbose=False)
    test: dict[str, Any] = {name.removeprefix("test/"): value for name, value in scores.items()}
    result = {
        "epochs": config.epochs(phase),
        "best_epoch": best["epoch"] + 1,
        "validation_dice": best["validation_dice"],
        "test": {**test, "images": int(test["images"])},
        "weights": f"{phase}/best.safetensors",
        "checkpoint": f"{phase}/best.ckpt",
        **layers,
    }
    if trainer.is_global_zero:
        write_json(written, result)
    return result


def make_trainer(config: TrainingConfig, callbacks: Sequence[Callback], **settings: Any) -> Trainer:
    """Make Lightning's Trainer on the devices of the configuration.

    Args:
        config: devices, precision, accumulation and limits.
        callbacks: Lightning's; checkpoints are written by them alone.
        settings: further arguments of the Trainer.
    """
    return Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=config.strategy,
        precision=cast("Any", config.precision),  # Lightning checks it against its own list
        callbacks=list(callbacks),
        plugins=[WholeFiles()],
        default_root_dir=config.output,
        accumulate_grad_batches=config.accumulate,
        use_distributed_sampler=False,  # the loaders know their rank
        # Without deterministic=True: on a CPU a step is deterministic as it is, on a GPU it would cost speed.
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,  # `PhaseProgress` shows one line a phase, Lightning's a bar an epoch
        enable_model_summary=False,
        num_sanity_val_steps=0,  # an epoch later validation runs anyway
        log_every_n_steps=1,
        limit_train_batches=config.limit_batches,
        limit_val_batches=config.limit_batches,
        limit_test_batches=config.limit_batches,
        sync_batchnorm=_syncs_batchnorm(config),
        **settings,
    )


def _syncs_batchnorm(config: TrainingConfig) -> bool:
    """Take the choice of the configuration, else True on GPUs: on a CPU torch has no such layer."""
    if config.sync_batchnorm is not None:
        return config.sync_batchnorm
    return config.accelerator != "cpu" and torch.cuda.is_available()


class InterruptibleTensorBoard(TensorBoardLogger):
    """Lightning's TensorBoardLogger, which after Ctrl-C ends within seconds.

    A Ctrl-C while a value is handed to TensorBoard's writer thread can leave that thread asleep with the
    value unwritten, and closing the log would wait for it for ever.
    """

    def finalize(self, status: str) -> None:
        if status == "success":
            super().finalize(status)
            return
        closing = threading.Thread(target=super().finalize, args=(status,), daemon=True)
        closing.start()
        closing.join(timeout=_SECONDS_TO_CLOSE)


def _loggers(folder: Path, config: TrainingConfig) -> list[Logger]:
    loggers: list[Logger] = [CSVLogger(folder, name="logs")]
    if config.tensorboard:
        loggers.append(InterruptibleTensorBoard(folder, name="tensorboard"))
    return loggers


def _network(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take the network's state dict out of the module's."""
    prefix = "model."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }


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
    "InterruptibleTensorBoard",
    "make_trainer",
    "summarize_folds",
    "train",
    "train_run",
]
