"""Time and memory of training each preset: `python -m benchmarks.training --output FILE`.

Each preset trains some steps of the second phase as `fdkernels train` does, on made-up images of its real
size in memory, without the loss and with it. Without a GPU a step takes minutes at
real size: give `--size` there.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.results import write_results
from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.display import quiet_lightning
from fdkernels.segmentation.measure import StepClock, peak_memory
from fdkernels.segmentation.phase import build_module, make_trainer
from fdkernels.segmentation.presets import PRESETS, TABLE_2, preset_fields

# Steps that are not counted: the first allocate, choose convolutions, and make the optimizer's state.
WARM_UP = 3


def config_of(preset: str, arguments: argparse.Namespace, fd_loss: bool) -> TrainingConfig:
    """The configuration of a preset, with what the command line changes."""
    fields = preset_fields(preset)
    for name in ("size", "batch_size", "base_channels"):
        if getattr(arguments, name) is not None:
            fields[name] = getattr(arguments, name)
    return TrainingConfig(
        data="",
        output="",
        fd_loss=fd_loss,
        precision=arguments.precision,
        channels_last=arguments.channels_last,
        compile=arguments.compile,
        accelerator=arguments.device,
        **fields,
    )


def made_up_batches(config: TrainingConfig, steps: int) -> list[dict[str, Any]]:
    """The same batch again and again: noise, with a disc of foreground."""
    size, generator = config.size or 1, torch.Generator().manual_seed(0)
    place = torch.arange(size) - size / 2
    disc = (place**2 + place[:, None] ** 2 < (size / 4) ** 2).float()  # [H, W]
    mask = disc.expand(config.batch_size, 1, size, size).contiguous()
    noise = torch.rand(config.batch_size, 3, size, size, generator=generator)
    return [{"image": (noise + mask) / 2, "mask": mask}] * steps


def train_steps(config: TrainingConfig, steps: int) -> dict[str, Any]:
    """Seconds of a step, and the most bytes: on a GPU of tensors, on a CPU of the whole process so far."""
    torch.manual_seed(0)
    module = build_module(config)
    if module.criterion is not None:
        module.criterion.target = -100.0
        module.criterion.activate()
    clock = StepClock()
    on_gpu = config.accelerator == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    batches = made_up_batches(config, WARM_UP + steps)
    trainer = make_trainer(config, [clock], max_epochs=1, logger=False)
    loaders = [torch.utils.data.DataLoader(part, batch_size=None) for part in (batches, batches[:1])]
    trainer.fit(module, *loaders)
    seconds = clock.fits[-1][WARM_UP:]
    quartiles = torch.tensor(seconds, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return {
        "seconds_per_step": dict(
            zip(("first_quartile", "median", "third_quartile"), quartiles.tolist(), strict=True)
        ),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_memory(),
        "loss": float(trainer.callback_metrics["train/loss"]),
    }


def measure(preset: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The entry of a preset: both trainings and their ratio."""
    config = config_of(preset, arguments, fd_loss=True)
    entry: dict[str, Any] = {
        "preset": preset,
        "model": config.model,
        "dataset": config.dataset,
        "size": config.size,
        "batch_size": config.batch_size,
        "base_channels": config.base_channels,
        "precision": config.precision,
        "channels_last": config.channels_last,
        "compile": config.compile,
        "steps": arguments.steps,
    }
    for name, fd_loss in (("without_loss", False), ("with_loss", True)):
        entry[name] = train_steps(config_of(preset, arguments, fd_loss), arguments.steps)
        gc.collect()
        torch.cuda.empty_cache()
    medians = [entry[name]["seconds_per_step"]["median"] for name in ("with_loss", "without_loss")]
    entry["ratio_of_medians"] = medians[0] / medians[1]
    return entry


def line(entry: dict[str, Any]) -> str:
    """The entry for the screen."""
    times, sizes = (
        [entry[name][what] for name in ("without_loss", "with_loss")]
        for what in ("seconds_per_step", "peak_bytes")
    )
    memory = "unknown" if None in sizes else " -> ".join(f"{size / 2**30:.2f}" for size in sizes) + " GiB"
    return (
        f"{entry['preset']:<24} {entry['size']}x{entry['size']} x {entry['batch_size']:<3} "
        f"{times[0]['median'] * 1e3:8.1f} -> {times[1]['median'] * 1e3:8.1f} ms a step "
        f"({entry['ratio_of_medians']:.3f}), {memory}"
    )


def main(options: Iterable[str] | None = None) -> int:
    """Measures preset after preset and writes FILE after each; returns the exit status."""
    arguments = _parse(None if options is None else list(options))
    if arguments.device == "cpu" and arguments.size is None:
        print("There is no GPU. At real size a step takes minutes on a CPU: give --size, such as 64.")
        return 0
    begin = time.monotonic()
    header = record.header(["python", "-m", "benchmarks.training", *sys.argv[1:]], arguments.device)
    entries: list[dict[str, Any]] = []
    for preset in arguments.presets:
        if arguments.time_limit is not None and time.monotonic() - begin > arguments.time_limit:
            print(f"The time is up before {preset}.")
            break
        try:
            with quiet_lightning():
                entry = measure(preset, arguments)
        except torch.OutOfMemoryError as error:
            print(f"{preset}: {str(error).splitlines()[0]}")
            continue
        entries.append(entry)
        write_results(arguments.output, header, entries, kind="training")
        print(line(entry), flush=True)
    return 0


def _parse(options: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the JSON to write")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument(
        "--presets",
        nargs="+",
        choices=list(PRESETS),
        metavar="PRESET",
        default=[f"{dataset}-{model}" for dataset, model in TABLE_2],
        help="default: the nine pairs of Table 2",
    )
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument(
        "--size", type=int, help="side of the images, a multiple of 16, in place of the real one"
    )
    parser.add_argument("--batch-size", type=int, help="in place of the preset's")
    parser.add_argument("--base-channels", type=int, help="width of the first level")
    parser.add_argument("--precision", default="32-true", help="as fdkernels train takes it")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin no preset after this time")
    arguments = parser.parse_args(options)
    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


if __name__ == "__main__":
    sys.exit(main())
