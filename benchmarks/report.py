"""Makes the page from the JSON files: `python -m benchmarks.report`. Every number in it is theirs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.counted_report import counted_section, instructions_section
from benchmarks.reasons import read_reasons
from benchmarks.results import DeviceResults, ResultFile, read_files, read_results
from benchmarks.shortfalls import FIGURES, FORWARD, STEP, Shortfall, best_peer, losses, missed_figures
from benchmarks.steps_report import StepResult, folder_of, read_steps, steps_section
from benchmarks.tables import (
    floors_table,
    launches_table,
    memory_table,
    ops_table,
    peers_table,
    pyramids_table,
    scaling_table,
    shortfalls_table,
    tap_table,
)
from benchmarks.training_report import training_section

HERE = Path(__file__).resolve().parent

INTRODUCTION = """\
# Benchmarks

The feature discrepancy loss beside its floors and beside what a user would write instead. `make bench`
measures (about ten minutes on two cores), `make bench-report` makes this page from the JSON files under
`results/`; no number in it was written by hand. `make bench-instructions` counts the instructions of a call,
`gpu_suite.sh` does all of it on a machine with a GPU, and [tuning.md](tuning.md) notes each variant of a
kernel that was tried.

**Cases.** `enc1-256` is the first encoder level of the UNet on 4 images of 256×256, features
[4, 64, 256, 256]; a decoder level has the shape of its encoder level. `unet-512` is all nine taps in one
call on 4 images of 512×512, `unet-256` on 16 of 256×256; `attention_unet` and `cmunet` have the same shapes,
`nucleisegnet` half the channels. `pyramid` is the nine taps of the UNet on 4 images, `deep` its three
smallest, `pyramid-32` nine small layers. `bool`, `uint8`, `int64`, `soft` and `ignore` are `enc1` with
another mask, `shuffle` and `pooled` are `deep` with an exchange, `released` is `enc1` under the convention of
the authors' code, `volume` is 3-D. A pyramid's mask has the size of the image, and everyone has to resize it.
Features and masks are random.

**Contenders.** `op`: `fdkernels.feature_discrepancy_loss`, on a GPU also on its other backend. `eager`: the
same loss in plain PyTorch, `features * mask` and `features * (1 - mask)`, or the authors' own formula under
`released`; `compiled`: that under `torch.compile`; `bmm`: one matrix product with the two columns `mask` and
`1 - mask`; `single calls`: the op once for each layer. The peers get the mask in the features' dtype,
converted beforehand. Everyone's loss and gradient are compared with a closed form in float64 first; a case in
which one is wrong is not timed.

**Floors.** forward: `features.sum()`; backward: `torch.empty_like(features).fill_(x)`; forward+backward:
both; warm: `fill_` into memory that is there already; `tap`: the features and the arriving gradient read, the
sum written. On a CPU fresh memory costs its page faults, which is most of the time of a large gradient, for
everyone.

