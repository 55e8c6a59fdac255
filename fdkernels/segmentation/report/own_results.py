"""Results of single experiments in a form of their own: pictures of samples, bounds, simulations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fdkernels.segmentation.report.curves import layer_bars
from fdkernels.segmentation.report.drawing import drawn, grid, png
from fdkernels.segmentation.report.experiment import Experiment
from fdkernels.segmentation.report.page import Block, Notes, Picture, Table, interval_text, number

_SHARPEST = 360  # pixels of a side in a figure
_FIRST = ("image", "truth")


@dataclass
class OwnResults:
    """What is made of an experiment's results.

    Attributes:
        pictures: figures and what belongs to them.
        blocks: further tables.
        others: the results that are not shown by these.
        shown: files that are in the pictures.
    """

    others: dict[str, Any]
    pictures: list[Block] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    shown: set[Path] = field(default_factory=set)


def own_results(prefix: str, experiment: Experiment) -> OwnResults:
    """Give an experiment's results their own form; those that are not as expected stay with the others."""
    stated = experiment.summary.get("results")
    found = OwnResults(dict(stated) if isinstance(stated, Mapping) else {})
    make = _MAKERS.get(experiment.name)
    if make is not None:
        try:
            make(prefix, experiment, found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # Of another version, or changed by hand: it is shown as plain tables.
            problem = (
                f"The results of {experiment.title} are not as expected ({type(error).__name__}: {error})."
            )
            return OwnResults(dict(stated or {}), blocks=[Notes((problem,))])
    return found


def _of_samples(prefix: str, experiment: Experiment, found: OwnResults) -> None:
    """Draw the pictures of each sample side by side (figures 7 to 9)."""
    samples = found.others.pop("shown", None)
    if samples is None and isinstance(found.others.get("samples"), list):
        samples = found.others.pop("samples")  # as earlier versions named it
    if not isinstance(samples, list):  # of an unfinished experiment
        return
    rows = []
    for place, sample in enumerate(samples, start=1):
        files = {
            str(what): experiment.folder / str(path)
            for what, path in sample["files"].items()
            if str(path).endswith(".png")
        }
        dice = {str(arm): float(value) for arm, value in sample["dice"].items()}
        picture = _sample_picture(f"{prefix}-sample-{place}", str(place), files, dice, found)
        if picture is not None:
            found.pictures.append(picture)
        rows.append((str(place), str(sample["sample"]), str(sample["patient"]), *map(number, dice.values())))
    if rows:
        names = [str(arm) for arm in samples[0]["dice"]]
        found.pictures.append(
            Table(
                "The samples above, those with the lowest Dice first; errors are red, and what the loss "
                "corrects is green. Heat maps show the length of the feature vector, on one scale for both "
                "arms.",
                ("number", "sample", "patient", *(f"Dice, {name}" for name in names)),
                tuple(rows),
                texts=3,
            )
        )


def _sample_picture(
    name: str, title: str, files: Mapping[str, Path], dice: Mapping[str, float], found: OwnResults
) -> Picture | None:
    pictures: dict[str, np.ndarray] = {}
    problems = []
    for what, path in files.items():
        try:
            with Image.open(path) as opened:
                pixels = opened.convert("RGB")
            pixels.thumbnail((_SHARPEST, _SHARPEST))
            pictures[what] = np.asarray(pixels)
            found.shown.add(path)
        except (OSError, SyntaxError) as error:  # the latter from Pillow, for broken PNG chunks
            problems.append(f"Sample {title}: {what} cannot be read: {error}.")
    if problems:
        found.pictures.append(Notes(tuple(problems)))
    if not pictures:
        return None
    with drawn():
        figure, axes = grid(len(pictures), columns=4, height=2.4)
        for axis, (what, shown) in zip(axes, pictures.items(), strict=True):
            axis.imshow(shown)
            axis.set_title(what.replace("_", " "))
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(visible=False)
        content = png(figure, cut=True)
    said = ", ".join(f"{arm} {number(value)}" for arm, value in dice.items())
    panels = ", ".join(what.replace("_", " ") for what in pictures)
    return Picture(
        name,
        content,
        f"Sample {title}: image, truth, predictions and their errors, heat maps. Dice: {said}.",
        f"Pictures of sample {title}: {panels}. Dice: {said}.",
    )


def _of_bound(prefix: str, experiment: Experiment, found: OwnResults) -> None:
    """Draw the share of samples for which the inequality of each lemma holds, by layer."""
    for lemma, by_arm in found.others.get("lemmas", {}).items():
        shares: dict[str, dict[str, float]] = {}
        for arm, layers in by_arm.items():
            for what, how in (("holds", "k as stated"), ("holds_derived", "k as derived")):
                shares[f"{arm}, {how}"] = {
                    layer: one[what] / one["samples"] for layer, one in layers.items() if one["samples"]
                }
        picture = layer_bars(
            f"{prefix}-{lemma}".lower(),
            shares,
            "share of samples",
            f"{lemma.replace('lemma', 'Lemma ')}: share of the samples for which the inequality holds, with "
            "the k that is stated and with the one that its proof gives.",
        )
        if picture is not None:
            found.pictures.append(picture)


def _of_mediation(prefix: str, experiment: Experiment, found: OwnResults) -> None:
    """Tabulate what the simulations estimate beside what is stated (example 3)."""
    rows, independent = [], []
    for one in found.others.get("simulations", []):
        case = (number(one["a"], 1), number(one["b"], 1), str(one["seed"]))
        for name, of in one["distributions"].items():
            cells = [text for what in ("slope", "variance") for text in _estimate(of[what])]
            rows.append((str(name), *case, *cells, number(of["p"])))
        ends = one["independence"]["interval"]
        held = "yes" if ends[0] <= 0 <= ends[1] else "no"
        independent.append((*case, number(one["independence"]["r"], 4), interval_text(ends, 4), held))
    if not rows:
        return
    del found.others["simulations"]
    estimates = [
        f"{what}{which}" for what in ("slope", "variance") for which in (", stated", "", ", 95 % interval")
    ]
    found.blocks += [
        Table(
            "Conditional distributions of X → Z → Y by simulation, stated and estimated; p is that of the "
            "Kolmogorov-Smirnov test against the stated one.",
            ("distribution", "a", "b", "seed", *estimates, "p"),
            tuple(rows),
        ),
        Table(
            "Partial correlation of X and Y given Z, which is 0 where they are independent given Z.",
            ("a", "b", "seed", "r", "95 % interval", "holds 0"),
            tuple(independent),
            texts=0,
        ),
    ]


def _estimate(of: Mapping[str, Any]) -> Sequence[str]:
    low, high = of["interval"]
    return number(of["stated"]), number(of["estimated"], 4), f"{number(low, 4)} to {number(high, 4)}"


_MAKERS: dict[str, Callable[[str, Experiment, OwnResults], None]] = {
    "qualitative": _of_samples,
    "bound": _of_bound,
    "mediation": _of_mediation,
}

__all__ = ["OwnResults", "own_results"]
