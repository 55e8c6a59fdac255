"""The Lightning module that trains a network on L_seg + sum_l alpha_l L_l."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

import fdkernels as fdk
from fdkernels.models import SegmentationNetwork
from fdkernels.segmentation.data import derive_seed
from fdkernels.segmentation.metrics import OverlapScores
from fdkernels.segmentation.objective import SegmentationLoss

Tapped = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


class SegmentationModule(LightningModule):
    """Trains `model` on the segmentation objective, with the feature discrepancy loss if given.

        L = L_seg + sum_l alpha_l L_l

    The layers are those of `model.tap_names`. Whether alpha is frozen at 0 or trained is the
    state of `criterion` (`freeze()`, `activate()`), which the caller sets before each phase.
    Logged for each epoch: train/loss, train/segmentation_loss, val/dice and val/iou, the learning
    rates lr/network and lr/alpha, and for each layer alpha/NAME (its value at the end of the epoch)
    and discrepancy_loss/NAME (the mean of L_l over the batches). Testing logs what `OverlapScores`
    gives under test/.

    On several ranks the loss is that of all their samples together: Dice sums and region features
    are added up and exchanged over the ranks, so that R ranks with batches of N make the step of one
    process with R * N, batch norm without `sync_batchnorm` aside. With gradient accumulation alpha
    moves and `criterion` counts once a step of the optimizer; the pairs of an exchange are made
    within each batch.

    Attributes:
        epoch_layer_losses: with a criterion, L_l of each layer [L], the mean over the batches of
            the last epoch that was trained.

    Args:
        model: maps images [N, 3, H, W] to logits [N, 1, H, W], with `tap_names`.
        criterion: owns alpha; None trains on the segmentation objective alone.
        lr: Adam's learning rate for the network.
        alpha_lr: Adam's learning rate for alpha.
        channels_last: keep weights, images and features in torch's channels_last memory format.
        compile_network: run the network, with its taps, through `torch.compile`.

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
        channels_last: bool = False,
        compile_network: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.lr = lr
        self.alpha_lr = alpha_lr
        self.channels_last = channels_last
        self.compile_network = compile_network
        self.objective = SegmentationLoss()
        self.val_scores = OverlapScores()
        self.test_scores = OverlapScores()
        self._layer_losses: list[Tensor] = []
        self._compiled: Tapped | None = None
        self._taps: fdk.FeatureTaps | None = None
        if criterion is not None:
            # [L], the mean over the batches of the last epoch; kept in checkpoints.
            self.register_buffer("epoch_layer_losses", torch.zeros(len(model.tap_names)))

    def setup(self, stage: str) -> None:
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        group = dist.group.WORLD if self.trainer.world_size > 1 else None
        self.objective.dice.group = group
        if self.criterion is not None:
            self.criterion.settings = self.criterion.settings._replace(group=group)
        if self.compile_network and self._compiled is None:
            self._taps = taps = fdk.FeatureTaps(self.model, self.model.tap_names)
            model = self.model

            def tapped(image: Tensor) -> tuple[Tensor, list[Tensor]]:
                logits = model(image)
                return logits, list(taps.features)

            # Compiled code holds the hooks that are there when it is made: these stay for good.
            self._compiled = torch.compile(tapped)

    def forward(self, image: Tensor) -> Tensor:
        image = self._laid_out(image)
        logits: Tensor = self.model(image) if self._compiled is None else self._tapped(image)[0]
        return logits

    def _laid_out(self, image: Tensor) -> Tensor:
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last else image

    def _tapped(self, image: Tensor) -> tuple[Tensor, list[Tensor] | fdk.FeatureTaps]:
        """Logits, and the features of the layers as the criterion takes them."""
        if self._compiled is not None and self._taps is not None:
            logits, features = self._compiled(image)
            self._taps.clear()
            return logits, features
        # The hooks live for this pass alone, so that no feature map outlives the step and
        # evaluation pays nothing for them.
        acts = self.criterion is not None and self.criterion.is_active
        with fdk.FeatureTaps(self.model, self.model.tap_names, fused=acts) as taps:
            return self.model(image), taps

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        image, mask = self._laid_out(batch["image"]), batch["mask"]
        if self.criterion is None:
            segmentation_loss: Tensor = self.objective(self(image), mask)
            loss = segmentation_loss
        else:
            logits, features = self._tapped(image)
            segmentation_loss = self.objective(logits, mask)
            loss = segmentation_loss + self._discrepancy(self.criterion, features, batch, batch_idx)
        for name, value in (("loss", loss), ("segmentation_loss", segmentation_loss)):
            self.log(
                f"train/{name}",
                value,
                on_step=False,
                on_epoch=True,
                prog_bar=True,
                batch_size=len(image),
                sync_dist=self.trainer.world_size > 1,
            )
        return loss * self._share_of_step(batch_idx)

    def _discrepancy(
        self,
        criterion: fdk.FeatureDiscrepancyLoss,
        features: list[Tensor] | fdk.FeatureTaps,
        batch: dict[str, Any],
        batch_idx: int,
    ) -> Tensor:
        # The criterion counts its training passes; of accumulated batches, one counts.
        criterion.train(batch_idx % self.trainer.accumulate_grad_batches == 0)
        domains = batch.get("domain")
        if domains is not None and criterion.settings.group is not None:
            parts = [torch.empty_like(domains) for _ in range(self.trainer.world_size)]
            dist.all_gather(parts, domains, group=criterion.settings.group)
            domains = torch.cat(parts)  # [R * N]
        alone = criterion.settings.exchange == "pooled" and not batch.get("mixed", True)
        with _without_exchange(criterion, alone):
            loss: Tensor = criterion(features, batch["mask"], domains=domains)
        if criterion.layer_losses is not None:
            self._layer_losses.append(criterion.layer_losses)
        return loss

    def _share_of_step(self, batch_idx: int) -> float:
        """Makes a step the mean over its batches: Lightning divides by K, the last step may have fewer."""
        together = self.trainer.accumulate_grad_batches
        batches = int(self.trainer.num_training_batches)
        return together / min(together, batches - batch_idx // together * together)

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
        optimizer = self.optimizers(use_pl_optimizer=False)
        if isinstance(optimizer, torch.optim.Optimizer):
            for group in optimizer.param_groups:
                self.log(f"lr/{group['name']}", float(group["lr"]))
        if self.criterion is None or not self._layer_losses:
            return
        self.epoch_layer_losses.copy_(torch.stack(self._layer_losses).mean(dim=0))
        alphas = self.criterion.alpha.detach()
        for index, name in enumerate(self.model.tap_names):
            self.log(f"alpha/{name}", alphas[index])
            self.log(f"discrepancy_loss/{name}", self.epoch_layer_losses[index])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.val_scores.update(*self._counted(batch))

    def on_validation_epoch_end(self) -> None:
        scores = self.val_scores.compute()
        self.val_scores.reset()
        self.log("val/dice", scores["dice"], prog_bar=True)
        self.log("val/iou", scores["iou"])

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.test_scores.update(*self._counted(batch))

    def on_test_epoch_end(self) -> None:
        scores = self.test_scores.compute()
        self.test_scores.reset()
        self.log_dict({f"test/{name}": value for name, value in scores.items()})

    def _counted(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits and masks of the samples that count; the others fill up a rank (`EvaluationBatches`)."""
        logits, mask, counted = self(batch["image"]), batch["mask"], batch.get("counted")
        if counted is None or self.trainer.world_size == 1:
            return logits, mask
        return logits[counted], mask[counted]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [
            {"name": "network", "params": list(self.model.parameters()), "lr": self.lr}
        ]
        criterion = self.criterion
        if criterion is not None and criterion.is_active and isinstance(criterion.alpha, nn.Parameter):
            groups.append({"name": "alpha", "params": [criterion.alpha], "lr": self.alpha_lr})
        return torch.optim.Adam(groups)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        dice = self.trainer.callback_metrics.get("val/dice")
        checkpoint["validation_dice"] = None if dice is None else float(dice)


@contextmanager
def _without_exchange(criterion: fdk.FeatureDiscrepancyLoss, alone: bool) -> Iterator[None]:
    """Leaves out the exchange term where a batch has samples of one domain alone."""
    settings = criterion.settings
    if alone:
        criterion.settings = settings._replace(exchange="none")
    try:
        yield
    finally:
        criterion.settings = settings


class SeedSteps(Callback):
    """Seeds torch anew before each batch, from the seed, the epoch, the batch and the rank.

    So a step does not depend on the random numbers drawn before it: a resumed run goes on as an
    unbroken one would have, and the first of several ranks draws the pairs that one process would.
    """

    def __init__(self, seed: int, seeder: Callable[[int], Any] = torch.manual_seed) -> None:
        self.seed = seed
        self._seeder = seeder

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._seeder(derive_seed(self.seed, trainer.current_epoch, 2, batch_idx, trainer.global_rank))


__all__ = ["SeedSteps", "SegmentationModule"]
