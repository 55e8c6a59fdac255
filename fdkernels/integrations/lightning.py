"""The loss as a callback of Lightning: the LightningModule stays as it is."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from fdkernels.criterion import FeatureDiscrepancyLoss
from fdkernels.integrations.alpha_group import add_alpha_group
from fdkernels.settings import has_two_regions, resize_of
from fdkernels.taps import FeatureTaps

__all__ = ["FeatureDiscrepancyCallback"]


class FeatureDiscrepancyCallback(Callback):
    """Add Σ_ℓ α_ℓ·L_ℓ to the loss of `training_step`, and train α in the module's own optimizer.

    ::

        crit = fdk.FeatureDiscrepancyLoss(num_layers=len(names))
        fd = FeatureDiscrepancyCallback(names, crit, network="model", mask_from_batch="mask")
        Trainer(callbacks=[fd]).fit(module, loader)

    For each fit it taps the network, and adds the loss to what `training_step` returns, a scalar tensor or a
    dict with a scalar "loss". α becomes a group of its own in the optimizer, the first if there are several,
    without weight decay; its learning rate follows the schedule of the optimizer's first group. A group
    with α that the optimizer already has is left as it is. `gradient_clip_val` clips the network's gradients
    alone. On several ranks the loss is that of the whole batch, so that α stays the same on all of them.

    A `training_step` that calls `loss(mask)` itself has added the loss, and nothing else is added. It does so

    - under manual optimisation, where it adds `fd.loss(mask)` to the loss of the network before
      `manual_backward`; a warning says so where it does not;
    - where the mask is not that of the batch, as after an augmentation within the step;
    - to pass further arguments of the criterion, such as `domains`.

    Logged at the end of each epoch are alpha/NAME, and discrepancy_loss/NAME, the mean of L_ℓ over the epoch.
    Checkpoints hold the criterion, and a resumed fit goes on with it.

    Args:
        names: of the tapped submodules, as `fdkernels.FeatureTaps` takes them.
        criterion: owns α, one for each name.
        mask_from_batch: finds the mask [N, 1, *S0] or [N, *S0] in a batch: a key, an index, or a function
            of the batch.
        network: the attribute of the module that holds the network, such as `"model"`, whose submodules
            `names` are; `""` is the module itself.
        alpha_lr: α's learning rate where that of the optimizer's first group is at its start (at its highest
            under OneCycleLR); None is the group's own.
        warm_start_epochs: for so many epochs α is frozen at 0; then it is active.
        fused, calls: as for `fdkernels.FeatureTaps`; `calls` is `"once"` or `"last"`.
        mask_first: whether to give the taps the batch's mask before `training_step`, as `taps.mask` says: a
            network of `fdkernels.fuse_norms`, or one that is compiled by itself, then makes the loss's sums
            as it computes the features. The step must leave the mask as it is.

    Attributes:
        criterion: as given.

    Raises:
        ValueError: another number of names than of α, `calls="all"`, or `warm_start_epochs` below 0; in fit,
            a name that the network does not have.
    """

    def __init__(
        self,
        names: Sequence[str],
        criterion: FeatureDiscrepancyLoss,
        *,
        mask_from_batch: Callable[[Any], Tensor] | str | int = 1,
        network: str = "",
        alpha_lr: float | None = 1e-3,
        warm_start_epochs: int = 0,
        fused: bool = True,
        calls: str = "once",
        mask_first: bool = False,
    ) -> None:
        if len(names) != criterion.alpha.shape[0]:
            raise ValueError(
                f"criterion must have one alpha for each of the {len(names)} names, "
                f"got {criterion.alpha.shape[0]}"
            )
        if calls == "all":
            raise ValueError("calls must be 'once' or 'last', so that each name has one alpha, got 'all'")
        if warm_start_epochs < 0:
            raise ValueError(f"warm_start_epochs must be at least 0, got {warm_start_epochs}")
        self.names = tuple(names)
        self.criterion = criterion
        self.mask_from_batch = mask_from_batch
        self.network = network
        self.alpha_lr = alpha_lr
        self.warm_start_epochs = warm_start_epochs
        self.fused = fused
        self.calls = calls
        self.mask_first = mask_first
        self._taps: FeatureTaps | None = None
        self._group: dist.ProcessGroup | None = None
        self._put_back: list[Callable[[], None]] = []
        self._counts_step = True
        self._is_added = False  # whether the running training step called `loss`
        self._warned = False
        self._loss_sum: Tensor | None = None  # [L], of the epoch
        self._passes = 0

    @property
    def state_key(self) -> str:
        """Where a checkpoint holds this callback's state: callbacks on other taps have their own."""
        return self._generate_state_key(network=self.network, names=self.names)

    def loss(self, mask: Tensor, **arguments: Any) -> Tensor:
        """Compute Σ_ℓ α_ℓ·L_ℓ of the network's last forward pass, a scalar, within `training_step`.

        Args:
            mask: [N, 1, *S0] or [N, *S0].
            arguments: as the criterion takes them, such as `domains`.

        Raises:
            RuntimeError: no fit runs, or the network has not run; and what the criterion raises.
        """
        if self._taps is None:
            raise RuntimeError("loss() computes the loss of a training step: call it while Trainer.fit runs")
        arguments = {"group": self._group, "count_step": self._counts_step, **arguments}
        loss: Tensor = self.criterion(self._taps, mask, **arguments)
        self._is_added = True
        losses = self.criterion.layer_losses
        if torch.is_grad_enabled() and losses is not None:
            self._loss_sum = losses if self._loss_sum is None else self._loss_sum + losses
            self._passes += 1
        return loss

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_off()
        network = pl_module.get_submodule(self.network)
        self._taps = FeatureTaps(network, self.names, fused=self.fused, calls=self.calls)
        self.criterion.to(pl_module.device).train()
        own_group = self.criterion.group
        self._group = dist.group.WORLD if own_group is None and trainer.world_size > 1 else own_group
        if not trainer.optimizers:
            raise RuntimeError("configure_optimizers must return an optimizer, which trains alpha as well")
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        add_alpha_group(trainer.optimizers, schedulers, self.criterion, self.alpha_lr)
        self._wrap(pl_module, "training_step", self._training_step)
        self._wrap(pl_module, "configure_gradient_clipping", self._clip_network)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_warm_start = trainer.current_epoch < self.warm_start_epochs
        if is_warm_start and self.criterion.is_active:
            self.criterion.freeze()
        elif not is_warm_start:
            self.criterion.activate()
        self._loss_sum, self._passes = None, 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loss_sum is None:
            return
        means, alpha = self._loss_sum / self._passes, self.criterion.alpha.detach()
        for index, name in enumerate(self.names):
            pl_module.log(f"alpha/{name}", alpha[index], sync_dist=self._group is not None)
            pl_module.log(f"discrepancy_loss/{name}", means[index], sync_dist=self._group is not None)

    def state_dict(self) -> dict[str, Any]:
        return {"criterion": self.criterion.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.criterion.load_state_dict(state_dict["criterion"])

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        if self._taps is not None:
            self._taps.clear()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_off()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._take_off()

    def _training_step(
        self, step: Callable[..., Any], pl_module: LightningModule, batch: Any, *arguments: Any
    ) -> Any:
        """Run the module's training step, and add the loss to what it returns unless it has done so."""
        assert self._taps is not None
        is_automatic = pl_module.automatic_optimization
        together = pl_module.trainer.accumulate_grad_batches if is_automatic else 1
        self._counts_step = not arguments or arguments[0] % together == 0
        self._is_added = False
        mask = self._mask_of(batch) if self.mask_first else None
        with contextlib.nullcontext() if mask is None else self._given(mask):
            output = step(batch, *arguments)
        if is_automatic and output is not None and not self._is_added:
            loss = self.loss(self._mask_of(batch) if mask is None else mask)
            if isinstance(output, Tensor):
                output = output + loss
            else:
                output = {**output, "loss": output["loss"] + loss}
        elif not is_automatic and not self._is_added and not self._warned:
            self._warned = True
            warnings.warn(
                "under manual optimisation training_step must add the feature discrepancy loss itself: "
                "self.manual_backward(loss + callback.loss(mask)); it has not called loss()",
                stacklevel=2,
            )
        self._taps.clear()
        return output

    def _given(self, mask: Tensor) -> contextlib.AbstractContextManager[None]:
        """Give the taps a mask [N, 1, *S0] or [N, *S0] as the criterion will resize it."""
        assert self._taps is not None
        settings = self.criterion.settings
        only = has_two_regions(settings) and settings.channel_dim == 1
        resize = resize_of(settings)
        return self._taps.mask(mask, mask_resize=resize, ignore_index=settings.ignore_index, sums_only=only)

    def _clip_network(
        self, clip: Callable[..., None], pl_module: LightningModule, optimizer: Optimizer, **how: Any
    ) -> None:
        """Clip gradients without α's, which is L, of the order of 10, and would shrink the network's step."""
        alpha = self.criterion.alpha
        grad, alpha.grad = alpha.grad, None
        clip(optimizer, **how)
        alpha.grad = grad

    def _mask_of(self, batch: Any) -> Tensor:
        """The mask [N, 1, *S0] or [N, *S0] of a batch."""
        where = self.mask_from_batch
        if callable(where):
            return where(batch)
        try:
            mask: Tensor = batch[where]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"mask_from_batch must find the mask in a batch, got {where!r}, which a batch of type "
                f"{type(batch).__name__} does not have"
            ) from error
        return mask

    def _wrap(self, pl_module: LightningModule, name: str, around: Callable[..., Any]) -> None:
        """Call `around(method, pl_module, ...)` in place of a method of the module until `_take_off`."""
        method = getattr(pl_module, name)
        own = vars(pl_module).get(name)  # of the instance, as torch.compile sets it

        @functools.wraps(method)
        def wrapped(*arguments: Any, **more: Any) -> Any:
            return around(method, pl_module, *arguments, **more)

        def put_back() -> None:
            if own is None:
                delattr(pl_module, name)
            else:
                setattr(pl_module, name, own)

        setattr(pl_module, name, wrapped)
        self._put_back.append(put_back)

    def _take_off(self) -> None:
        """Leave the module as it was before the fit."""
        for put_back in reversed(self._put_back):
            put_back()
        self._put_back = []
        if self._taps is not None:
            self._taps.close()
            self._taps = None
