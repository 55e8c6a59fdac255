"""Write tables.md from the experiments of repeat.py: `python docs/study/tables.py --output FOLDER`."""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from repeat import APART, PARTS, VARIANTS, Apart, Part, is_finished

HERE = Path(__file__).resolve().parent
WINDOW = 20  # epochs over which validation is averaged
# Of an arm with the loss against the one without.
COMPARED = ("ΔDice, all", "effect size", "p (Holm)", "ΔDice, worst-off", "ΔIoU, all")


def read(folder: Path) -> dict[str, Any]:
    """Read the results of an experiment."""
    results: dict[str, Any] = json.loads((folder / "summary.json").read_text("utf-8"))["results"]
    return results


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a Markdown table whose first column is text."""
    lines = [" | ".join(header), " | ".join(["---", *["---:"] * (len(header) - 1)]), *map(" | ".join, rows)]
    return "\n".join(f"| {line} |" for line in lines)


def signed(value: float | None, digits: int = 4) -> str:
    """A difference with its sign."""
    return "–" if value is None else f"{value:+.{digits}f}"


def within(interval: Sequence[float] | None) -> str:
    """The two ends of an interval."""
    return "–" if interval is None else f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"


def validation(run: Path) -> list[float]:
    """Dice on the validation images, epoch by epoch, of both phases of a run."""
    found = []
    for phase in ("warm", "active"):
        (log,) = (run / phase / "logs").glob("*/metrics.csv")
        with log.open(encoding="utf-8") as file:
            found += [float(row["val/dice"]) for row in csv.DictReader(file) if row.get("val/dice")]
    return found


def plateau(folder: Path, arm: str) -> str:
    """Validation Dice of the arm without the loss, averaged over its runs and windows of epochs."""
    curves = [validation(run) for run in sorted((folder / "runs" / arm).glob("seed*/fold*"))]
    epochs = min(map(len, curves))
    starts = range(epochs % WINDOW, epochs - WINDOW + 1, WINDOW)
    windows = [[statistics.fmean(curve[start : start + WINDOW]) for curve in curves] for start in starts]
    gains = [late - early for early, late in zip(*windows[-2:], strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    header = ["epochs", *(f"{start + 1}–{start + WINDOW}" for start in starts)]
    row = ["validation Dice without the loss", *(f"{statistics.fmean(window):.3f}" for window in windows)]
    return (
        f"{table(header, [row])}\n\nFrom the last window but one to the last: "
        f"{signed(statistics.fmean(gains))} ± {error:.4f} (standard error over {len(curves)} runs)."
    )


def comparisons(folder: Path) -> str:
    """The difference of each arm from no loss."""
    return table(["arm", *COMPARED], comparison_rows(folder))


def variants(output: Path, part: Part) -> str:
    """The same for what differs from `paper-ascent` in one option; p-values are corrected within a row."""
    rows = []
    for variant, options in VARIANTS.items():
        folder = output / part.name(variant)
        if is_finished(folder):
            rows += [[f"`{' '.join(options)}`", *row[1:]] for row in comparison_rows(folder)]
    return table(["variant", *COMPARED], rows) if rows else ""


def comparison_rows(folder: Path) -> list[list[str]]:
    """A row for each arm."""
    found = read(folder)["comparisons"]
    arms = list(dict.fromkeys(one["arm"] for one in found))

    def of(arm: str, which: str, score: str) -> dict[str, Any]:
        return next(one for one in found if (one["arm"], one["set"], one["score"]) == (arm, which, score))

    rows = []
    for arm in arms:
        all_dice, worst, all_iou = of(arm, "all", "dice"), of(arm, "worst_off", "dice"), of(arm, "all", "iou")
        p = all_dice["p_holm"]
        rows.append(
            [
                f"`{arm}`",
                f"{signed(all_dice['mean'])} {within(all_dice['interval'])}",
                f"{signed(all_dice['rank_biserial'], 2)}",
                "–" if p is None else f"{p:.2g}",
                f"{signed(worst['mean'])} {within(worst['interval'])}",
                f"{signed(all_iou['mean'])} {within(all_iou['interval'])}",
            ]
        )
    return rows


def features(folder: Path) -> str:
    """Norm, relative discrepancy, share of the foreground and L_fd, of the arms with and without the loss."""
    results = read(folder)
    of_arms, losses = results["features"], results["discrepancy_loss"]
    layers = list(losses["with"])
    rows = []
    for layer in layers:
        row = [layer]
        for measured in ("norm", "relative_discrepancy", "foreground_share"):
            row += [f"{of_arms[arm][layer][measured]:.3g}" for arm in ("without", "with")]
        row += [f"{losses[arm][layer]:.2f}" for arm in ("without", "with")]
        rows.append(row)
    names = ("‖F‖", "relative discrepancy", "share of foreground", "L_fd")
    header = ["layer", *(f"{name}, {arm}" for name in names for arm in ("without", "with"))]
    return table(header, rows)


def alphas(folder: Path) -> str:
    """The final α of each layer under each rule, and Dice, means over the runs."""
    results = read(folder)
    final, means = results["final"], results["means"]
    layers = list(next(iter(final.values()))["alpha"])
    rows = [
        [
            f"`{rule}`",
            *(f"{of['alpha'][layer]['mean']:.3f}" for layer in layers),
            f"{means[rule]['dice']:.3f}",
        ]
        for rule, of in final.items()
    ]
    return table(["rule", *layers, "Dice, all"], rows)


def correlations(folder: Path) -> str:
    """Pearson's correlation of Dice with L_fd over the images."""
    found = read(folder)["correlation"]
    layers = list(found["before"])

    def shown(one: dict[str, Any]) -> str:
        pearson = one["pearson"]
        return "–" if pearson is None else f"{pearson['r']:+.2f} {within(pearson['interval'])}"

    rows = [[layer, *(shown(found[arm][layer]) for arm in ("before", "after"))] for layer in layers]
    return table(["layer", "r before", "r after"], rows)


