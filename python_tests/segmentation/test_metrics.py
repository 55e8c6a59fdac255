from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index

from fdkernels.segmentation.metrics import OverlapScores


def _scores(logits, mask, batch=None):
    metric = OverlapScores()
    for part in zip(logits.split(batch or len(logits)), mask.split(batch or len(mask)), strict=True):
        metric.update(*part)
    return {name: value.item() for name, value in metric.compute().items()}


def test_scores_by_hand():
    # TP, FP, FN: image 0 has 2, 1, 0; image 1 has 1, 0, 3.
    predicted = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    truth = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    scores = _scores(predicted.reshape(2, 1, 2, 2) - 0.5, truth.reshape(2, 1, 2, 2))
    assert scores["dice"] == pytest.approx((4 / 5 + 2 / 5) / 2)
    assert scores["iou"] == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert scores["dice_pooled"] == pytest.approx(6 / 10)
    assert scores["iou_pooled"] == pytest.approx(3 / 7)
    assert scores["images"] == 2


@pytest.mark.parametrize(("predicted", "expected"), [(0, 1), (1, 0)])
def test_an_empty_truth_scores_one_or_zero(predicted, expected):
    logits = torch.full((1, 1, 3, 3), predicted - 0.5)
    scores = _scores(logits, torch.zeros(1, 1, 3, 3))
    assert scores["dice"] == scores["iou"] == scores["dice_pooled"] == expected


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 6))
def test_agrees_with_torchmetrics_and_does_not_depend_on_the_batches(seed, images, batch):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, 1, 4, 5, generator=generator)
    mask = torch.randint(2, (images, 1, 4, 5), generator=generator)
    mask[:, :, 0, 0] = 1
    scores = _scores(logits, mask, batch)
    predicted = (logits > 0).int()
    pairs = list(zip(predicted, mask, strict=True))
    dice = torch.stack([binary_f1_score(*pair) for pair in pairs])
    iou = torch.stack([binary_jaccard_index(*pair) for pair in pairs])
    assert scores["dice"] == pytest.approx(dice.mean().item(), abs=1e-5)
    assert scores["iou"] == pytest.approx(iou.mean().item(), abs=1e-5)
    assert scores["dice_pooled"] == pytest.approx(binary_f1_score(predicted, mask).item(), abs=1e-5)
    assert scores["iou_pooled"] == pytest.approx(binary_jaccard_index(predicted, mask).item(), abs=1e-5)


def test_nan_logits_count_as_background():
    assert _scores(torch.full((1, 1, 2, 2), float("nan")), torch.ones(1, 1, 2, 2))["dice"] == 0


def test_reset_forgets_what_was_seen():
    metric = OverlapScores()
    metric.update(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    metric.reset()
    metric.update(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    assert metric.compute()["dice"] == 1
