"""The Lightning module that trains a network on L_seg + sum_l alpha_l L_l."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

import fdkernels as fdk
from fdkernels import models
from fdkernels.models import SegmentationNetwork
from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.data import derive_seed
from fdkernels.segmentation.metrics import OverlapScores
from fdkernels.segmentation.objective import SegmentationLoss
from fdkernels.settings import resize_of


class NotFiniteError(RuntimeError):
    """A loss or an output of the network is NaN or infinite, as it will be each time the run is repeated."""


class SegmentationModule(LightningModule):
    """Train `model` on the segmentation objective, with the feature discrepancy loss if given.

        L = L_seg + sum_l alpha_l L_l

    The layers are those of `model.tap_names`. Whether alpha is frozen at 0 or trained is the
    state of `criterion` (`freeze()`, `activate()`), which the caller sets before each phase.
    Logged for each epoch: train/loss, train/segmentation_loss, val/dice and val/iou, the learning
    rates lr/network and lr/alpha, and for each layer alpha/NAME (its value at the end of the epoch)
    and discrepancy_loss/NAME (the mean of L_l over the batches). Testing logs the scores of
    `OverlapScores` under test/.

    On several ranks the loss is that of all their samples together: Dice sums and region features
    are added up and exchanged over the ranks, so that R ranks with batches of N make the step of one
    process with R * N, batch norm without `sync_batchnorm` aside. With gradient accumulation alpha
    moves and `criterion` counts once a step of the optimizer; the pairs of an exchange are made
    within each batch.

    A batch is a dict: "image", float [N, 3, H, W] in [0, 1]; "mask", float [N, 1, H, W] of 0 and 1; with a
    second data set "domain", int64 [N], 1 is novel, and "mixed", whether both occur over all ranks; in
    evaluation "counted", bool [N], False for samples that fill up a rank.

    Attributes:
        epoch_layer_losses: with a criterion, L_l of each layer [L], the mean over the batches of
            the last epoch that was trained.

    Args:
        model: maps images [N, 3, H, W] to logits [N, 1, H, W], with `tap_names`.
        criterion: owns alpha; None trains on the segmentation objective alone.
        lr: Adam's learning rate for the network.
        alpha_lr: Adam's learning rate for alpha.
        channels_last: keep weights, images and features in torch's channels_last memory format.
        compile_network: run the network and the loss of its taps through `torch.compile`.
        fuse: run `fdkernels.fuse_norms` on a network that is not compiled, when training or a test begins.
        sync_batchnorm: whether Lightning makes batch norms those of all processes, where there are several;
            they are then not fused.

    Raises:
        NotFiniteError: the training loss of an epoch is not finite, or the network puts out NaN in a test.

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
        fuse: bool = False,
        sync_batchnorm: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.lr = lr
        self.alpha_lr = alpha_lr
        self.channels_last = channels_last
        self.compile_network = compile_network
        self.fuse = fuse
        self.sync_batchnorm = sync_batchnorm
        self.objective = SegmentationLoss()
        self.val_scores = OverlapScores()
        self.test_scores = OverlapScores()
        self._group: dist.ProcessGroup | None = None
        self._layer_losses: list[Tensor] = []
        self._compiled: _Compiled | None = None
        self._taps: fdk.FeatureTaps | None = None
        if criterion is not None:
            # [L], the mean over the batches of the last epoch; kept in checkpoints.
            self.register_buffer("epoch_layer_losses", torch.zeros(len(model.tap_names)))

    @classmethod
    def from_config(cls, config: TrainingConfig) -> SegmentationModule:
        """Make the network with fresh weights, and the loss unless the configuration leaves it out.

        Raises:
            ValueError: `lr` is None, or the network or the loss does not know a name.
        """
        if config.lr is None:
            raise ValueError("lr must be given where the data set has no preset, got None")
        model = models.create(config.model, base_channels=config.base_channels)
        criterion = None
        if config.fd_loss:
            criterion = fdk.FeatureDiscrepancyLoss(
                num_layers=len(model.tap_names),
                alpha_rule=config.alpha_rule,
                alpha_max=config.alpha_max,
                convention=config.convention,
                exchange=config.exchange,
                backend=config.backend,
                active=False,
            )
        return cls(
            model,
            criterion,
            lr=config.lr,
            alpha_lr=config.alpha_lr,
            channels_last=config.channels_last,
            compile_network=config.compile,
            fuse=config.fuse,
            sync_batchnorm=syncs_batchnorm(config),
        )

    def __getstate__(self) -> dict[str, Any]:
        # What is compiled runs this network, not that of a copy; `setup` makes both anew.
        return super().__getstate__() | {"_compiled": None, "_group": None, "_taps": None}

    def setup(self, stage: str) -> None:
        self._group = dist.group.WORLD if self.trainer.world_size > 1 else None
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compile_network and self._compiled is None:
            self._compiled = _Compiled(self.model, self.criterion, self._group is not None)
        # Lightning converts batch norms after this, and would no longer find those that are fused.
        synced = self.sync_batchnorm and self._group is not None
        if self.fuse and not self.compile_network and not synced:
            fdk.fuse_norms(self.model)

    def teardown(self, stage: str) -> None:
        self._remove_taps()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [
            {"name": "network", "params": list(self.model.parameters()), "lr": self.lr}
        ]
        if self.criterion is not None and self.criterion.is_active:
            groups += [{"name": "alpha", **group} for group in self.criterion.parameter_groups(self.alpha_lr)]
        return torch.optim.Adam(groups, fused=True)

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits [N, 1, H, W] of `image` [N, 3, H, W]."""
        image = self._laid_out(image)
        logits: Tensor = self.model(image) if self._compiled is None else self._compiled.logits(image)
        return logits

    def _forward_with_loss(
        self, criterion: fdk.FeatureDiscrepancyLoss, image: Tensor, mask: Tensor, options: _LossOptions
    ) -> tuple[Tensor, Tensor]:
        """Compute the logits of images and masks [N, ?, H, W], [N, 1, H, W], and the loss, a scalar."""
        image = self._laid_out(image)
        if self._compiled is not None:
            return self._compiled.logits_and_loss(image, mask, options)
        if self._taps is None:
            self._taps = fdk.FeatureTaps(self.model, self.model.tap_names, fused=criterion.is_active)
        taps = self._taps
        with taps.mask(mask, mask_resize=resize_of(criterion.settings)):
            logits: Tensor = self.model(image)
        loss: Tensor = criterion(taps, mask, **options)
        taps.clear()  # so that backward frees the features as it goes
        return logits, loss

    def _remove_taps(self) -> None:
        """Take the hooks away until the next training pass sets them anew; evaluation does without."""
        if self._taps is not None:
            self._taps.close()
            self._taps = None

    def _laid_out(self, image: Tensor) -> Tensor:
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last else image

    def on_train_epoch_start(self) -> None:
        self._layer_losses.clear()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Compute the loss, a scalar, of a batch with "image" [N, 3, H, W] and "mask" [N, 1, H, W]."""
        if self.criterion is None:
            segmentation_loss: Tensor = self.objective(self(batch["image"]), batch["mask"], group=self._group)
            loss = segmentation_loss
        else:
            # Samples of one domain alone cannot be paired across domains.
            alone = self.criterion.exchange == "pooled" and not batch.get("mixed", True)
            options: _LossOptions = {
                "domains": self._domains(batch),
                "exchange": "none" if alone else None,
                "group": self._group,
                # Of the batches whose gradients make one step, one counts.
                "count_step": batch_idx % self.trainer.accumulate_grad_batches == 0,
            }
            logits, discrepancy = self._forward_with_loss(
                self.criterion, batch["image"], batch["mask"], options
            )
            segmentation_loss = self.objective(logits, batch["mask"], group=self._group)
            loss = segmentation_loss + discrepancy
            if self.criterion.layer_losses is not None:
                self._layer_losses.append(self.criterion.layer_losses)
        for name, value in (("loss", loss), ("segmentation_loss", segmentation_loss)):
            self.log(
                f"train/{name}",
                value,
                on_step=False,
                on_epoch=True,
                prog_bar=True,
                batch_size=len(batch["image"]),
                sync_dist=self._group is not None,
            )
        return loss * self._factor_of_step(batch_idx)

    def _domains(self, batch: dict[str, Any]) -> Tensor | None:
        """Gather the domain of each sample over all ranks, [R * N]; None without a second data set."""
        domains: Tensor | None = batch.get("domain")  # [N]
        if domains is None or self._group is None:
            return domains
        gathered = self.all_gather(domains)  # [R, N]
        return torch.as_tensor(gathered).flatten()

    def _factor_of_step(self, batch_idx: int) -> float:
        """Make a step the mean over its batches: Lightning divides by K, the last step may have fewer."""
        together = self.trainer.accumulate_grad_batches
        batches = int(self.trainer.num_training_batches)
        return together / min(together, batches - batch_idx // together * together)

    def on_train_epoch_end(self) -> None:
        loss = self.trainer.callback_metrics["train/loss"]
        if not torch.isfinite(loss):
            raise NotFiniteError(
                f"the training loss became {float(loss)} in epoch {self.current_epoch + 1}; "
                "a lower lr or alpha_lr, or 32-bit precision, may keep it finite"
            )
        dice = self.trainer.callback_metrics.get("val/dice")
        if dice is not None and dice.isnan():
            warnings.warn(
                f"the network puts out NaN on validation images in epoch {self.current_epoch + 1}: their "
                "Dice is not defined, and the epoch cannot be the best",
                stacklevel=2,
            )
        # Not by LearningRateMonitor, whose names change with the number of groups.
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

    def on_validation_epoch_start(self) -> None:
        self._remove_taps()

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
        if scores["dice"].isnan():
            raise NotFiniteError("the network puts out NaN on test images: their Dice is not defined")
        self.log_dict({f"test/{name}": value for name, value in scores.items()})

    def _counted(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Compute the logits and take the masks of the samples that count; the others fill up a rank."""
        logits, mask, counted = self(batch["image"]), batch["mask"], batch.get("counted")
        if counted is None or self._group is None:
            return logits, mask
        return logits[counted], mask[counted]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        dice = self.trainer.callback_metrics.get("val/dice")
        checkpoint["validation_dice"] = None if dice is None else float(dice)


def syncs_batchnorm(config: TrainingConfig) -> bool:
    """Take the choice of the configuration, else True on GPUs: on a CPU torch has no such layer."""
    if config.sync_batchnorm is not None:
        return config.sync_batchnorm
    return config.accelerator != "cpu" and torch.cuda.is_available()


class _LossOptions(TypedDict):
    """What a step tells the criterion beside features and mask."""

    domains: Tensor | None
    exchange: str | None
    group: dist.ProcessGroup | None
    count_step: bool


class _Compiled:
    """A network, and the loss of its taps in one graph with it, through `torch.compile`.

    Args:
        model: the network.
        criterion: the loss; None for `logits` alone.
        in_group: whether the loss is that of several ranks, which tell each other their numbers on the host:
            no graph holds it then, and that of the network puts out the features.
    """

    def __init__(
        self, model: SegmentationNetwork, criterion: fdk.FeatureDiscrepancyLoss | None, in_group: bool
    ) -> None:
        self.model, self.criterion = model, criterion
        # Compiled code holds the hooks that are there when it is made: these stay for good.
        self._taps = None if criterion is None else fdk.FeatureTaps(model, model.tap_names)
        self._loss_of_taps = torch.compiler.disable(self._compute_loss) if in_group else self._compute_loss
        self._logits, self._logits_and_loss = torch.compile(self._run), torch.compile(self._run_with_loss)

    def logits(self, image: Tensor) -> Tensor:
        """Compute the logits [N, 1, H, W] of images [N, 3, H, W]."""
        return self._logits(image)

    def logits_and_loss(self, image: Tensor, mask: Tensor, options: _LossOptions) -> tuple[Tensor, Tensor]:
        """Compute the logits [N, 1, H, W] of images [N, 3, H, W], and the loss under masks, a scalar."""
        return self._logits_and_loss(image, mask, options)

    def _run(self, image: Tensor) -> Tensor:
        logits: Tensor = self.model(image)
        if self._taps is not None:
            self._taps.clear()  # so that the graph does not put out the features
        return logits

    def _run_with_loss(self, image: Tensor, mask: Tensor, options: _LossOptions) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.model(image)
        return logits, self._loss_of_taps(mask, options)

    def _compute_loss(self, mask: Tensor, options: _LossOptions) -> Tensor:
        assert self.criterion is not None
        assert self._taps is not None
        loss: Tensor = self.criterion(self._taps, mask, **options)
        self._taps.clear()
        return loss


class SeedSteps(Callback):
    """Seed torch anew before each batch, from the seed, the epoch, the batch and the rank.

    So a step does not depend on the random numbers drawn before it: a resumed run goes on as an
    unbroken one would have, and the first of several ranks draws the pairs that one process would.
    (Lightning's seed_everything seeds once, at the start of a process.)
    """

    def __init__(self, seed: int, seeder: Callable[[int], Any] = torch.manual_seed) -> None:
        self.seed = seed
        self._seeder = seeder

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._seeder(derive_seed(self.seed, trainer.current_epoch, 2, batch_idx, trainer.global_rank))


__all__ = ["NotFiniteError", "SeedSteps", "SegmentationModule", "syncs_batchnorm"]
