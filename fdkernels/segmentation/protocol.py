"""The paper's protocol: a phase with alpha at 0, a phase with the loss acting, the best of each.

A run lives in one folder:

    config.json  split.json          what was asked for, who is in which part
    warm/  active/                   one folder a phase
        best.ckpt  best.safetensors  the epoch with the highest validation Dice
        last.ckpt                    from where the phase is resumed
        logs/version_N/metrics.csv   losses, Dice, alpha and L of each layer, by epoch
        result.json                  written when the phase is complete
    metrics.json                     the results of both phases, written last
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import fdkernels as fdk
from fdkernels import models
from fdkernels.segmentation.config import PHASES, TrainingConfig
from fdkernels.segmentation.data import (
    DATASETS,
    Split,
    default_workers,
    derive_seed,
    evaluation_loader,
    split_by_patient,
    train_loader,
)
from fdkernels.segmentation.display import PhaseProgress, phase_title, quiet_lightning
from fdkernels.segmentation.runfiles import read_json, read_weights, write_json, write_weights
from fdkernels.segmentation.trainer import SeedEpochs, SegmentationModule


def build_module(config: TrainingConfig) -> SegmentationModule:
    """The network with fresh weights, and the loss unless the configuration leaves it out."""
    if config.lr is None:
        raise ValueError("lr must be given where the data set has no preset, got None")
    model = models.create(config.model, base_channels=config.base_channels)
    criterion = None
    if config.fd_loss:
        criterion = fdk.FeatureDiscrepancyLoss(
            num_layers=len(model.tap_names),
            alpha_rule=config.alpha_rule,
            convention=config.convention,
            exchange=config.exchange,
            backend=config.backend,
            active=False,
        )
    return SegmentationModule(model, criterion, lr=config.lr, alpha_lr=config.alpha_lr)


def alpha_target(config: TrainingConfig, warm: Mapping[str, Any] | None) -> float:
    """The layer loss at which alpha stops growing, for the whole of the second phase.

    Where the configuration gives none, it is 1 below the lowest mean loss that a layer had in the
    last epoch of the first phase: every layer is to be told apart better than the best of them
    was, by a factor e in the discrepancy. A fixed number would not do, since L falls with the
    number of channels and depends on the convention; networks with batch norm have L < 0 in every
    layer as soon as they are trained, and under a target of 0 alpha would stay at 0.

    Args:
        config: whose `alpha_target` goes first.
        warm: the result of the first phase.
    """
    if config.alpha_target is not None:
        return config.alpha_target
    if warm is None:
        raise ValueError("alpha_target must be given where there is no first phase, got None")
    lowest: float = min(warm["final_layer_losses"].values())
    return lowest - 1.0


def _drops_last(config: TrainingConfig, images: int) -> bool:
    """Whether the last batch of an epoch must go: a single image has nobody to exchange with."""
    if not config.exchanges or images % config.batch_size != 1:
        return False
    if images == 1:
        raise ValueError(
            f"exchange={config.exchange} pairs the samples of a batch, and there is only one training image"
        )
    return True


def _trainer(config: TrainingConfig, callbacks: Sequence[Callback], **settings: Any) -> Trainer:
    return Trainer(
        accelerator=config.accelerator,
        devices=1,
        precision=cast("Any", config.precision),  # Lightning checks it against its own list
        callbacks=list(callbacks),
        default_root_dir=config.output,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        limit_train_batches=config.limit_batches,
        limit_val_batches=config.limit_batches,
        limit_test_batches=config.limit_batches,
        **settings,
    )


def _fit(
    module: SegmentationModule,
    config: TrainingConfig,
    split: Split,
    phase: str,
    callbacks: Sequence[Callback],
    resume: bool,
) -> tuple[int, float]:
    """Trains one phase and writes its best weights; returns best epoch (from 1) and its Dice."""
    folder = Path(config.output) / phase
    epochs = config.epochs(phase)
    phase_seed = derive_seed(config.seed, PHASES.index(phase))
    workers = default_workers(len(split.train)) if config.workers is None else config.workers
    best = ModelCheckpoint(
        folder,
        filename="best",
        monitor="val/dice",
        mode="max",
        save_weights_only=True,
        enable_version_counter=False,
    )
    last = ModelCheckpoint(
        folder,
        filename="last",
        every_n_epochs=max(1, epochs // 20),
        enable_version_counter=False,
    )
    trainer = _trainer(
        config,
        [SeedEpochs(phase_seed), best, last, *callbacks],
        max_epochs=epochs,
        logger=CSVLogger(folder, name="logs"),
    )
    saved = folder / "last.ckpt"
    trainer.fit(
        module,
        train_loader(
            split.train,
            size=config.size,
            batch_size=config.batch_size,
            workers=workers,
            seed=phase_seed,
            drop_last=_drops_last(config, len(split.train)),
        ),
        evaluation_loader(split.validation, size=config.size, batch_size=config.batch_size, workers=0),
        ckpt_path=saved if resume and saved.exists() else None,
        weights_only=True,
    )
    checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    prefix = "model."
    write_weights(
        folder / "best.safetensors",
        {
            name.removeprefix(prefix): tensor
            for name, tensor in checkpoint["state_dict"].items()
            if name.startswith(prefix)
        },
        {"model": config.model, "phase": phase, "epoch": str(checkpoint["epoch"] + 1)},
    )
    if best.best_model_score is None:
        raise RuntimeError(f"{folder} has no best model: validation gave no Dice")
    return checkpoint["epoch"] + 1, float(best.best_model_score)


def _test(module: SegmentationModule, config: TrainingConfig, split: Split) -> dict[str, Any]:
    """What `OverlapScores` gives on the test images."""
    loader = evaluation_loader(split.test, size=config.size, batch_size=config.batch_size, workers=0)
    (logged,) = _trainer(config, [], logger=False).test(module, loader, verbose=False)
    scores: dict[str, Any] = {name.removeprefix("test/"): value for name, value in logged.items()}
    scores["images"] = int(scores["images"])
    return scores


def _run_phase(
    module: SegmentationModule,
    config: TrainingConfig,
    split: Split,
    phase: str,
    callbacks: Sequence[Callback],
    resume: bool,
    warm: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Trains and tests one phase, or takes it as found; leaves the module with its best weights."""
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
        criterion.target = alpha_target(config, warm)
        criterion.activate()
    best_epoch, dice = _fit(module, config, split, phase, callbacks, resume)
    layers: dict[str, Any] = {}
    if criterion is not None:
        layers = {
            "final_alpha": dict(zip(names, criterion.alpha.detach().tolist(), strict=True)),
            "final_layer_losses": dict(zip(names, module.epoch_layer_losses.tolist(), strict=True)),
        }
    if criterion is not None and phase == "active":
        layers["alpha_target"] = criterion.target
    module.model.load_state_dict(read_weights(folder / "best.safetensors"))
    result = {
        "epochs": config.epochs(phase),
        "best_epoch": best_epoch,
        "validation_dice": dice,
        "test": _test(module, config, split),
        "weights": f"{phase}/best.safetensors",
        "checkpoint": f"{phase}/best.ckpt",
        **layers,
    }
    write_json(written, result)
    return result


