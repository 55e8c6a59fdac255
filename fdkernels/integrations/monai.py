"""The loss as a loss function of MONAI's engines, and of any loop that calls `loss(prediction, target)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fdkernels.criterion import FeatureDiscrepancyLoss
from fdkernels.taps import FeatureTaps

__all__ = ["TappedLoss"]


class TappedLoss(nn.Module):
    """Add Σ_ℓ α_ℓ·L_ℓ to a segmentation loss: `loss(prediction, target)`.

    ::

        taps = fdk.FeatureTaps(network, names, fused=True)
        loss = TappedLoss(DiceCELoss(sigmoid=True), crit, taps)
        optimizer = Adam([{"params": network.parameters()}, *crit.parameter_groups(lr=1e-3)])
        trainer = SupervisedTrainer(..., loss_function=loss)

    The features are those of the network's last forward pass, dropped once the loss is computed. The mask of
    the criterion is the target itself: for a binary criterion the foreground [N, 1, *S], for
    `FeatureDiscrepancyLoss(..., mode="multiclass", num_classes=K)` class indices [N, 1, *S], as MONAI's
    losses take them with `to_onehot_y=True`, or one-hot [N, K, *S].

    The module's `state_dict` holds that of the criterion: save it beside the network's, as MONAI's
    `CheckpointSaver(..., save_dict={"network": network, "loss": loss})` does.

    Args:
        segmentation_loss: computes a loss, of any shape, from what the network puts out, also several heads,
            and the target.
        criterion: owns α.
        taps: on the network.
        mask_from_target: finds the mask where the target is not the mask itself.

    Raises:
        RuntimeError: in the call, the network has not run since the last; and what the criterion raises.
    """

    def __init__(
        self,
        segmentation_loss: Callable[[Any, Any], Tensor],
        criterion: FeatureDiscrepancyLoss,
        taps: FeatureTaps,
        mask_from_target: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.segmentation_loss = segmentation_loss
        self.criterion = criterion
        self.taps = taps
        self.mask_from_target = mask_from_target

    def forward(self, prediction: Any, target: Any) -> Tensor:
        """Compute the sum of both losses.

        Args:
            prediction: what the network puts out.
            target: [N, 1, *S0] or [N, K, *S0], or what `mask_from_target` makes one of.

        Returns:
            Of the shape of the segmentation loss.
        """
        segmentation_loss = self.segmentation_loss(prediction, target)
        mask = target if self.mask_from_target is None else self.mask_from_target(target)
        loss: Tensor = segmentation_loss + self.criterion(self.taps, mask)
        self.taps.clear()
        return loss