SECTIONS = {
    "ablation": ("Features without and with the loss", features),
    "alpha": ("Final α", alphas),
    "correlation": ("Correlation of Dice with L_fd", correlations),
}


def section(part: Part, output: Path) -> list[str]:
    """What is known of a data set with a network."""
    # The ablation is the first of a part to finish, and the conventions, which hold its arms, the last.
    compared = {output / part.name("conventions"): "none", output / part.name("ablation"): "without"}
    folder = next((one for one in compared if is_finished(one)), None)
    if folder is None:
        return []
    parts = [f"## {part.dataset}, {part.model}", plateau(folder, compared[folder]), comparisons(folder)]
    of_variants = variants(output, part)
    parts += ["### Ceilings of α, and the exchange", of_variants] if of_variants else []
    for experiment, (title, make) in SECTIONS.items():
        folder = output / part.name(experiment)
        if is_finished(folder):
            parts += [f"### {title}", make(folder)]
    return parts


def apart_section(apart: Apart, output: Path) -> list[str]:
    """What is known at other settings."""
    part = apart.part
    folder = output / part.name(apart.name)
    if not is_finished(folder):
        return []
    return [
        f"## {part.dataset}, {part.model}, {apart.what}",
        plateau(folder, "without"),
        comparisons(folder),
        f"### Features without and with the loss, {part.dataset} {apart.what}",
        features(folder),
    ]


def addition_section(output: Path) -> list[str]:
    """What images of a second data set do, with the loss and without."""
    part = PARTS[0]
    folder = output / part.name("addition")
    if not is_finished(folder):
        return []
    results = read(folder)
    means = [[f"`{arm}`", f"{of['all']['dice']:.4f}"] for arm, of in results["means"].items()]
    rows = [
        [
            f"`{one['arm']}` against `{one['baseline']}`",
            f"{signed(one['mean'])} {within(one['interval'])}",
            "–" if one["p_holm"] is None else f"{one['p_holm']:.2g}",
        ]
        for one in results["comparisons"]
        if (one["set"], one["score"]) == ("all", "dice")
    ]
    return [
        f"## {part.dataset}, {part.model}, with images of monuseg",
        table(["arm", "Dice, all"], means),
        table(["arm", "ΔDice, all", "p (Holm)"], rows),
    ]


def in_parts(page: str) -> dict[str, str]:
    """The parts of a page by their headings, each with the heading."""
    return {part.partition("\n")[0]: part for part in re.split(r"^(?=## )", page, flags=re.MULTILINE)[1:]}


def main() -> None:
    """Write the tables of every part that FOLDER holds; those of others stay as they are on the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the experiments")
    output = parser.parse_args().output
    lines = ["# Tables of the study", "Written by tables.py. [../study.md](../study.md) says what they show."]
    sections = [section(part, output) for part in PARTS]
    sections += [apart_section(apart, output) for apart in APART]
    page = HERE / "tables.md"
    made = ["\n\n".join(one) + "\n\n" for one in (*sections, addition_section(output)) if one]
    parts = in_parts(page.read_text("utf-8")) | in_parts("".join(made))
    # The networks of all data sets, before what was tried beside.
    order = [f"## {part.dataset}, {part.model}" for part in PARTS]
    first = {heading: parts.pop(heading) for heading in order if heading in parts}
    text = "".join((first | parts).values()).rstrip()
    page.write_text("\n\n".join([*lines, text]) + "\n", "utf-8")


if __name__ == "__main__":
    main()