def _begin(config: TrainingConfig, split: Split, resume: bool) -> None:
    """Writes configuration and split into the folder, unless that would mix two runs."""
    folder = Path(config.output)
    kept = [name for phase in PHASES for name in (f"{phase}/best.ckpt", f"{phase}/last.ckpt")]
    if not resume and any((folder / name).exists() for name in kept):
        raise ValueError(f"output {folder} already holds a run; continue it with --resume, or name another")
    described = {"seed": config.seed, **split.as_json(config.data)}
    written = folder / "split.json"
    if resume and written.exists() and read_json(written) != described:
        raise ValueError(
            f"data {config.data} no longer splits as {written} says; resume with the files that "
            "the run began with"
        )
    write_json(folder / "config.json", config.as_json())
    write_json(written, described)


def run_phases(
    config: TrainingConfig,
    split: Split,
    *,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains both phases on a split and tests the best model of each; returns metrics.json.

    The second phase starts from the best model of the first, the one with the highest Dice on the
    validation images, and with a fresh optimizer. Without the loss the phases are the same, so
    that runs with and without it spend equal steps from equal starts.

    Args:
        config: with `lr` set (`TrainingConfig.resolved`).
        split: the parts to train, validate and test on.
        callbacks: further Lightning callbacks, for both phases.
        resume: go on from what the folder holds: finished phases are taken as they are, an
            unfinished one from its last checkpoint.
        progress: show a live line for each phase.

    Raises:
        ValueError: the folder already holds a run and `resume` is False; it is resumed with another
            split than before; or the configuration names what the network or the loss do not know.
        RuntimeError: the training loss is no longer finite.
    """
    seed_everything(config.seed, workers=True, verbose=False)
    module = build_module(config)
    _begin(config, split, resume)
    phases: dict[str, dict[str, Any]] = {}
    with quiet_lightning():
        for phase in PHASES:
            if config.epochs(phase) == 0:
                continue
            shown = [PhaseProgress(phase_title(phase, config.fd_loss))] if progress else []
            phases[phase] = _run_phase(
                module, config, split, phase, [*callbacks, *shown], resume, phases.get("warm")
            )
    metrics = {"phases": phases}
    write_json(Path(config.output) / "metrics.json", metrics)
    return metrics


def train(
    config: TrainingConfig,
    *,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains on a named data set, split 70-20-10 by patient; returns what metrics.json holds.

    Args:
        config: the run; size and learning rate come from the data set's preset where None.
        callbacks, resume, progress: as in `run_phases`.

    Raises:
        ValueError: the data cannot be used or split, and as `run_phases`.
        RuntimeError: as `run_phases`.
    """
    config = config.resolved()
    samples = DATASETS[config.dataset].find_samples(config.data)
    split = split_by_patient(samples, seed=config.seed)
    return run_phases(config, split, callbacks=callbacks, resume=resume, progress=progress)


__all__ = ["build_module", "run_phases", "train"]
