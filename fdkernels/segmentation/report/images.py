"""The images that a run segments worst and best: image, truth, prediction, errors in red."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.patches import Patch
from torch import Tensor

from fdkernels.segmentation.data import SegmentationSample
from fdkernels.segmentation.data.reading import load_pair
from fdkernels.segmentation.prediction_masks import (
    CORRECT,
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    error_picture,
    predicted_mask,
)
from fdkernels.segmentation.report.drawing import drawn, grid, png
from fdkernels.segmentation.report.page import Block, Notes, Picture, Table, number
from fdkernels.segmentation.report.runs import ReportedRun, RunGroup
from fdkernels.segmentation.report.words import counted
from fdkernels.segmentation.scoring import Candidate, score

SHOWN = 3  # worst images, and as many best
# Scoring a whole test part takes a second for tens of images on a CPU; beyond these it would take minutes.
MOST_SCORED = 200
_SHARPEST = 360  # pixels of a side in the figure


@dataclass(frozen=True)
class _Found:
    """A test image with its Dice under the run whose test image it is."""

    run: ReportedRun
    phase: str
    sample: SegmentationSample
    name: str
    dice: float


def images_blocks(prefix: str, group: RunGroup, data: Path | None) -> list[Block]:
    """Draw the worst and the best test images of a run or its folds, or say why that is not possible.

    Args:
        prefix: of the picture's name.
        group: the runs.
        data: where the data is now; None where the runs found it.
    """
    found: list[_Found] = []
    notes = []
    for run in group.runs:
        if run.last is None:
            notes.append(f"No images of {run.title}: it has not finished a phase.")
            continue
        try:
            images, note = _scored(run, run.last, data)
        except (ValueError, OSError) as error:
            notes.append(f"No images of {run.title}: {error}.")
            continue
        found += images
        notes += [note] if note else []
    blocks: list[Block] = [Notes(tuple(notes))] if notes else []
    if not found:
        return blocks
    found.sort(key=lambda image: image.dice)
    worst = found[:SHOWN]
    best = found[max(SHOWN, len(found) - SHOWN) :][::-1]
    chosen = [*(("worst", image) for image in worst), *(("best", image) for image in best)]
    try:
        drawings = [_drawings(image) for _, image in chosen]
    except (ValueError, OSError) as error:
        return [*blocks, Notes((f"No images of {group.title}: {error}.",))]
    blocks.append(_picture(f"{prefix}-images", group.title, chosen, drawings))
    rows = [
        (str(index), place, image.name, image.sample.patient, number(image.dice))
        for index, (place, image) in enumerate(chosen, start=1)
    ]
    blocks.append(
        Table(
            f"The images above, of {counted(len(found), 'scored test image')}.",
            ("number", "", "image", "patient", "Dice"),
            tuple(rows),
            texts=4,
        )
    )
    return blocks


def _scored(run: ReportedRun, phase: str, data: Path | None) -> tuple[list[_Found], str]:
    """Give the test images of a run with their Dice, and a sentence if that are not all."""
    samples, names = run.saved.part("test", data)
    known = _evaluated(run, phase)
    if known and set(names) <= set(known):
        images = [
            _Found(run, phase, sample, name, known[name]) for sample, name in zip(samples, names, strict=True)
        ]
        return images, ""
    kept = sorted({round(place) for place in np.linspace(0, len(samples) - 1, MOST_SCORED)})
    note = ""
    if len(kept) < len(samples):
        samples, names = [samples[place] for place in kept], [names[place] for place in kept]
        note = (
            f"Of the test images of {run.title}, {len(kept)} spread over them were scored for the figure; "
            "with fdkernels evaluate the report takes the worst and best of all."
        )
    rows = score(_candidate(run, phase, samples, names), device=_device(), workers=0)
    return [
        _Found(run, phase, sample, row.image, row.scores["dice"])
        for sample, row in zip(samples, rows, strict=True)
    ], note


def _evaluated(run: ReportedRun, phase: str) -> dict[str, float]:
    """Read the Dice of the test images from `fdkernels evaluate`, where the run's weights are older."""
    folder = run.saved.folder
    for table in (folder / "evaluation" / "samples.csv", folder.parent / "evaluation" / "samples.csv"):
        weights = folder / phase / "best.safetensors"
        if not table.is_file() or table.stat().st_mtime < weights.stat().st_mtime:
            continue
        with table.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = [row for row in csv.DictReader(file) if _is_of(row, run, phase)]
        return {row["image"]: float(row["dice"]) for row in rows if row.get("dice")}
    return {}


