"""Figure of the demo: patches, truth, predictions with their errors, and alpha and L over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fdkernels.models.blocks import TAP_NAMES
from fdkernels.segmentation.config import PHASES
from fdkernels.segmentation.data import SegmentationDataset, SegmentationSample
from fdkernels.segmentation.logs import read_rows
from fdkernels.segmentation.metrics import sample_scores
from fdkernels.segmentation.prediction_masks import CORRECT, FALSE_NEGATIVE, FALSE_POSITIVE, error_picture
from fdkernels.segmentation.runfiles import replacing
from fdkernels.segmentation.saved_runs import read_run

_COLUMNS = 6


def layer_history(run: Path, kind: str) -> dict[str, dict[str, list[float]]]:
    """Read a number of each layer at the end of each epoch from a run's logs, by phase and layer.

    Args:
        run: folder of the run.
        kind: what is logged, "alpha" or "discrepancy_loss".
    """
    history: dict[str, dict[str, list[float]]] = {}
    for phase in PHASES:
        layers: dict[str, list[float]] = {}
        for row in read_rows(run / phase / "logs"):
            for name, value in row.items():
                if name.startswith(f"{kind}/") and value:
                    layers.setdefault(name.removeprefix(f"{kind}/"), []).append(float(value))
        history[phase] = layers
    return history


def _spread(scores: Sequence[float], count: int) -> list[int]:
    """Return indices of `count` scores at evenly spaced ranks, from the lowest to the highest."""
    order = np.argsort(scores, kind="stable")
    ranks = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [int(index) for index in order[ranks]]


def draw_comparison(path: Path, samples: Sequence[SegmentationSample], runs: Mapping[str, Path]) -> None:
    """Write a PNG that shows test samples, their truth, each run's predictions, and alpha and L over time.

    The columns are test patches at evenly spaced ranks of the first run's Dice, from worst to best.
    The rows are image, truth and one per run; alpha and L are those of the last run.

    Args:
        path: the PNG file.
        samples: test samples, all images of one size.
        runs: folder of each run by title; predictions are by its best model of phase two.
    """
    data = SegmentationDataset(samples)
    items = [data[index] for index in range(len(data))]
    images = torch.stack([item["image"] for item in items])  # [N, 3, H, W]
    truths = torch.stack([item["mask"] for item in items])  # [N, 1, H, W]
    predictions, scores = {}, {}
    for title, run in runs.items():
        with torch.inference_mode():
            logits = read_run(run).load_network("active")(images)  # [N, 1, H, W]
        predictions[title] = (logits[:, 0] > 0).numpy()
        scores[title] = sample_scores(logits, truths)["dice"].tolist()
    chosen = _spread(scores[next(iter(runs))], _COLUMNS)

    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(2 * len(chosen) + 0.6, 2.1 * (2 + len(runs)) + 3.2))
        parts: Any = figure.subfigures(2, 1, height_ratios=[2.1 * (2 + len(runs)), 3.2])
        _draw_patches(parts[0], images, truths[:, 0].bool().numpy(), predictions, scores, chosen)
        _draw_layers(parts[1], runs[list(runs)[-1]])
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _draw_patches(
    figure: Any,
    images: torch.Tensor,
    truths: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    scores: Mapping[str, Sequence[float]],
    chosen: Sequence[int],
) -> None:
    """Draw images [N, 3, H, W], truths and predictions, both bool [N, H, W], of the `chosen` indices."""
    pixels = images.permute(0, 2, 3, 1).numpy()  # [N, H, W, 3]
    rows = ["image", "truth (stain)", *predictions]
    axes = figure.subplots(len(rows), len(chosen), squeeze=False)
    for column, index in enumerate(chosen):
        axes[0, column].imshow(pixels[index])
        axes[1, column].imshow(error_picture(pixels[index], truths[index], truths[index]))
        for row, (title, masks) in enumerate(predictions.items(), start=2):
            axes[row, column].imshow(error_picture(pixels[index], masks[index], truths[index]))
            axes[row, column].set_xlabel(f"Dice {scores[title][index]:.3f}")
    for row, title in enumerate(rows):
        axes[row, 0].set_ylabel(title)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.legend(
        handles=[
            Patch(color=CORRECT, label="stained, by a threshold"),
            Patch(color=FALSE_POSITIVE, label="false positive"),
            Patch(color=FALSE_NEGATIVE, label="false negative"),
        ],
        loc="upper center",
        ncols=3,
        frameon=False,
    )
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.03, top=0.95, wspace=0.05, hspace=0.16)


def _draw_layers(figure: Any, run: Path) -> None:
    """Draw alpha and the loss L of each layer over the epochs of both phases, side by side."""
    left, right = figure.subplots(1, 2)
    _draw_history(left, layer_history(run, "alpha"), "alpha")
    _draw_history(right, layer_history(run, "discrepancy_loss"), "L, the layer's loss")
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.subplots_adjust(left=0.07, right=0.87, bottom=0.18, top=0.94, wspace=0.22)


def _draw_history(axis: Any, history: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> None:
    warm, active = (history[phase] for phase in PHASES)
    begin = max((len(values) for values in warm.values()), default=0)
    colours = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, max(len(active), 1)))
    for colour, name in zip(colours, sorted(active, key=_depth), strict=True):
        values = [*warm.get(name, []), *active[name]]
        axis.plot(range(1, len(values) + 1), values, color=colour, label=name, linewidth=1.8)
    axis.axvline(begin + 0.5, color="0.6", linestyle="--", linewidth=1)
    for place, text, side in (
        (begin + 0.5, "phase 1: alpha = 0  ", "right"),
        (begin + 0.5, "  phase 2: alpha active", "left"),
    ):
        axis.text(
            place,
            1.0,
            text,
            transform=axis.get_xaxis_transform(),
            horizontalalignment=side,
            verticalalignment="top",
            color="0.35",
            fontsize=8,
        )
    axis.set_xlabel("epoch")
    axis.set_ylabel(title)
    axis.set_xlim(0, None)
    axis.spines[["top", "right"]].set_visible(False)


def _depth(name: str) -> int:
    """Return the position of a layer in the network, from input to output."""
    return TAP_NAMES.index(name)


__all__ = ["draw_comparison", "layer_history"]
