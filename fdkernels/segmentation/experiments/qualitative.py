"""Pictures of predictions without and with the loss, the worst off first (Figures 7 to 9)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from fdkernels.models.blocks import TAP_NAMES
from fdkernels.segmentation.data.reading import load_pair
from fdkernels.segmentation.experiments.ablation import WITH, WITHOUT, arms
from fdkernels.segmentation.experiments.ablation import results as compare
from fdkernels.segmentation.experiments.effects import over_seeds
from fdkernels.segmentation.experiments.features import Seen, measure, pass_over
from fdkernels.segmentation.experiments.plan import Experiment, PlannedRun, Study, run_key
from fdkernels.segmentation.experiments.running import one_thread
from fdkernels.segmentation.prediction_masks import error_picture, predicted_mask, write_mask
from fdkernels.segmentation.runfiles import replacing_folder
from fdkernels.segmentation.saved_runs import read_run

MOST = 12
# The first encoder, the deepest layer, and the last decoder.
LAYERS = (TAP_NAMES[0], TAP_NAMES[4], TAP_NAMES[-1])
GREEN = (0.10, 0.62, 0.22)
OPACITY = 0.55
PICTURES = "pictures"


def results(study: Study) -> dict[str, Any]:
    """Draw the images with the lowest Dice, in the mean of both arms under the first seed.

    Each has a folder pictures/01 and so on, with image, truth, the prediction of each arm, its errors in red
    (with the loss also what it corrects, in green), and for each of `LAYERS` the length of the feature vector
    at each pixel, as an array and as a picture on one scale for both arms.

    Returns:
        What `ablation` gives; "layers"; and "shown", a list with sample, patient, seed, fold, Dice by arm,
        and the files by what they show, relative to the folder of the experiment.
    """
    seed = study.seeds[0]
    # Where a run of one arm failed there is nothing to compare.
    runs = {run.key: run for run in study.runs}
    rows = [
        row
        for row in study.rows
        if row.seed == seed and all(run_key(arm.name, seed, row.fold) in runs for arm in (WITHOUT, WITH))
    ]
    means = over_seeds(rows, lambda row: row.dice)
    worst = sorted(means, key=lambda sample: (means[sample], sample))[:MOST]
    places = {row.sample: row for row in rows}
    dice = {(row.arm, row.sample): row.dice for row in rows}
    found: dict[str, dict[str, Any]] = {}
    for left in study.output.glob(f".{PICTURES}.*"):  # of a process that was killed
        shutil.rmtree(left)
    folders = [f"{place:02}" for place in range(1, MOST + 1)]
    with one_thread(), replacing_folder(study.output / PICTURES, folders) as new:
        for fold in study.folds:
            members = {sample for sample in worst if places[sample].fold == fold}
            if not members:
                continue
            pairs = {arm.name: _seen(runs[run_key(arm.name, seed, fold)], members) for arm in (WITHOUT, WITH)}
            for sample in members:
                name = folders[worst.index(sample)]
                run = runs[run_key(WITH.name, seed, fold)]
                seen = {arm: pair[sample] for arm, pair in pairs.items()}
                files = _draw(new / name, run, sample, seen)
                found[sample] = {
                    "sample": sample,
                    "patient": places[sample].patient,
                    "seed": seed,
                    "fold": fold,
                    "dice": {arm.name: dice[arm.name, sample] for arm in (WITHOUT, WITH)},
                    "files": {what: f"{PICTURES}/{name}/{file}" for what, file in files.items()},
                }
    return {**compare(study), "layers": list(LAYERS), "shown": [found[sample] for sample in worst]}


def _seen(run: PlannedRun, members: set[str]) -> dict[str, Seen]:
    """Pass the chosen test images of a run through its network; keep the chosen layers."""
    return {
        seen.sample: seen._replace(features={layer: seen.features[layer] for layer in LAYERS})
        for seen in pass_over(read_run(run.folder), run.arm.phase)
        if seen.sample in members
    }


def _draw(folder: Path, run: PlannedRun, sample: str, seen: Mapping[str, Seen]) -> dict[str, str]:
    """Write the pictures of one image; return the files by what they show."""
    samples, names = read_run(run.folder).part("test")
    image, truth = load_pair(samples[names.index(sample)])
    pixels, foreground = np.asarray(image) / 255, np.asarray(truth) > 0
    folder.mkdir(parents=True)
    image.save(folder / "image.png")
    write_mask(folder / "truth.png", foreground)
    files = {"image": "image.png", "truth": "truth.png"}
    predicted = {
        arm: predicted_mask(one.logits[0].cpu(), image.height, image.width) for arm, one in seen.items()
    }
    for arm, mask in predicted.items():
        write_mask(folder / f"{arm}.png", mask)
        files[arm] = f"{arm}.png"
    pictures = {
        f"{WITHOUT.name}_errors": error_picture(pixels, predicted[WITHOUT.name], foreground),
        f"{WITH.name}_errors": correction_picture(
            pixels, predicted[WITHOUT.name], predicted[WITH.name], foreground
        ),
    }
    for layer in LAYERS:
        heat = {
            arm: np.sqrt((one.features[layer][0].cpu().double() ** 2).sum(dim=0).numpy())
            for arm, one in seen.items()
        }
        top = max(float(values.max()) for values in heat.values()) or 1.0
        for arm, values in heat.items():
            np.save(folder / f"{arm}_{layer}.npy", values.astype(np.float32))
            files[f"{arm}_{layer}_array"] = f"{arm}_{layer}.npy"
            pictures[f"{arm}_{layer}"] = matplotlib.colormaps["viridis"](values / top)[..., :3]
    for name, picture in pictures.items():
        drawn = Image.fromarray((picture * 255).round().astype(np.uint8))
        drawn.resize(image.size, Image.Resampling.NEAREST).save(folder / f"{name}.png")
        files[name] = f"{name}.png"
    return files


def correction_picture(
    image: np.ndarray, before: np.ndarray, after: np.ndarray, truth: np.ndarray
) -> np.ndarray:
    """Draw `error_picture` of `after`, and in green what `before` had wrong and `after` has right.

    Args:
        image: [H, W, 3], from 0 to 1.
        before, after, truth: bool [H, W].

    Returns:
        [H, W, 3], from 0 to 1.
    """
    picture = error_picture(image, after, truth)
    corrected = (before != truth) & (after == truth)
    grey = 0.45 + 0.55 * image.mean(axis=-1, keepdims=True).repeat(3, axis=-1)  # [H, W, 3]
    picture[corrected] = (1 - OPACITY) * grey[corrected] + OPACITY * np.array(GREEN)
    return picture


QUALITATIVE = Experiment(
    "qualitative",
    "Pictures of predictions without and with the loss, the worst off first.",
    arms,
    results,
    measure=measure,
)

__all__ = ["LAYERS", "MOST", "QUALITATIVE", "correction_picture", "results"]
