"""The segmentation objective: Dice loss plus binary cross-entropy, from logits."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def _check_pair(logits: Tensor, mask: Tensor) -> None:
    if logits.shape != mask.shape:
        raise ValueError(
            f"mask must have the shape of logits, {tuple(logits.shape)}, got {tuple(mask.shape)}"
        )


class DiceLoss(nn.Module):
    """The soft Dice loss of a batch, a scalar between 0 and 1.

        L_dice = 1 - (2 sum_p y_p s_p + eps) / (sum_p y_p + sum_p s_p + eps),   s = sigmoid(logits)

    p runs over every pixel of every sample: one ratio for the batch, as the equation is written,
    so that a sample without foreground does no harm. Sums are taken in float32 at least. In plain
    torch:

        s = logits.sigmoid()
        loss = 1 - (2 * (s * y).sum() + eps) / (s.sum() + y.sum() + eps)

    Args:
        eps: keeps the ratio defined where truth and prediction are both empty.

    Raises:
        ValueError: `eps` is not positive; in the call, mask and logits differ in shape.

    References:
        Equation 3.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        if eps <= 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.eps = eps

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """The loss of `logits` [N, 1, *S] against `mask` [N, 1, *S] in [0, 1]."""
        _check_pair(logits, mask)
        soft = logits.float().sigmoid()  # [N, 1, *S]
        truth = mask.float()  # [N, 1, *S]
        overlap = (soft * truth).sum()
        return 1 - (2 * overlap + self.eps) / (soft.sum() + truth.sum() + self.eps)


class SegmentationLoss(nn.Module):
    """L_seg = L_dice + L_bce, a scalar.

        L_bce = -mean_p( y_p log s_p + (1 - y_p) log(1 - s_p) ),   s = sigmoid(logits)

    The cross-entropy is torch's own from logits, which needs no eps: log(sigmoid(x)) is computed
    without forming the sigmoid.

    Args:
        eps: of the Dice loss.

    References:
        Equations 3 to 5.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.dice = DiceLoss(eps)

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """The loss of `logits` [N, 1, *S] against `mask` [N, 1, *S] in [0, 1]."""
        dice: Tensor = self.dice(logits, mask)
        entropy = functional.binary_cross_entropy_with_logits(logits.float(), mask.float())
        return dice + entropy


__all__ = ["DiceLoss", "SegmentationLoss"]
