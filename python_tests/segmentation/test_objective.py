from __future__ import annotations

import math

import pytest
import torch

from fdkernels.segmentation.objective import DiceLoss, SegmentationLoss

# Probabilities 1/2, 3/4, 1/4, 9/10 as logits, against the truth 1, 1, 0, 0.
PROBABILITIES = [0.5, 0.75, 0.25, 0.9]
LOGITS = torch.tensor([math.log(p / (1 - p)) for p in PROBABILITIES]).reshape(1, 1, 2, 2)
MASK = torch.tensor([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
DICE = 1 - 2 * (0.5 + 0.75) / (2 + (0.5 + 0.75 + 0.25 + 0.9))
ENTROPY = -(math.log(0.5) + math.log(0.75) + math.log(0.75) + math.log(0.1)) / 4


def test_dice_loss_by_hand():
    assert DiceLoss()(LOGITS, MASK).item() == pytest.approx(DICE, abs=1e-6)


def test_segmentation_loss_adds_the_cross_entropy():
    assert SegmentationLoss()(LOGITS, MASK).item() == pytest.approx(DICE + ENTROPY, abs=1e-6)


def test_dice_loss_is_one_ratio_for_the_batch():
    logits, mask = torch.randn(3, 1, 5, 4), torch.randint(2, (3, 1, 5, 4)).float()
    soft = logits.sigmoid()
    expected = 1 - 2 * (soft * mask).sum() / (soft.sum() + mask.sum())
    assert torch.allclose(DiceLoss()(logits, mask), expected, atol=1e-6)


def test_a_perfect_prediction_costs_nothing():
    assert SegmentationLoss()(200 * (MASK - 0.5), MASK).item() == pytest.approx(0, abs=1e-6)


def test_an_empty_truth_gives_a_finite_loss():
    empty = torch.zeros_like(MASK)
    assert DiceLoss()(torch.full_like(MASK, -200.0), empty).item() == pytest.approx(0, abs=1e-6)
    assert DiceLoss()(LOGITS, empty).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_logits_keep_loss_and_gradient_finite(scale):
    logits = torch.full_like(MASK, scale).requires_grad_()
    loss = SegmentationLoss()(logits, MASK)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_gradient_of_the_dice_loss_by_finite_differences():
    loss = DiceLoss()
    gradient = torch.func.grad(lambda x: loss(x, MASK))(LOGITS)
    for index in range(4):
        step = torch.zeros(4)
        step[index] = 1e-2
        step = step.reshape_as(LOGITS)
        numeric = (loss(LOGITS + step, MASK) - loss(LOGITS - step, MASK)) / 2e-2
        assert gradient.flatten()[index].item() == pytest.approx(numeric.item(), abs=1e-4)


def test_gradient_raises_foreground_and_lowers_background():
    logits = LOGITS.clone().requires_grad_()
    SegmentationLoss()(logits, MASK).backward()
    assert torch.equal(logits.grad < 0, MASK == 1)


def test_half_precision_and_whole_number_masks_are_taken():
    loss = SegmentationLoss()(LOGITS.half(), MASK.to(torch.uint8))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(DICE + ENTROPY, abs=1e-2)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"mask must have the shape of logits, \(1, 1, 2, 2\)"):
        SegmentationLoss()(LOGITS, MASK[:, 0])


def test_eps_must_be_positive():
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        DiceLoss(0)
