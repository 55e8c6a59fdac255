"""Profile a training: the time of its steps and the peak memory of its process."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.data import Split
from fdkernels.segmentation.train import train_run


class StepClock(Callback):
    """Time each training step: forward, backward and optimizer, without reading the data.

    On a GPU it waits for the device before and after the step, so that the step itself is timed.
    """

    def __init__(self) -> None:
        self.fits: list[list[float]] = []
        self._start = 0.0

    def quartiles(self) -> list[float]:
        """Compute first quartile, median and third quartile of the seconds a step, of the last fit."""
        return statistics.quantiles(self.fits[-1], n=4, method="inclusive")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.fits.append([])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start = self._now(pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.fits[-1].append(self._now(pl_module) - self._start)

    @staticmethod
    def _now(module: LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        return time.perf_counter()


def peak_memory() -> int | None:
    """Read the peak memory of this process in bytes; None where the system does not tell.

    On Linux this is VmHWM of /proc/self/status. The more portable getrusage is the second choice:
    there a child process inherits the peak of the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def train_measured(config: TrainingConfig, split: Split) -> dict[str, Any]:
    """Train both phases and return the metrics, with time and memory of this process.

    Args:
        config: the run.
        split: its images.

    Returns:
        The content of metrics.json, with seconds, cpu_seconds, quartiles of the seconds a step, steps of each
        phase, and peak memory in bytes (on a GPU also of its tensors).
    """
    clock = StepClock()
    before, start, cpu = peak_memory(), time.perf_counter(), time.process_time()
    metrics = train_run(config, split, callbacks=[clock])
    peak = peak_memory()
    metrics["seconds"] = time.perf_counter() - start
    metrics["cpu_seconds"] = time.process_time() - cpu
    metrics["seconds_per_step"] = dict(
        zip(("first_quartile", "median", "third_quartile"), clock.quartiles(), strict=True)
    )
    metrics["steps_per_phase"] = [len(steps) for steps in clock.fits]
    metrics["peak_memory"] = peak
    metrics["peak_memory_before_training"] = before
    metrics["peak_gpu_memory"] = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
    return metrics


__all__ = ["StepClock", "peak_memory", "train_measured"]
