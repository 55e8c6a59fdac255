"""The Lightning module that trains a network on L_seg + sum_l alpha_l L_l."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

import fdkernels as fdk
from fdkernels.models import SegmentationNetwork
from fdkernels.segmentation.data import derive_seed
from fdkernels.segmentation.metrics import OverlapScores
from fdkernels.segmentation.objective import SegmentationLoss


class SegmentationModule(LightningModule):
    """Trains `model` on the segmentation objective, with the feature discrepancy loss if given.

        L = L_seg + sum_l alpha_l L_l

    The layers are those of `model.tap_names`. Whether alpha is frozen at 0 or trained is the
    state of `criterion` (`freeze()`, `activate()`), which the caller sets before each phase.
    Logged for each epoch: train/loss, train/segmentation_loss, val/dice and val/iou, and for each
    layer alpha/NAME (its value at the end of the epoch) and discrepancy_loss/NAME (the mean of
    L_l over the steps). Testing logs what `OverlapScores` gives under test/.

    Attributes:
        epoch_layer_losses: with a criterion, L_l of each layer [L], the mean over the steps of
            the last epoch that was trained.

    Args:
        model: maps images [N, 3, H, W] to logits [N, 1, H, W], with `tap_names`.
        criterion: owns alpha; None trains on the segmentation objective alone.
        lr: Adam's learning rate for the network.
        alpha_lr: Adam's learning rate for alpha.

    References:
        Section 2.3.1 and equations 3 to 5.
    """

    epoch_layer_losses: Tensor

    def __init__(
        self,
        model: SegmentationNetwork,
        criterion: fdk.FeatureDiscrepancyLoss | None = None,
        *,
        lr: float,
        alpha_lr: float = 1e-3,
    ) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.lr = lr
        self.alpha_lr = alpha_lr
        self.objective = SegmentationLoss()
        self.val_scores = OverlapScores()
        self.test_scores = OverlapScores()
        self._layer_losses: list[Tensor] = []
        if criterion is not None:
            # [L], the mean over the steps of the last epoch; kept in checkpoints.
            self.register_buffer("epoch_layer_losses", torch.zeros(len(model.tap_names)))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.model(image)
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        image, mask = batch["image"], batch["mask"]
        if self.criterion is None:
            segmentation_loss: Tensor = self.objective(self(image), mask)
            loss = segmentation_loss
        else:
            # The hooks live for this step alone, so that no feature map outlives it and
            # evaluation pays nothing for them.
            with fdk.FeatureTaps(self.model, self.model.tap_names) as taps:
                logits = self(image)
                features = list(taps.features)
            segmentation_loss = self.objective(logits, mask)
            loss = segmentation_loss + self.criterion(features, mask)
            if self.criterion.layer_losses is not None:
                self._layer_losses.append(self.criterion.layer_losses)
        size = len(image)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=size)
        self.log(
            "train/segmentation_loss",
            segmentation_loss,
            on_step=False,
            on_epoch=True,
            batch_size=size,
        )
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.criterion is not None:
            self.criterion.project_()

    def on_train_epoch_start(self) -> None:
        self._layer_losses.clear()

    def on_train_epoch_end(self) -> None:
        loss = self.trainer.callback_metrics["train/loss"]
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"the training loss became {float(loss)} in epoch {self.current_epoch + 1}; "
                "a lower lr or alpha_lr, or 32-bit precision, may keep it finite"
            )
        if self.criterion is None or not self._layer_losses:
            return
        self.epoch_layer_losses.copy_(torch.stack(self._layer_losses).mean(dim=0))
        alphas = self.criterion.alpha.detach()
        for index, name in enumerate(self.model.tap_names):
            self.log(f"alpha/{name}", alphas[index])
            self.log(f"discrepancy_loss/{name}", self.epoch_layer_losses[index], sync_dist=True)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.val_scores.update(self(batch["image"]), batch["mask"])

    def on_validation_epoch_end(self) -> None:
        scores = self.val_scores.compute()
        self.val_scores.reset()
        self.log("val/dice", scores["dice"], prog_bar=True)
        self.log("val/iou", scores["iou"])

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.test_scores.update(self(batch["image"]), batch["mask"])

    def on_test_epoch_end(self) -> None:
        scores = self.test_scores.compute()
        self.test_scores.reset()
        self.log_dict({f"test/{name}": value for name, value in scores.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": list(self.model.parameters()), "lr": self.lr}]
        criterion = self.criterion
        if criterion is not None and criterion.is_active and isinstance(criterion.alpha, nn.Parameter):
            groups.append({"params": [criterion.alpha], "lr": self.alpha_lr})
        return torch.optim.Adam(groups)


class SeedEpochs(Callback):
    """Seeds torch anew at the start of each epoch, from the seed, the epoch and the rank.

    So an epoch does not depend on the random numbers drawn before it: a resumed run goes on as an
    unbroken one would have.
    """

    def __init__(self, seed: int, seeder: Callable[[int], Any] = torch.manual_seed) -> None:
        self.seed = seed
        self._seeder = seeder

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seeder(derive_seed(self.seed, trainer.current_epoch, 2, trainer.global_rank))


__all__ = ["SeedEpochs", "SegmentationModule"]
