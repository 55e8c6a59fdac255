"""The cost of the loss in a training step: what was measured, and its table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.results import Conditions, ResultFile, Spread, spreads
from benchmarks.tables import NONE, spread_text, table, width_text

STEP_LIMIT = 1.02
# As in step_contenders, which needs torch.
WITHOUT = "without"
CONTENDERS = ("op", "tap", "plain")


@dataclass(frozen=True)
class StepResult:
    """A network in training, with the loss computed in each way and without it."""

    network: str
    mode: str
    images: str
    base_channels: int | None
    seconds: dict[str, Spread]
    ratios: dict[str, Spread]
    peak_bytes: dict[str, int]
    launches: dict[str, int]
    left_out: dict[str, str]
    conditions: Conditions

    def over_without(self, name: str) -> Spread | None:
        """The step's time over that of the step without the loss, of the same round."""
        return self.ratios.get(f"{name}/{WITHOUT}")


def read_steps(files: Iterable[ResultFile], folder: str, device: str) -> list[StepResult]:
    """The steps of a device that were measured into one folder."""
    return [
        StepResult(
            network=entry["network"],
            mode=entry["mode"],
            images=entry["images"],
            base_channels=entry["base_channels"],
            seconds=spreads(entry["seconds"]),
            ratios=spreads(entry["ratios"]),
            peak_bytes=entry["peak_bytes"],
            launches=entry["launches"],
            left_out=entry["left_out"],
            conditions=file.conditions,
        )
        for file in files
        if file.kind == "steps" and folder_of(file.stem) == folder
        for entry in file.entries
        if entry["device"] == device
    ]


def folder_of(stem: str) -> str:
    """The folder of a file of results, empty for those that lie in no folder."""
    return stem.rpartition("/")[0]


def steps_section(steps: Sequence[StepResult], device: str) -> str:
    """What was trained, the table, and in how far the figure is reached."""
    sizes = sorted({f"{step.images}, {width_text(step.base_channels)}" for step in steps})
    commands = sorted(
        {f"`{step.conditions.command}`, commit {step.conditions.commit.get('id')}" for step in steps}
    )
    what = (
        "Forward, Dice and cross-entropy, the loss on all nine taps, backward, Adam, beside the same step "
        "without the loss, in one interleaved run. `tap`: `FeatureTaps(fused=True)`, whose backward adds "
        "the loss's gradient in the network's own pass. `plain`: the loss written in torch within the "
        "step; where the step is compiled, the compiler sees it and can fuse the two masked sums with the "
        "layer before them, while the op is opaque to it."
    )
    lines = [
        what,
        "",
        *(f"- Images and width: {size}" for size in sizes),
        *(f"- Measured by {command}" for command in commands),
        *(f"- {reason}" for reason in sorted(_left_out(steps))),
        f"- {_verdict(steps, device)}",
        "",
    ]
    if device == "cpu":
        lines.insert(
            2, "- A CPU trains small images in narrow networks here, where convolutions take nearly all."
        )
    return "\n".join(lines) + "\n" + _table(steps)


def _table(steps: Sequence[StepResult]) -> str:
    header = ["network", "mode", "without, ms"]
    header += [f"`{name}`, over without" for name in CONTENDERS]
    header += [f"memory: {name}, MiB" for name in (WITHOUT, *CONTENDERS)]
    rows = []
    for step in steps:
        ratios = [step.over_without(name) for name in CONTENDERS]
        rows.append(
            [
                step.network,
                step.mode,
                f"{step.seconds[WITHOUT].median * 1e3:.3g}",
                *(NONE if ratio is None else spread_text(ratio, 3) for ratio in ratios),
                *(_mebibytes(step.peak_bytes.get(name)) for name in (WITHOUT, *CONTENDERS)),
            ]
        )
    return table(header, rows)


def _verdict(steps: Sequence[StepResult], device: str) -> str:
    best = []
    for step in steps:
        ratios = [ratio.median for name in ("op", "tap") if (ratio := step.over_without(name)) is not None]
        if ratios:
            best.append((min(ratios), step))
    if not best:
        return "Neither `op` nor `tap` could be measured."
    worst, where = max(best, key=lambda pair: pair[0])
    aim = f", where at most {STEP_LIMIT:g} is asked for" if device == "cuda" else ""
    verdict = f"The better of `op` and `tap` costs at most {worst:.3f} ({where.network}, {where.mode}){aim}."
    compared = [
        (step, plain.median / op.median)
        for step in steps
        if "compiled" in step.mode
        and (plain := step.over_without("plain")) is not None
        and (op := step.over_without("op")) is not None
    ]
    for step, factor in compared:
        faster = "the opaque op" if factor > 1 else "the loss that the compiler sees"
        verdict += f" {step.network}, {step.mode}: {faster} is faster, by {abs(factor - 1):.1%} of the step."
    return verdict


def _left_out(steps: Sequence[StepResult]) -> set[str]:
    return {f"`{name}` is missing: {reason}" for step in steps for name, reason in step.left_out.items()}


def _mebibytes(size: int | None) -> str:
    return NONE if size is None else f"{size / 2**20:.4g}"
