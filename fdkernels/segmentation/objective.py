"""The segmentation objective: Dice loss plus binary cross-entropy, from logits."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from fdkernels.exchange import Ranks, gather_batch


def _wide(values: Tensor) -> Tensor:
    """Cast to float32 unless the dtype is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_pair(logits: Tensor, mask: Tensor) -> None:
    if logits.shape != mask.shape:
        raise ValueError(
            f"mask must have the shape of logits, {tuple(logits.shape)}, got {tuple(mask.shape)}"
        )


class DiceLoss(nn.Module):
    """The soft Dice loss of a batch, a scalar between 0 and 1.

        L_dice = 1 - (2 sum_p y_p s_p + eps) / (sum_p y_p + sum_p s_p + eps),   s = sigmoid(logits)

    p runs over every pixel of every sample: one ratio for the batch, as the equation is written,
    so that a sample without foreground does not divide by 0. Sums are taken in float32 at least. In plain
    torch:

        s = logits.sigmoid()
        loss = 1 - (2 * (s * y).sum() + eps) / (s.sum() + y.sum() + eps)

    Args:
        eps: added to both sums, so that the ratio is defined where truth and prediction are empty.
        group: the ranks that share a batch, whose sums are added; None for a batch of one process.
            The loss, on every rank, is that of the whole batch, and so is the gradient once
            DistributedDataParallel has averaged it.

    Raises:
        ValueError: `eps` is not positive; in the call, mask and logits differ in shape.

    References:
        Equation 3.
    """

    def __init__(self, eps: float = 1e-6, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        if eps <= 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.eps = eps
        self.group = group

    def forward(self, logits: Tensor, mask: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
        """Compute the loss of `logits` [N, 1, *S] against `mask` [N, 1, *S] in [0, 1].

        `group` takes the place of the module's own for this call.
        """
        _check_pair(logits, mask)
        soft = _wide(logits).sigmoid()  # [N, 1, *S]
        truth = mask.to(soft.dtype)  # [N, 1, *S]
        sums = torch.stack([(soft * truth).sum(), soft.sum() + truth.sum()])  # [2]
        group = self.group if group is None else group
        if group is not None:
            sums = gather_batch(sums.view(2, 1, 1), Ranks.even(group, 1)).sum(dim=(1, 2))
        return 1 - (2 * sums[0] + self.eps) / (sums[1] + self.eps)


class SegmentationLoss(nn.Module):
    """L_seg = L_dice + L_bce, a scalar.

        L_bce = -mean_p( y_p log s_p + (1 - y_p) log(1 - s_p) ),   s = sigmoid(logits)

    The cross-entropy is torch's own from logits, which needs no eps: log(sigmoid(x)) is computed
    without forming the sigmoid.

    Args:
        eps: of the Dice loss.
        group: as for the Dice loss. The cross-entropy is that of this rank's samples; DistributedDataParallel
            averages it over ranks of equally many samples, which gives that of the whole batch.

    References:
        Equations 3 to 5.
    """

    def __init__(self, eps: float = 1e-6, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.dice = DiceLoss(eps, group)

    def forward(self, logits: Tensor, mask: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
        """Compute the loss of `logits` [N, 1, *S] against `mask` [N, 1, *S] in [0, 1].

        `group` takes the place of the module's own for this call.
        """
        dice: Tensor = self.dice(logits, mask, group=group)
        logits = _wide(logits)
        return dice + functional.binary_cross_entropy_with_logits(logits, mask.to(logits.dtype))


__all__ = ["DiceLoss", "SegmentationLoss"]
