"""Dice and IoU of predicted masks, over the images of a part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; 1 where both are 0, that is, where truth and prediction are both empty."""
    return torch.where(denominator > 0, numerator / denominator.clamp(min=1), 1.0)


class OverlapScores(Metric):
    """Dice and IoU, once as the mean over images and once pooled over all pixels.

        Dice = 2 TP / (2 TP + FP + FN)      IoU = TP / (TP + FP + FN)

    "dice" and "iou" are computed for each image and averaged: every image counts alike, the
    paper's way and the one reported. "dice_pooled" and "iou_pooled" add the counts of all images
    first, so that an image with little foreground weighs little. An image where neither truth
    nor prediction has foreground scores 1. A pixel is predicted foreground where its logit is
    above 0, the sigmoid above one half.

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
        """Takes in a batch: `logits` and `mask` (0 or 1) [N, 1, *S]."""
        predicted, truth = (logits > 0).flatten(1), (mask > 0).flatten(1)  # [N, P]
        # Counted here, since torchmetrics' own count by sample fails on a batch of one.
        hits = (predicted & truth).sum(dim=1)  # [N]
        false_alarms = (predicted & ~truth).sum(dim=1)  # [N]
        misses = (~predicted & truth).sum(dim=1)  # [N]
        errors = false_alarms + misses
        self.dice_sum += _ratio(2 * hits.float(), 2 * hits + errors).sum()
        self.iou_sum += _ratio(hits.float(), hits + errors).sum()
        self.images += len(logits)
        self.counts += torch.stack([hits.sum(), false_alarms.sum(), misses.sum()])

    def compute(self) -> dict[str, Tensor]:
        hits, false_alarms, misses = self.counts.float()
        errors = false_alarms + misses
        return {
            "dice": self.dice_sum / self.images,
            "iou": self.iou_sum / self.images,
            "dice_pooled": _ratio(2 * hits, 2 * hits + errors),
            "iou_pooled": _ratio(hits, hits + errors),
            "images": self.images.float(),
        }


__all__ = ["OverlapScores"]