**Times.** Contenders are called in turn within a round, once untimed where a cache could help and once timed;
a ratio is that of two times of one round, so that drift of the machine cancels. Numbers are medians, [ ]
holds the quartiles. Forward is that of a training step, with the graph for backward; forward+backward writes
a fresh gradient. On a GPU the time is that of the kernels of a call, without waits for the host, unless a
table says otherwise.
"""

_ALT = {
    "scaling": "Share of the copy rate by size of the features",
    "times": "Times of forward and backward, over the op's",
    "memory": "Peak memory beyond the gradient",
    "steps": "Cost of the loss in a training step",
}


def report(files: Sequence[ResultFile], results: Sequence[DeviceResults], pictures: dict[str, str]) -> str:
    """The page as Markdown.

    Args:
        files: everything that was measured.
        results: the calls of the loss among it.
        pictures: the address of each picture, by `picture_name(...)`.
    """
    parts = [INTRODUCTION]
    trainings = training_section(files)
    if not results and not trainings:
        parts.append("Nothing has been measured yet.\n")
    reasons = read_reasons()
    for part in results:
        steps = read_steps(files, folder_of(part.stem), part.device)
        parts.append(_section(part, steps, pictures, reasons))
    parts += [trainings, counted_section(files), instructions_section(files)]
    return "\n".join(part for part in parts if part)


def picture_name(results: DeviceResults, name: str) -> str:
    """What a picture is called among those of all machines."""
    return f"{folder_of(results.stem)}/{results.device}-{name}"


def _section(
    results: DeviceResults,
    steps: Sequence[StepResult],
    pictures: dict[str, str],
    reasons: dict[str, str],
) -> str:
    def picture(name: str) -> list[str]:
        address = pictures.get(picture_name(results, name))
        return [] if address is None else [f"![{_ALT[name]}]({address})\n"]

    machine = results.machine.get("gpu") if results.device == "cuda" else results.machine["cpu_model"]
    parts = [f"## {machine}\n", _conditions(results), _summary(results)]
    parts += picture("times")
    parts += [
        "### Where we lose\n",
        _grouped(losses(results), reasons, "In no case does a peer take less time."),
    ]
    parts += [
        "### Figures not reached\n",
        _grouped(missed_figures(results), reasons, "Every figure is reached."),
    ]
    if steps:
        parts += [
            "### Cost of a training step\n",
            *picture("steps"),
            steps_section(steps, results.device) + "\n",
        ]
    scaling = scaling_table(results)
    if scaling:
        note = "Bytes that have to move, over the time, as a share of what a copy moves in that time.\n"
        parts += ["### By size\n", note, *picture("scaling"), _folded("the series in numbers", scaling)]
    parts += ["### Over the floors\n", floors_table(results) + "\n"]
    parts += ["### Forward and backward\n", peers_table(results, STEP) + "\n"]
    parts += ["### Forward\n", peers_table(results, FORWARD) + "\n"]
    if results.device == "cuda":
        parts += [
            "### As the host sees it: forward and backward, from the call to its end\n",
            peers_table(results, STEP, host=True) + "\n",
            "### Launches\n",
            launches_table(results) + "\n",
        ]
    for title, text in (
        ("### A pyramid in one call\n", pyramids_table(results)),
        ("### A gradient from the rest of the network\n", tap_table(results)),
    ):
        parts += [title, text + "\n"] if text else []
    parts += [
        "### Memory\n",
        "Peak beyond inputs and, for forward+backward, beyond the gradient, as a share of the features.\n",
        *picture("memory"),
        _folded("peak memory in numbers", memory_table(results)),
    ]
    ops = ops_table(results)
    if ops:
        note = "What torch dispatches in a call; the inside of a compiled graph or a custom op is not seen.\n"
        parts += ["### Ops dispatched\n", note, _folded("ops by contender", ops)]
    return "\n".join(parts)


def _conditions(results: DeviceResults) -> str:
    machine, conditions = results.machine, results.conditions
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    cpu = (
        f"CPU: {machine['cpu_model']}, {machine['cpu_cores']} cores, {machine['threads']} threads, "
        f"cache {_mib(machine['cpu_cache_bytes'])}; {machine['system']}"
    )
    lines = [
        cpu,
        f"Versions: {versions}",
        f"Built with: {_build(machine['build'])}",
        f"Commit: {conditions.commit_text}",
        f"Measured: {conditions.when}, by `{conditions.command}`",
    ]
    if results.device == "cuda":
        gpu = (
            f"GPU: {machine['gpu']}, {machine['gpu_multiprocessors']} multiprocessors, "
            f"{_mib(machine['gpu_memory_bytes'])}, cache {_mib(machine['gpu_cache_bytes'])}"
        )
        lines.insert(0, gpu)
    if results.copy_rate:
        lines.append(f"Copy rate, read and written: {results.copy_rate / 1e9:.3g} GB/s")
    if conditions.quick:
        lines.append("A trial run of a few rounds: its numbers say little.")
    left_out = {
        f"`{name}` is missing: {reason}"
        for case in results.cases
        for measurement in case.modes.values()
        for name, reason in measurement.left_out.items()
    }
    return "\n".join(f"- {line}" for line in [*lines, *sorted(left_out)]) + "\n"


def _summary(results: DeviceResults) -> str:
    """From what to what the ratios go."""
    sentences = []
    for mode in (FORWARD, STEP):
        measured = [case.modes[mode] for case in results.cases if mode in case.modes]
        best = [pair[1] for pair in map(best_peer, measured) if pair is not None]
        eager = [m.ratios["eager/op"].median for m in measured if "eager/op" in m.ratios]
        if best and eager:
            sentences.append(
                f"{mode}: {min(best):.2g} to {max(best):.2g} times as fast as the best of the peers, "
                f"{min(eager):.2g} to {max(eager):.2g} times as fast as eager"
            )
    sentences += _errors(results)
    return "".join(f"- {sentence[0].upper()}{sentence[1:]}.\n" for sentence in sentences)


def _errors(results: DeviceResults) -> list[str]:
    """The op's largest errors. In half precision its gradient is rounded to the features' dtype."""
    sentences = []
    for dtype in dict.fromkeys(case.dtype for case in results.cases):
        errors = [
            measurement.errors["op"]
            for case in results.cases
            for measurement in case.modes.values()
            if case.dtype == dtype and "op" in measurement.errors
        ]
        if errors:
            loss, gradient = (max(error[what] for error in errors) for what in ("loss", "gradient"))
            sentences.append(
                f"largest error of the op in {dtype}, against float64: {loss:.1g} of the loss, "
                f"{gradient:.1g} of the gradient"
            )
    return sentences


def _grouped(shortfalls: Sequence[Shortfall], reasons: dict[str, str], none: str) -> str:
    """The shortfalls by figure: the worst number, what stands in the way, and all of them folded."""
    if not shortfalls:
        return none + "\n"
    parts = []
    for key in dict.fromkeys(shortfall.key for shortfall in shortfalls):
        of_key = [shortfall for shortfall in shortfalls if shortfall.key == key]
        worst = of_key[0]
        parts.append(
            f"**{FIGURES[key][0].upper()}{FIGURES[key][1:]}**: at worst {worst.measured} "
            f"(`{worst.case.name}` {worst.case.dtype} {worst.case.layout}, {worst.mode}). "
            f"{reasons.get(key, 'Why is not known yet.')}\n"
        )
        count = "1 case" if len(of_key) == 1 else f"{len(of_key)} cases"
        parts.append(_folded(count, shortfalls_table(of_key)))
    return "\n".join(parts)


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>\n"


def _build(build: dict[str, Any]) -> str:
    parts = [build["cpp_compiler"] or "no C++ compiler", *build["isa"]]
    if build["cuda_version"]:
        parts += [f"nvcc {build['cuda_version']}", *build["cuda_archs"]]
    return ", ".join(parts)


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.0f} MiB"


def draw_all(
    files: Sequence[ResultFile], results: Sequence[DeviceResults], folder: Path, base: Path
) -> dict[str, str]:
    """Draw every picture beside its results; the address of each as seen from `base`, by its name."""
    try:
        from benchmarks.plot import draw
    except ImportError:
        print("Without matplotlib the page has no pictures.")
        return {}
    addresses = {}
    for part in results:
        steps = read_steps(files, folder_of(part.stem), part.device)
        for name, path in draw(part, steps, folder / folder_of(part.stem)).items():
            addresses[picture_name(part, name)] = Path(os.path.relpath(path, base)).as_posix()
    return addresses


def main() -> None:
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(description="Make the benchmark page from the JSON files.")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON")
    parser.add_argument("--page", type=Path, default=HERE / "README.md", help="file to write")
    arguments = parser.parse_args()
    files, results = read_files(arguments.results), read_results(arguments.results)
    pictures = draw_all(files, results, arguments.results, arguments.page.resolve().parent)
    arguments.page.write_text(report(files, results, pictures), encoding="utf-8")
    print(f"{arguments.page}: {sum(len(part.cases) for part in results)} cases")


if __name__ == "__main__":
    main()
