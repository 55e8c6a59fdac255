"""Overlap of predicted masks with the truth: for each image, and over the images of a part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_stat_scores

SCORES = ("dice", "iou", "sensitivity", "specificity", "precision")
COUNTS = ("true_positives", "false_positives", "true_negatives", "false_negatives")


def _ratio(numerator: Tensor, denominator: Tensor, undefined: float = 1.0) -> Tensor:
    """Divide; `undefined` where both are 0."""
    return torch.where(denominator > 0, numerator / denominator.clamp(min=1), undefined)


def _counts(logits: Tensor, mask: Tensor) -> Tensor:
    """Count TP, FP, TN and FN of each sample, int64 [N, 4], in the order of `COUNTS`."""
    predicted, truth = logits > 0, mask > 0  # [N, 1, *S]
    counts = [
        # One image a call: by sample (multidim_average) torchmetrics drops the axis of a batch of one.
        binary_stat_scores(*pair, validate_args=False)[:4]
        for pair in zip(predicted, truth, strict=True)
    ]
    return torch.stack(counts) if counts else torch.zeros(0, 4, dtype=torch.int64, device=logits.device)


def _failed(logits: Tensor) -> Tensor:
    """Tell which samples of logits [N, 1, *S] have a NaN, which is neither foreground nor background, [N]."""
    return logits.isnan().flatten(start_dim=1).any(dim=1)


def sample_scores(logits: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Score each sample by itself.

        Dice = 2 TP / (2 TP + FP + FN)      IoU = TP / (TP + FP + FN)
        sensitivity = TP / (TP + FN)    specificity = TN / (TN + FP)    precision = TP / (TP + FP)

    A pixel is predicted foreground where its logit is above 0, the sigmoid above one half. Where
    neither truth nor prediction has foreground, Dice and IoU are 1. The other three are NaN where
    they are undefined: sensitivity without foreground in the truth, specificity
    without background in the truth, precision without foreground in the prediction.

    Args:
        logits: [N, 1, *S], float.
        mask: [N, 1, *S], foreground above 0.

    Returns:
        float64 [N] on the CPU for each of `SCORES`, and "foreground_share", the share of the
        truth's pixels that are foreground; int64 [N] for each of `COUNTS`.

    Raises:
        ValueError: `mask` has another shape than `logits`.
    """
    if logits.shape != mask.shape:
        raise ValueError(f"mask must have the shape of logits, {list(logits.shape)}, got {list(mask.shape)}")
    counts = _counts(logits, mask).cpu()  # [N, 4]
    failed = _failed(logits).cpu()  # [N]
    hits, false_alarms, rejections, misses = counts.double().unbind(dim=1)  # [N] each
    errors, nan = false_alarms + misses, float("nan")
    scores = {
        "dice": _ratio(2 * hits, 2 * hits + errors),
        "iou": _ratio(hits, hits + errors),
        "sensitivity": _ratio(hits, hits + misses, nan),
        "specificity": _ratio(rejections, rejections + false_alarms, nan),
        "precision": _ratio(hits, hits + false_alarms, nan),
    }
    counts = counts.masked_fill(failed[:, None], 0)
    return {
        **{name: values.masked_fill(failed, nan) for name, values in scores.items()},
        "foreground_share": (hits + misses) / (hits + misses + rejections + false_alarms),
        **dict(zip(COUNTS, counts.unbind(dim=1), strict=True)),
    }


def pooled_scores(counts: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute Dice and IoU of all pixels together, from the counts of `sample_scores`.

    An image with little foreground weighs little here, while in a mean over images every image
    counts alike.
    """
    hits, false_alarms, _, misses = (counts[name].double().sum() for name in COUNTS)
    errors = false_alarms + misses
    return {
        "dice": _ratio(2 * hits, 2 * hits + errors).item(),
        "iou": _ratio(hits, hits + errors).item(),
    }


class OverlapScores(Metric):
    """Dice and IoU, once as the mean over images and once pooled over all pixels.

        Dice = 2 TP / (2 TP + FP + FN)      IoU = TP / (TP + FP + FN)

    "dice" and "iou" are computed for each image and averaged: every image counts alike, the
    paper's way and the one reported. "dice_pooled" and "iou_pooled" add the counts of all images
    first, so that an image with little foreground weighs little. An image where neither truth
    nor prediction has foreground scores 1. A pixel is predicted foreground where its logit is
    above 0, the sigmoid above one half. A NaN logit, which is neither, makes all four NaN.

    `compute` returns the four as a dict of float scalars, and "images", their number.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    dice_sum: Tensor
    iou_sum: Tensor
    images: Tensor
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("dice_sum", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("iou_sum", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, mask: Tensor) -> None:
        """Add a batch: `logits` and `mask` (0 or 1) [N, 1, *S]."""
        hits, false_alarms, _, misses = _counts(logits, mask).unbind(dim=1)  # [N] each
        errors = false_alarms + misses
        failed, nan = _failed(logits), float("nan")  # [N]
        self.dice_sum += _ratio(2 * hits.float(), 2 * hits + errors).masked_fill(failed, nan).sum()
        self.iou_sum += _ratio(hits.float(), hits + errors).masked_fill(failed, nan).sum()
        self.images += len(logits)
        self.counts += torch.stack([hits.sum(), false_alarms.sum(), misses.sum()])

    def compute(self) -> dict[str, Tensor]:
        hits, false_alarms, misses = self.counts.float()
        errors = false_alarms + misses
        failed, nan = self.dice_sum.isnan(), float("nan")
        return {
            "dice": self.dice_sum / self.images,
            "iou": self.iou_sum / self.images,
            "dice_pooled": _ratio(2 * hits, 2 * hits + errors).masked_fill(failed, nan),
            "iou_pooled": _ratio(hits, hits + errors).masked_fill(failed, nan),
            "images": self.images.float(),
        }


__all__ = ["COUNTS", "SCORES", "OverlapScores", "pooled_scores", "sample_scores"]
