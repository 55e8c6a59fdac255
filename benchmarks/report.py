"""Makes the page from the JSON files: `python -m benchmarks.report`. Every number in it is theirs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.results import DeviceResults, read_results
from benchmarks.shortfalls import FORWARD, STEP, best_peer, losses, missed_figures
from benchmarks.tables import (
    floors_table,
    launches_table,
    memory_table,
    peers_table,
    pyramids_table,
    shortfalls_table,
)

HERE = Path(__file__).resolve().parent

INTRODUCTION = """\
# Benchmarks

The feature discrepancy loss beside its floors and beside what a user would write instead. `make bench`
measures, `make bench-report` makes this page from the JSON files under `results/`; no number in it was
written by hand.

**Cases.** `enc1-256` is the first encoder level of a UNet with 64 base channels on 4 images of 256×256:
features [4, 64, 256, 256]; each level has twice the channels at half the side, and decoder levels have the
shapes of encoder levels. `pyramid` is all nine taps in one call, `deep` the three smallest, `pyramid-32` nine
small layers. A pyramid's mask has the size of the image, and everyone has to resize it. Features are random,
the mask is random and binary.

**Contenders.** `op`: `fdkernels.feature_discrepancy_loss`, on a GPU also on its other backend. `eager`: the
same loss in plain PyTorch, `features * mask` and `features * (1 - mask)`; `compiled`: that under
`torch.compile`; `bmm`: one matrix product with the two columns `mask` and `1 - mask`; `single calls`: the op
once for each layer. The peers get the mask in the features' dtype, converted beforehand. Everyone's loss and
gradient are compared with a closed form in float64 first; a case in which one is wrong is not timed.

**Floors.** forward: `features.sum()`; backward: `torch.empty_like(features).fill_(x)`; forward+backward:
both; warm: `fill_` into memory that is there already. On a CPU fresh memory costs its page faults, which is
most of the time of a large gradient, for everyone.

**Times.** Contenders are called in turn within a round, once untimed where a cache could help and once timed;
a ratio is that of two times of one round, so that drift of the machine cancels. Numbers are medians, [ ]
holds the quartiles. Forward is that of a training step, with the graph for backward; forward+backward writes
a fresh gradient. On a GPU the time is that of the kernels of a call, without waits for the host, unless a
table says otherwise.
"""


def report(results: list[DeviceResults], pictures: dict[str, str]) -> str:
    """The page as Markdown.

    Args:
        results: what was measured.
        pictures: address of the picture of `picture_name(...)`, for those that there are.
    """
    parts = [INTRODUCTION]
    if not results:
        parts.append("Nothing has been measured yet.\n")
    parts += [_section(part, pictures.get(picture_name(part))) for part in results]
    return "\n".join(parts)


def picture_name(results: DeviceResults) -> str:
    """The file of the picture, relative to the folder of the results."""
    return f"{results.stem}-{results.device}.svg"


def _section(results: DeviceResults, picture: str | None) -> str:
    name = results.machine.get("gpu") if results.device == "cuda" else results.machine["cpu_model"]
    parts = [f"## {name}\n", _conditions(results), _summary(results)]
    if picture is not None:
        parts.append(f"![Times of forward and backward, over the op's]({picture})\n")
    parts += ["### Where we lose\n", _shortfalls(results)]
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
    pyramids = pyramids_table(results)
    if pyramids:
        parts += ["### A pyramid in one call\n", pyramids + "\n"]
    parts += [
        "### Memory\n",
        "Peak beyond inputs and, for forward+backward, beyond the gradient, as a share of the features.\n",
        memory_table(results) + "\n",
    ]
    return "\n".join(parts)


def _conditions(results: DeviceResults) -> str:
    machine, commit = results.machine, results.commit
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    cpu = (
        f"CPU: {machine['cpu_model']}, {machine['cpu_cores']} cores, {machine['threads']} threads, "
        f"cache {_mib(machine['cpu_cache_bytes'])}; {machine['system']}"
    )
    lines = [
        cpu,
        f"Versions: {versions}",
        f"Built with: {_build(machine['build'])}",
        f"Commit: {commit.get('id') or 'unknown'}{', with changes' if commit.get('dirty') else ''}",
        f"Measured: {results.when}, by `{results.command}`",
    ]
    if results.device == "cuda":
        gpu = (
            f"GPU: {machine['gpu']}, {machine['gpu_multiprocessors']} multiprocessors, "
            f"{_mib(machine['gpu_memory_bytes'])}, cache {_mib(machine['gpu_cache_bytes'])}"
        )
        lines.insert(0, gpu)
    rate = machine["copy_bytes_per_second"].get(results.device)
    if rate:
        lines.append(f"Copy rate, read and written: {rate / 1e9:.3g} GB/s")
    if results.quick:
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


def _shortfalls(results: DeviceResults) -> str:
    slower, missed = losses(results), missed_figures(results)
    parts = []
    if slower:
        parts += ["Cases in which something else takes less time than the op:\n"]
        parts += [shortfalls_table(slower) + "\n"]
    else:
        parts.append("In no case does a peer take less time than the op.\n")
    if missed:
        parts += ["Figures that are not reached:\n", shortfalls_table(missed) + "\n"]
    else:
        parts.append("Every figure is reached.\n")
    return "\n".join(parts)


def _build(build: dict[str, Any]) -> str:
    parts = [build["cpp_compiler"] or "no C++ compiler", *build["isa"]]
    if build["cuda_version"]:
        parts += [f"nvcc {build['cuda_version']}", *build["cuda_archs"]]
    return ", ".join(parts)


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.0f} MiB"


def main() -> None:
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(description="Make the benchmark page from the JSON files.")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON")
    parser.add_argument("--page", type=Path, default=HERE / "README.md", help="file to write")
    arguments = parser.parse_args()
    results = read_results(arguments.results)
    pictures = _draw(results, arguments.results, arguments.page.parent)
    arguments.page.write_text(report(results, pictures), encoding="utf-8")
    print(f"{arguments.page}: {sum(len(part.cases) for part in results)} cases")


def _draw(results: list[DeviceResults], folder: Path, base: Path) -> dict[str, str]:
    """Draw every picture; where it lies as seen from the page, by its name."""
    try:
        from benchmarks.plot import plot_times
    except ImportError:
        print("Without matplotlib the page has no pictures.")
        return {}
    addresses = {}
    for part in results:
        path = folder / picture_name(part)
        plot_times(part, path)
        addresses[picture_name(part)] = path.resolve().relative_to(base.resolve()).as_posix()
    return addresses


if __name__ == "__main__":
    main()
