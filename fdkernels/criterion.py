"""The loss as a module that owns a trainable weight α for every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fdkernels import checks
from fdkernels.alpha import ALPHA_RULES, AlphaWatch, Rule, bounds_of
from fdkernels.conventions import Convention
from fdkernels.copies import HoldsGroup
from fdkernels.inputs import check_inputs
from fdkernels.layer_losses import Partners, losses_per_layer
from fdkernels.settings import Settings, settings_of
from fdkernels.taps import FeatureTaps
from fdkernels.transforms import in_transform

__all__ = ["FeatureDiscrepancyLoss"]

# `target=None` looks at so many training passes.
TARGET_PASSES = 10


class FeatureDiscrepancyLoss(HoldsGroup, nn.Module):
    """Add up α_ℓ·L_ℓ over the layers of a network, with one α a layer: `crit(features, mask)`.

    The gradient of α·L with respect to α is L itself. Where L > 0, plain descent drives α below zero or,
    clipped at 0, never lets it leave 0, and the loss silently does nothing. So the rule is a choice:

    - `"ascent"`: dual ascent, α ← α + lr·(L - target) within [0, alpha_max]; the layer's weight grows while
      its loss is above the target. The sign is turned inside the module, so that any optimizer that
      descends does the right thing, line searches such as LBFGS's aside: those need `"descent"` or `"ramp"`.
    - `"descent"`: α ← α - lr·L, to the letter and without bounds.
    - `"clipped"`: descent clipped to [0, 1], as the authors' code has it.
    - `"ramp"`: α rises linearly from 0 to alpha_max over `ramp_steps` training passes; it is not trained.

    Give α to the optimizer, in a group of its own: `Adam([{"params": model.parameters()},
    *crit.parameter_groups(lr=1e-3)])`. To clip gradients by norm, clip those of the network alone: α's
    gradient is L, of the order of 10, and would shrink the network's step. Counted as training passes are
    calls in training mode with gradients enabled. Every `patience` of them the module looks whether an α
    does nothing (never stepped, held at 0, another on every rank), and warns once of each.

    Save and load the module's `state_dict` beside the network's: α, its phase, target and steps are in it.

    Args:
        num_layers: L, the number of layers.
        alpha_rule: one of the rules above.
        alpha_init: α of every layer at the start of its training.
        alpha_max: the upper bound of `"ascent"` and the end of `"ramp"`.
        target: the loss of a layer at which `"ascent"` stops raising its α. None is 1 below the lowest loss
            of any layer in the first 10 training passes with α active, since L depends on the network: with
            batch norm it soon is below 0.
        ramp_steps: how many training passes `"ramp"` takes.
        active: False starts in the paper's first phase (warm start): α = 0 and frozen until `activate()`.
        patience: how many training passes an α may do nothing before the warning.
        convention, exchange, group, mask_resize, aspect, channel_dim, ignore_index, mode, num_classes,
        include_background, pairs, eps, backend: as for `fdkernels.feature_discrepancy_loss`.
        reduction: `"mean"` or `"sum"` over the samples, or entries, of a layer.

    A deep copy shares the group; a pickle leaves it out, and calls say so until `crit.group` is assigned.

    Attributes:
        alpha: [L], a parameter, or a buffer under `"ramp"`; within its bounds whenever it is read.
        target: the loss at which `"ascent"` stops raising an α; None until the first training pass has set
            it. May be assigned.
        layer_losses: [L], L of every layer in the last call, detached; None before the first.
        exchange: the cross-sample term that calls add unless they name another.

    Raises:
        ValueError: num_layers below 1, an unknown name, a bound out of order.
    """

    alpha_target: Tensor
    active: Tensor
    steps: Tensor

    def __init__(
        self,
        num_layers: int,
        alpha_rule: str = "ascent",
        *,
        alpha_init: float = 0.0,
        alpha_max: float = 1.0,
        target: float | None = None,
        ramp_steps: int = 1000,
        active: bool = True,
        patience: int = 25,
        convention: str | Convention = "paper",
        exchange: str = "none",
        group: dist.ProcessGroup | None = None,
        mask_resize: str | None = None,
        aspect: str = "same",
        channel_dim: int = 1,
        ignore_index: float | None = None,
        mode: str = "binary",
        num_classes: int | None = None,
        include_background: bool = True,
        pairs: Sequence[tuple[int, int]] | None = None,
        eps: float = 1e-12,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if isinstance(num_layers, bool) or not isinstance(num_layers, int):
            raise TypeError(f"num_layers must be an integer, got {type(num_layers).__name__}")
        counts = {"num_layers": num_layers, "ramp_steps": ramp_steps, "patience": patience}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        checks.one_of("alpha_rule", alpha_rule, ALPHA_RULES)
        checks.one_of("reduction", reduction, ("mean", "sum"))
        self.rule = Rule(alpha_rule, bounds_of(alpha_rule, alpha_max), patience)
        low, high = self.rule.bounds
        if not low <= alpha_init <= high:
            raise ValueError(
                f"alpha_init must be within {[low, high]} for alpha_rule={alpha_rule!r}, got {alpha_init}"
            )
        self.alpha_init = float(alpha_init)
        self.alpha_max = float(alpha_max)
        self.ramp_steps = ramp_steps
        self.settings = settings_of(
            convention=convention,
            exchange=exchange,
            mask_resize=mask_resize,
            ignore_index=ignore_index,
            eps=eps,
            reduction=reduction,
            group=group,
            backend=backend,
            aspect=aspect,
            channel_dim=channel_dim,
            mode=mode,
            num_classes=num_classes,
            include_background=include_background,
            pairs=pairs,
        )
        start = torch.full((num_layers,), 0.0 if alpha_rule == "ramp" else self.alpha_init)
        if alpha_rule == "ramp":
            self.register_buffer("alpha", start)
        else:
            self.register_parameter("alpha", nn.Parameter(start))
        # Buffers, so that a compiled pass sets them as well and every form of checkpoint keeps them.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("active", torch.ones((), dtype=torch.int64))
        self.register_buffer("alpha_target", torch.full((), math.inf))
        self.layer_losses: Tensor | None = None
        self._active = True  # `active` on the host
        self._watch = AlphaWatch()
        self.target = target
        if not active:
            self.freeze()
        self._froze = False  # whether `freeze()` began the warm start

    @property
    def alpha(self) -> Tensor:
        """The weight of each layer, [L], within the bounds of its rule."""
        alpha = self._parameters.get("alpha", self._buffers.get("alpha"))
        if alpha is None:
            raise AttributeError(f"{type(self).__name__} has no alpha yet")
        # The step of the optimizer came after the last pass, so that α may lie beyond its bounds.
        if isinstance(alpha, nn.Parameter) and not torch.compiler.is_compiling() and not in_transform():
            self.project_()
        return alpha

    @property
    def alpha_rule(self) -> str:
        """How α moves."""
        return self.rule.name

    @property
    def target(self) -> float | None:
        """The loss of a layer at which `"ascent"` stops raising its α; None until the first passes set it."""
        target = float(self.alpha_target)
        return target if math.isfinite(target) else None

    @target.setter
    def target(self, target: float | None) -> None:
        if target is not None and not math.isfinite(target):
            raise ValueError(f"target must be a finite number or None, got {target}")
        self._finds_target = target is None
        self._target_passes = 0
        self._has_target = target is not None
        with torch.no_grad():
            self.alpha_target.fill_(math.inf if target is None else target)

    @property
    def is_active(self) -> bool:
        """Whether α is in play: False in the warm start."""
        return self._active

    @property
    def exchange(self) -> str:
        """The cross-sample term that calls add unless they name another."""
        return self.settings.exchange

    def parameter_groups(self, lr: float | None = None) -> list[dict[str, Any]]:
        """Give α to an optimizer in a group of its own, without weight decay, which would pull it to 0.

        ::

            optimizer = AdamW([{"params": model.parameters()}, *crit.parameter_groups(lr=1e-3)])

        Args:
            lr: α's learning rate; None is the optimizer's own.

        Returns:
            One group, or none under `"ramp"`, which does not train α.
        """
        alpha = self._parameters.get("alpha")
        if alpha is None:
            return []
        group: dict[str, Any] = {"params": [alpha], "weight_decay": 0.0}
        return [group if lr is None else {**group, "lr": lr}]

    def freeze(self) -> None:
        """Begin the warm start: α = 0 and not trained; calls return 0 and still record `layer_losses`."""
        self._set_active(False)
        self._froze = True
        with torch.no_grad():
            self.alpha.zero_()

    def activate(self) -> None:
        """End the warm start: α goes to `alpha_init` and is trained from here on (or ramped)."""
        if self._active:
            return
        self._set_active(True)
        self.steps.zero_()
        self._watch = AlphaWatch()
        if self._finds_target:
            self.target = None
        if self.alpha_rule != "ramp":
            with torch.no_grad():
                self.alpha.fill_(self.alpha_init)

    def project_(self) -> None:
        """Bring α back into its bounds, as every training pass and every reading of `alpha` does."""
        alpha = self._parameters.get("alpha")
        if alpha is None:
            return
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._watch.before_projection(alpha, self.rule)
        with torch.no_grad():
            alpha.clamp_(*self.rule.bounds)
        if not compiling:
            self._watch.after_projection(alpha)

    def forward(
        self,
        features: Tensor | Sequence[Tensor] | FeatureTaps,
        mask: Tensor | None = None,
        *,
        pairing: Tensor | None = None,
        domains: Tensor | None = None,
        generator: torch.Generator | None = None,
        exchange: str | None = None,
        group: dist.ProcessGroup | None = None,
        count_step: bool = True,
    ) -> Tensor:
        """Compute Σ_ℓ α_ℓ·L_ℓ, a scalar.

        Args:
            features: one tensor [N, C_l, *S_l] for each of the L layers, or the `FeatureTaps` that hold them.
            mask: [N, 1, *S0] or [N, *S0]; None takes the one that `taps.mask` was given.
            pairing, domains, generator: as for `fdkernels.feature_discrepancy_loss`.
            exchange: the cross-sample term of this call, `"none"`, `"shuffle"` or `"pooled"`; None is the
                module's own. `"none"` leaves the term out of a batch that cannot be paired, such as one of a
                single sample, or of a single domain under `"pooled"`.
            group: the ranks over whose R·N samples this call makes its pairs and means; None is the module's
                own. A process group exists only once it is initialised, often after the module was made.
            count_step: False computes the same loss, but α is not ramped and the pass does not count towards
                `steps` and `patience`. Give True for one part of an accumulated step and False for the
                others, so that a step of the optimizer counts once. Evaluation never counts, nor does a
                pass without gradients.

        Returns:
            A scalar in the dtype of the layers' losses, float32, or float64 if any layer is; 0 while frozen.

        Raises:
            ValueError: another number of layers, and what `feature_discrepancy_loss` raises.
        """
        settings = self.settings
        if exchange is not None:
            settings = settings._replace(exchange=exchange)
            settings.check()
        if group is not None:
            settings = settings._replace(group=group)
        else:
            self.check_group()
        inputs, alpha = check_inputs(features, mask, settings), self.alpha
        layers = inputs.layers
        if len(layers) != alpha.shape[0]:
            raise ValueError(
                f"features must have {alpha.shape[0]} layers, one for each alpha, got {len(layers)}"
            )
        if alpha.device != layers[0].device:
            raise ValueError(
                f"features must be on the device of alpha, {alpha.device}, got {layers[0].device}; "
                "move the module with crit.to(device)"
            )
        partners = Partners(pairing, domains, generator)
        taps = features if isinstance(features, FeatureTaps) else None
        trains = self.training and torch.is_grad_enabled() and not in_transform()
        if not self._active:
            if trains and count_step and not self._froze:
                self._watch.pass_by_frozen()
            with torch.no_grad():
                losses, _ = losses_per_layer(inputs, settings, partners, taps=taps)
            self.layer_losses = losses
            return losses.new_zeros(())
        if trains and count_step:
            self._begin_step(alpha, layers, settings)
        losses, _ = losses_per_layer(inputs, settings, partners, taps=taps)
        if not in_transform():  # what a transform has wrapped does not outlive it
            self.layer_losses = losses.detach()
        if trains and count_step and self._finds_target and self.alpha_rule == "ascent":
            self._find_target(losses.detach())
        return self._weigh(alpha, losses)

    def extra_repr(self) -> str:
        """The settings that `print(crit)` shows."""
        state = "active" if self._active else "frozen"
        return (
            f"num_layers={self.alpha.shape[0]}, alpha_rule={self.alpha_rule!r}, {state}, "
            f"convention={self.settings.convention.name!r}, exchange={self.settings.exchange!r}, "
            f"target={self.target}"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.project_()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **more: Any
    ) -> None:
        """Take up α, the phase and the target, also as earlier versions saved them."""
        earlier = state_dict.pop(prefix + "_extra_state", None)
        if isinstance(earlier, Mapping):
            phase = torch.full_like(self.active, bool(earlier["active"]))
            state_dict.setdefault(prefix + "active", phase)
            state_dict.setdefault(prefix + "alpha_target", self.alpha_target.detach().clone())
        fixed = None if self._finds_target else self.target
        super()._load_from_state_dict(state_dict, prefix, *arguments, **more)
        if self.active.is_meta:
            return
        self._set_active(bool(self.active))
        if fixed is None:
            self._has_target = self.target is not None
        else:
            self.target = fixed

    def _set_active(self, active: bool) -> None:
        self._active = active
        self.active.fill_(active)
        alpha = self._parameters.get("alpha")
        if alpha is not None:
            alpha.requires_grad_(active)

    def _weigh(self, alpha: Tensor, losses: Tensor) -> Tensor:
        # Clones, because the next pass may clamp α in place before this one's backward has run.
        if self.alpha_rule != "ascent":
            return alpha.clone().to(losses.dtype).dot(losses)
        alpha = alpha.to(losses.dtype)
        fixed = alpha.detach().clone()
        value = fixed.dot(losses)
        if not self._has_target:
            return value
        # (α - fixed) is zero: the second term only carries the gradient -(L - target) to α.
        return value - (alpha - fixed).dot(losses.detach() - self.alpha_target)

    def _find_target(self, losses: Tensor) -> None:
        """Lower the target to 1 below the lowest loss of a layer, in the first training passes."""
        compiling = torch.compiler.is_compiling()
        if not compiling:
            if self._target_passes == TARGET_PASSES:
                return
            self._target_passes += 1
        with torch.no_grad():
            lowest = losses.min().to(self.alpha_target.dtype) - 1
            first = (self.steps <= TARGET_PASSES) | self.alpha_target.isinf()
            found = torch.minimum(self.alpha_target, lowest)
            self.alpha_target.copy_(torch.where(first & lowest.isfinite(), found, self.alpha_target))
        self._has_target = True

    def _begin_step(self, alpha: Tensor, layers: Sequence[Tensor], settings: Settings) -> None:
        """Count a training pass over layers [N, C_l, *S_l], and move or project alpha [L]."""
        if not torch.compiler.is_compiling():
            grouped = settings.group is not None
            self._watch.pass_by(alpha, self.layer_losses, self.alpha_target, self.rule, layers, grouped)
        elif self.alpha_rule != "ramp":
            self.project_()
        if self.alpha_rule == "ramp":
            risen = (self.steps / self.ramp_steps).clamp(max=1)
            alpha.copy_(self.alpha_max * risen.expand_as(alpha))
        self.steps.add_(1)  # `+=` would assign the buffer anew, which nn.Module makes dear