def _is_of(row: dict[str, str], run: ReportedRun, phase: str) -> bool:
    fold = "" if run.saved.fold is None else str(run.saved.fold)
    plain = (row.get("symmetry") or "identity") == "identity"
    return plain and row.get("phase") == phase and (row.get("fold") or fold) == fold


def _candidate(
    run: ReportedRun, phase: str, samples: Sequence[SegmentationSample], names: Sequence[str]
) -> Candidate:
    config = run.saved.config
    return Candidate(
        load=lambda: run.saved.load_network(phase),
        samples=samples,
        names=names,
        size=config.size,
        convention=config.convention,
        phase=phase,
        fold=run.saved.fold,
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _drawings(image: _Found) -> list[np.ndarray]:
    """Predict an image and draw it, its truth, its prediction and the errors, each [H, W, 3], 0 to 1."""
    kept: list[Tensor] = []
    candidate = _candidate(image.run, image.phase, [image.sample], [image.name])
    score(candidate, device=_device(), workers=0, keep=lambda _, logits: kept.append(logits))
    picture, truth = load_pair(image.sample)
    pixels, foreground = np.asarray(picture.convert("RGB")) / 255, np.asarray(truth) > 0
    predicted = predicted_mask(kept[0], picture.height, picture.width)
    step = math.ceil(max(foreground.shape) / _SHARPEST)
    drawings = [
        pixels,
        np.repeat(foreground[..., None], 3, axis=-1).astype(float),
        np.repeat(predicted[..., None], 3, axis=-1).astype(float),
        error_picture(pixels, predicted, foreground),
    ]
    return [drawing[::step, ::step] for drawing in drawings]


def _picture(
    name: str, title: str, chosen: Sequence[tuple[str, _Found]], drawings: Sequence[Sequence[np.ndarray]]
) -> Picture:
    columns = ("image", "truth", "prediction", "errors")
    with drawn():
        figure, axes = grid(len(chosen) * len(columns), columns=len(columns), height=2.1)
        for row, ((place, image), pictures) in enumerate(zip(chosen, drawings, strict=True)):
            for column, pixels in enumerate(pictures):
                axis: Any = axes[row * len(columns) + column]
                axis.imshow(pixels, vmin=0, vmax=1)
                axis.set_xticks([])
                axis.set_yticks([])
                axis.spines[:].set_visible(False)
                if row == 0:
                    axis.set_title(columns[column])
            axes[row * len(columns)].set_ylabel(f"{row + 1}: {place}\nDice {number(image.dice)}")
        figure.legend(
            handles=[
                Patch(color=CORRECT, label="found"),
                Patch(color=FALSE_POSITIVE, label="found, but background"),
                Patch(color=FALSE_NEGATIVE, label="missed"),
            ],
            loc="outside lower center",
            ncols=3,
        )
        content = png(figure, cut=True)
    scores = ", ".join(f"{place} {number(image.dice)}" for place, image in chosen)
    return Picture(
        name,
        content,
        f"Worst and best test images of {title} by Dice: image, truth, prediction, and the prediction over "
        "the image: found foreground blue, errors red, bright where background was taken for foreground and "
        "dark where foreground was missed.",
        f"Rows of four pictures for {counted(len(chosen), 'test image')} of {title}, worst first. "
        f"Dice: {scores}.",
    )


__all__ = ["MOST_SCORED", "SHOWN", "images_blocks"]
