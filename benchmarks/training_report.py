"""Time and memory of the presets in training, without the loss and with it: the section of the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.results import ResultFile, Spread
from benchmarks.tables import spread_text, table, width_text

WHAT = (
    "Steps of the second phase of `fdkernels train` on one batch of made-up images in memory: forward, "
    "segmentation loss, feature discrepancy loss, backward, Adam. Reading data is not timed. Side and number "
    "of the images are the preset's unless the command gives others. The steps without the loss come first "
    "and those with it after them, so that drift of the machine does not cancel, as it does in the "
    'interleaved rounds of "Cost of a training step".\n'
)


def training_section(files: Iterable[ResultFile]) -> str:
    """Machine, command and table of each record of trainings; empty where nothing was trained."""
    parts = []
    for file in files:
        if file.kind != "training":
            continue
        if not parts:
            parts += ["## Training\n", WHAT]
        parts += [_conditions(file), _table(file) + "\n"]
    return "\n".join(parts)


def _conditions(file: ResultFile) -> str:
    machine, conditions = file.conditions.machine, file.conditions
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("fdkernels", "torch"))
    steps = sorted({entry["steps"] for entry in file.entries})
    widths = sorted({width_text(entry["base_channels"]) for entry in file.entries})
    memory = (
        "Memory: the most bytes of tensors at once, those of network and optimizer included"
        if _on_gpu(file)
        else "Memory is not listed: on a CPU it is that of the process since its beginning, of the trainings "
        "before too"
    )
    lines = [
        f"{machine['gpu' if _on_gpu(file) else 'cpu_model']}, {versions}",
        f"Commit: {conditions.commit_text}",
        f"Measured: {conditions.when}, by `{conditions.command}`",
        f"Timed steps: {', '.join(map(str, steps))}; width: {', '.join(widths)}",
        memory,
    ]
    return "".join(f"- {line}\n" for line in lines)


def _table(file: ResultFile) -> str:
    header = [
        "network", "data set", "images", "precision", "without, ms a step", "with, ms a step", "over without",
        "without, ms an image", "with, ms an image",
    ]  # fmt: skip
    if _on_gpu(file):
        header += ["memory: without, GiB", "memory: with, GiB", "memory: over without"]
    rows = []
    for entry in file.entries:
        without, with_loss = entry["without_loss"], entry["with_loss"]
        times = [_milliseconds(part["seconds_per_step"]) for part in (without, with_loss)]
        cells = [
            entry["model"],
            entry["dataset"],
            f"{entry['batch_size']}x3x{entry['size']}x{entry['size']}",
            _precision(entry),
            *(spread_text(time, 1) for time in times),
            f"{entry['ratio_of_medians']:.3f}",
            *(f"{time.median / entry['batch_size']:.2f}" for time in times),
        ]
        if _on_gpu(file):
            sizes = [part["peak_bytes"] for part in (without, with_loss)]
            cells += [*(f"{size / 2**30:.2f}" for size in sizes), f"{sizes[1] / sizes[0]:.3f}"]
        rows.append(cells)
    return table(header, rows)


def _on_gpu(file: ResultFile) -> bool:
    return "gpu" in file.conditions.machine


def _milliseconds(quartiles: dict[str, float]) -> Spread:
    return Spread(*(quartiles[name] * 1e3 for name in ("median", "first_quartile", "third_quartile")))


def _precision(entry: dict[str, Any]) -> str:
    """Lightning's word for it, and what else changes how the network computes."""
    others = {"channels_last": "channels_last", "compile": "compiled"}
    return ", ".join([entry["precision"], *(word for name, word in others.items() if entry[name])])
