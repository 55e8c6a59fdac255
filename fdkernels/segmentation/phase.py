"""One phase of the protocol: fitted, its best model kept and tested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor

import fdkernels as fdk
from fdkernels import models
from fdkernels.segmentation.batches import (
    Ranks,
    TrainingBatches,
    shared_evaluation_loader,
    shared_training_loader,
)
from fdkernels.segmentation.checkpoints import SaveBestAndLast, WholeFiles
from fdkernels.segmentation.config import PHASES, TrainingConfig
from fdkernels.segmentation.data import SegmentationSample, Split, default_workers, derive_seed
from fdkernels.segmentation.runfiles import read_json, read_weights, write_json, write_weights
from fdkernels.segmentation.trainer import SeedSteps, SegmentationModule


@dataclass(frozen=True)
class RunData:
    """The images of a run.

    Attributes:
        split: what to train, validate and test on.
        novel: images of a second data set that are trained on besides.
        skipped: a sentence on each file that was left out.
    """

    split: Split
    novel: tuple[SegmentationSample, ...] = ()
    skipped: tuple[str, ...] = ()


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
    return SegmentationModule(
        model,
        criterion,
        lr=config.lr,
        alpha_lr=config.alpha_lr,
        channels_last=config.channels_last,
        compile_network=config.compile,
    )


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


def make_trainer(config: TrainingConfig, callbacks: Sequence[Callback], **settings: Any) -> Trainer:
    """Lightning's Trainer on the devices of the configuration."""
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
        enable_checkpointing=False,  # `SaveBestAndLast` does it
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        limit_train_batches=config.limit_batches,
        limit_val_batches=config.limit_batches,
        limit_test_batches=config.limit_batches,
        sync_batchnorm=_syncs_batchnorm(config),
        **settings,
    )


def _syncs_batchnorm(config: TrainingConfig) -> bool:
    """As chosen; else on GPUs, where a single one takes no notice. On a CPU torch has no such layer."""
    if config.sync_batchnorm is not None:
        return config.sync_batchnorm
    return config.accelerator != "cpu" and torch.cuda.is_available()


def _loggers(folder: Path, config: TrainingConfig) -> list[Logger]:
    loggers: list[Logger] = [CSVLogger(folder, name="logs")]
    if config.tensorboard:
        loggers.append(TensorBoardLogger(folder, name="tensorboard"))
    return loggers


def _fit(
    module: SegmentationModule,
    config: TrainingConfig,
    data: RunData,
    phase: str,
    callbacks: Sequence[Callback],
    resume: bool,
) -> dict[str, Any]:
    """Trains one phase; returns the checkpoint of its best epoch, whose weights it has written."""
    folder = Path(config.output) / phase
    seed = derive_seed(config.seed, PHASES.index(phase))
    split, novel = data.split, data.novel
    images = len(split.train) + len(novel)
    trainer = make_trainer(
        config,
        [SeedSteps(seed), *callbacks],
        max_epochs=config.epochs(phase),
        logger=_loggers(folder, config),
    )
    ranks = Ranks(trainer.global_rank, trainer.world_size)
    loader = shared_training_loader(
        split.train,
        novel,
        size=config.size,
        batch_size=config.batch_size,
        workers=default_workers(images) if config.workers is None else config.workers,
        seed=seed,
        ranks=ranks,
        pairs=config.exchanges,
    )
    saved = SaveBestAndLast(folder, cast("TrainingBatches", loader.sampler))
    trainer.callbacks.append(saved)  # type: ignore[attr-defined]
    trainer.fit(
        module,
        loader,
        shared_evaluation_loader(
            split.validation, size=config.size, batch_size=config.batch_size, ranks=ranks
        ),
        ckpt_path=saved.last if resume and saved.last.exists() else None,
        weights_only=True,
    )
    checkpoint: dict[str, Any] = torch.load(saved.best, map_location="cpu", weights_only=True)
    if trainer.is_global_zero:
        write_weights(
            folder / "best.safetensors",
            _network(checkpoint),
            {"model": config.model, "phase": phase, "epoch": str(checkpoint["epoch"] + 1)},
        )
    return checkpoint


def _network(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The network's state dict in that of the module."""
    prefix = "model."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }


def _test(module: SegmentationModule, config: TrainingConfig, data: RunData) -> dict[str, Any]:
    """What `OverlapScores` gives on the test images."""
    trainer = make_trainer(config, [], logger=False)
    ranks = Ranks(trainer.global_rank, trainer.world_size)
    loader = shared_evaluation_loader(
        data.split.test, size=config.size, batch_size=config.batch_size, ranks=ranks
    )
    (logged,) = trainer.test(module, loader, verbose=False)
    scores: dict[str, Any] = {name.removeprefix("test/"): value for name, value in logged.items()}
    scores["images"] = int(scores["images"])
    return scores


def run_phase(
    module: SegmentationModule,
    config: TrainingConfig,
    data: RunData,
    phase: str,
    callbacks: Sequence[Callback],
    resume: bool,
    warm: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Trains and tests one phase, or takes it as found; leaves the module with its best weights.

    Args:
        module: as `build_module` makes it, with the weights to start from.
        config: the run.
        data: its images.
        phase: "warm" or "active".
        callbacks: further ones of Lightning.
        resume: take a finished phase as it is, and go on with an unfinished one.
        warm: the result of the first phase, for the second.

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
        criterion.target = alpha_target(config, warm)
        criterion.activate()
    best = _fit(module, config, data, phase, callbacks, resume)
    layers: dict[str, Any] = {}
    if criterion is not None:
        layers = {
            "final_alpha": dict(zip(names, criterion.alpha.detach().tolist(), strict=True)),
            "final_layer_losses": dict(zip(names, module.epoch_layer_losses.tolist(), strict=True)),
        }
    if criterion is not None and phase == "active":
        layers["alpha_target"] = criterion.target
    module.model.load_state_dict(_network(best))
    result = {
        "epochs": config.epochs(phase),
        "best_epoch": best["epoch"] + 1,
        "validation_dice": best["validation_dice"],
        "test": _test(module, config, data),
        "weights": f"{phase}/best.safetensors",
        "checkpoint": f"{phase}/best.ckpt",
        **layers,
    }
    if module.trainer.is_global_zero:
        write_json(written, result)
    return result


__all__ = ["RunData", "alpha_target", "build_module", "make_trainer", "run_phase"]
