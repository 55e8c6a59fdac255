"""The features of a trained network on its test images: how large they are, and how far apart the regions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fdkernels as fdk
from fdkernels.segmentation.batches import evaluation_loader
from fdkernels.segmentation.experiments.effects import mean, plain
from fdkernels.segmentation.experiments.plan import Study
from fdkernels.segmentation.metrics import sample_scores
from fdkernels.segmentation.saved_runs import SavedRun
from fdkernels.segmentation.scoring import repeatable

MEASURES = ("norm", "relative_discrepancy", "feature_distance", "foreground_share")


class Seen(NamedTuple):
    """What a network makes of one image.

    Attributes:
        sample: the image's path, relative to the folder of the data.
        logits: [1, 1, H, W].
        mask: [1, 1, H, W], 0 or 1.
        features: by the name of the layer, [1, C, h, w].
    """

    sample: str
    logits: Tensor
    mask: Tensor
    features: dict[str, Tensor]


def pass_over(run: SavedRun, phase: str) -> Iterator[Seen]:
    """Pass the test images of a run, one by one, through the best network of a phase."""
    on_gpu = run.config.accelerator not in ("cpu", "mps") and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    network = run.load_network(phase).to(device).eval()
    samples, names = run.part("test")
    loader = evaluation_loader(samples, size=run.config.size, batch_size=1, workers=0)
    for name, batch in zip(names, loader, strict=True):
        with repeatable(device), fdk.FeatureTaps(network, network.tap_names) as taps:
            logits = network(batch["image"].to(device))
            features = dict(zip(network.tap_names, taps.features, strict=True))
        yield Seen(name, logits, batch["mask"].to(device), features)


def measure(run: SavedRun, phase: str) -> list[dict[str, Any]]:
    """Measure the features of every test image and layer.

    With S_fg and S_bg [C] the sums of the features over foreground and background, M_fg and M_bg the sizes of
    the regions, and F_p [C] the features at pixel p:

        norm                  sqrt(mean_p |F_p|²)
        relative_discrepancy  |S_fg / M_fg - S_bg / M_bg| / norm, which does not change with the scale of F
        feature_distance      FD = |Σ_c (S_fg - S_bg)| / |Σ_c (S_fg + S_bg)|, as in the proof of lemma 7
        foreground_share      |Σ_c S_fg| / |Σ_c (S_fg + S_bg)|

    Returns:
        For each image "sample", "dice", "sensitivity", "size_ratio" (predicted over true foreground) and
        "layers", the four numbers by layer; None where one is not defined.
    """
    return [
        {"sample": seen.sample, **_of_prediction(seen), "layers": layer_measures(seen.features, seen.mask)}
        for seen in pass_over(run, phase)
    ]


def _of_prediction(seen: Seen) -> dict[str, float | None]:
    scores = {name: values[0].item() for name, values in sample_scores(seen.logits, seen.mask).items()}
    hits, missed, false = (scores[name] for name in ("true_positives", "false_negatives", "false_positives"))
    return {
        "dice": scores["dice"],
        "sensitivity": plain(scores["sensitivity"]),
        "size_ratio": (hits + false) / (hits + missed) if hits + missed else None,
    }


def layer_measures(features: dict[str, Tensor], mask: Tensor) -> dict[str, dict[str, float | None]]:
    """Compute the numbers of `measure` for one image.

    Args:
        features: by the name of the layer, [1, C, h, w].
        mask: [1, 1, H, W], 0 or 1.
    """
    found = {}
    for layer, maps in features.items():
        sums = fdk.region_sums(maps, mask)
        assert isinstance(sums, fdk.RegionSums)
        fg, bg = sums.fg[0].double(), sums.bg[0].double()  # [C]
        norm = maps[0].double().square().sum(dim=0).mean().sqrt()
        apart = (fg / sums.fg_mass[0] - bg / sums.bg_mass[0]).norm()
        whole = (fg + bg).sum().abs()
        values = (norm, apart / norm, (fg - bg).sum().abs() / whole, fg.sum().abs() / whole)
        found[layer] = {name: plain(float(value)) for name, value in zip(MEASURES, values, strict=True)}
    return found


def feature_means(study: Study) -> dict[str, dict[str, dict[str, float | None]]]:
    """Average the numbers of `features.measure` over images and runs, by arm, layer and number."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for arm in study.arms():
        images = [
            one for run in study.runs if run.arm.name == arm.name for one in study.measured[run.key] or ()
        ]
        layers = images[0]["layers"] if images else {}
        found[arm.name] = {
            layer: {
                name: mean(
                    one["layers"][layer][name] for one in images if one["layers"][layer][name] is not None
                )
                for name in MEASURES
            }
            for layer in layers
        }
    return found


__all__ = ["MEASURES", "Seen", "feature_means", "layer_measures", "measure", "pass_over"]
