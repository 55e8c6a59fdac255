"""Lightning's Trainer for a run, and what the machine cannot do, refused before the images are read."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from fdkernels.backend import resolve
from fdkernels.segmentation.checkpoints import WholeFiles
from fdkernels.segmentation.config import TrainingConfig, check_processes
from fdkernels.segmentation.console import quiet_lightning
from fdkernels.segmentation.fields import FieldError
from fdkernels.segmentation.module import SegmentationModule, syncs_batchnorm


def check_possible(config: TrainingConfig) -> None:
    """Refuse what the network, the loss, Lightning or the machine would refuse once training begins.

    Raises:
        ValueError: the network does not take its width, the output cannot be a folder, or there are more
            processes than the machine bears.
        RuntimeError: the backend of the loss is not available on the device.
        MisconfigurationException: Lightning's, for devices that are not there or a strategy that does not
            fit them.
    """
    check_processes("workers", config.workers or 0)
    _check_output(config.output)
    with torch.device("meta"):  # no memory for weights, and no random numbers drawn
        SegmentationModule.from_config(config)
    with quiet_lightning():
        trainer = make_trainer(config, [])
    device = trainer.strategy.root_device
    if device.type == "cpu":
        check_processes("devices", trainer.num_devices)
    if config.fd_loss:
        resolve(config.backend, device)


def _check_output(output: str) -> None:
    if not output:
        raise FieldError("output", "must name a folder, got nothing")
    folder = Path(output)
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    if not there.is_dir():
        raise FieldError("output", f"must be a folder, got {folder}, where {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise FieldError("output", f"must be a folder that can be written, got {folder}")


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
        callbacks=[_KeepSignals(), *callbacks],
        plugins=[WholeFiles()],
        logger=False,  # `EpochLog` writes a row before the checkpoint that it belongs to, Lightning after it
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
        sync_batchnorm=syncs_batchnorm(config),
        **settings,
    )


class _KeepSignals(Callback):
    """Keep the handlers of signals that were there before the Trainer's.

    Lightning's handler of SIGTERM lets the ranks communicate, wherever they are, and waits for ever for one
    that computes; and it ends a run with exit code 0.
    """

    def __init__(self) -> None:
        self._handler: Any = signal.SIG_DFL

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def _restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)


__all__ = ["check_possible", "make_trainer"]
