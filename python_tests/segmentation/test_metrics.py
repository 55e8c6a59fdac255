from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index

from fdkernels.segmentation.metrics import COUNTS, SCORES, OverlapScores, pooled_scores, sample_scores

SCORED = ("dice", "iou", "dice_pooled", "iou_pooled")
# Of images with 1 to 30 pixels: two bits a pixel, predicted and true.
PIXELS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30)


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


@pytest.mark.parametrize("truth", [0.0, 1.0])
def test_nan_logits_are_neither_foreground_nor_background(truth):
    logits, mask = torch.full((2, 1, 2, 2), 1.0), torch.full((2, 1, 2, 2), truth)
    logits[0, 0, 1, 1] = float("nan")
    assert all(
        torch.tensor(_scores(logits, mask, batch)[name]).isnan() for name in SCORED for batch in (1, 2)
    )
    found = sample_scores(logits, mask)
    for name in SCORES:
        assert found[name][0].isnan()
        assert torch.equal(found[name][1:].isnan(), sample_scores(logits[1:], mask[1:])[name].isnan())
    assert [found[name][0].item() for name in COUNTS] == [0, 0, 0, 0]
    assert found["foreground_share"].tolist() == [truth, truth]


def test_infinite_logits_are_one_or_the_other():
    logits = torch.tensor([float("inf"), -float("inf")]).reshape(1, 1, 1, 2)
    assert _scores(logits, torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2))["dice"] == 1


def test_reset_forgets_what_was_seen():
    metric = OverlapScores()
    metric.update(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    metric.reset()
    metric.update(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    assert metric.compute()["dice"] == 1


def _pair(pixels):
    """Logits and mask [1, 1, P] of one image, given as (predicted, true) by pixel."""
    predicted, truth = torch.tensor(pixels).T
    return (predicted.float() - 0.5)[None, None], truth.float()[None, None]


def test_scores_of_each_sample_by_hand():
    predicted = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    truth = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    scores = sample_scores(predicted.reshape(2, 1, 2, 2) - 0.5, truth.reshape(2, 1, 2, 2))
    assert [scores[name].tolist() for name in COUNTS] == [[2, 1], [1, 0], [1, 0], [0, 3]]
    assert scores["dice"].tolist() == pytest.approx([4 / 5, 2 / 5])
    assert scores["iou"].tolist() == pytest.approx([2 / 3, 1 / 4])
    assert scores["sensitivity"].tolist() == pytest.approx([1, 1 / 4])
    assert scores["specificity"].tolist() == pytest.approx([1 / 2, float("nan")], nan_ok=True)
    assert scores["precision"].tolist() == pytest.approx([2 / 3, 1])
    assert scores["foreground_share"].tolist() == [1 / 2, 1]


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        (0, 0, {"dice": 1, "iou": 1, "specificity": 1}),
        (1, 0, {"dice": 0, "iou": 0, "specificity": 0, "precision": 0}),
        (0, 1, {"dice": 0, "iou": 0, "sensitivity": 0}),
        (1, 1, {"dice": 1, "iou": 1, "sensitivity": 1, "precision": 1}),
    ],
)
def test_what_nothing_is_there_for_is_nan(predicted, truth, expected):
    scores = sample_scores(torch.full((1, 1, 3, 2), predicted - 0.5), torch.full((1, 1, 3, 2), truth))
    defined = {name: scores[name].item() for name in SCORES if not scores[name].isnan()}
    assert defined == expected


@given(PIXELS)
def test_scores_are_shares_and_dice_follows_from_iou(pixels):
    scores = sample_scores(*_pair(pixels))
    for name in (*SCORES, "foreground_share"):
        assert scores[name].isnan() or 0 <= scores[name] <= 1
    assert scores["dice"].item() == pytest.approx(2 * scores["iou"].item() / (1 + scores["iou"].item()))


@given(PIXELS)
def test_swapping_truth_and_prediction_swaps_sensitivity_and_precision_alone(pixels):
    scores = sample_scores(*_pair(pixels))
    swapped = sample_scores(*_pair([(truth, predicted) for predicted, truth in pixels]))
    for name, other in (("dice", "dice"), ("iou", "iou"), ("sensitivity", "precision")):
        torch.testing.assert_close(scores[name], swapped[other], equal_nan=True)
        torch.testing.assert_close(scores[other], swapped[name], equal_nan=True)


@given(PIXELS)
def test_swapping_foreground_and_background_swaps_sensitivity_and_specificity(pixels):
    scores = sample_scores(*_pair(pixels))
    inverted = sample_scores(*_pair([(not predicted, not truth) for predicted, truth in pixels]))
    torch.testing.assert_close(scores["sensitivity"], inverted["specificity"], equal_nan=True)
    torch.testing.assert_close(scores["specificity"], inverted["sensitivity"], equal_nan=True)


@given(st.integers(0, 1000), st.integers(1, 5))
def test_the_scores_of_samples_are_those_of_the_metric(seed, images):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, 1, 3, 4, generator=generator)
    mask = torch.randint(2, (images, 1, 3, 4), generator=generator)
    together, metric = sample_scores(logits, mask), _scores(logits, mask)
    alone = [sample_scores(logits[n : n + 1], mask[n : n + 1]) for n in range(images)]
    for name, values in together.items():
        torch.testing.assert_close(
            torch.cat([one[name] for one in alone]), values, rtol=0, atol=0, equal_nan=True
        )
    assert together["dice"].mean().item() == pytest.approx(metric["dice"], abs=1e-6)
    assert together["iou"].mean().item() == pytest.approx(metric["iou"], abs=1e-6)
    pooled = pooled_scores(together)
    assert pooled["dice"] == pytest.approx(metric["dice_pooled"], abs=1e-6)
    assert pooled["iou"] == pytest.approx(metric["iou_pooled"], abs=1e-6)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(
        ValueError, match=r"mask must have the shape of logits, \[1, 1, 2, 2\], got \[1, 2, 2\]"
    ):
        sample_scores(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2))


def test_no_sample_gives_no_score():
    scores = sample_scores(torch.zeros(0, 1, 2, 2), torch.zeros(0, 1, 2, 2))
    assert all(len(values) == 0 for values in scores.values())
