"""The loss as a module that owns a trainable weight α for every layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fdkernels import checks
from fdkernels.conventions import Convention, get_convention
from fdkernels.loss import Partners, Settings, check_features_and_mask, losses_per_layer
from fdkernels.taps import FeatureTaps

__all__ = ["ALPHA_RULES", "FeatureDiscrepancyLoss"]

ALPHA_RULES = ("ascent", "descent", "clipped", "ramp")


class FeatureDiscrepancyLoss(nn.Module):
    """Add up α_ℓ·L_ℓ over the layers of a network, with one α a layer: `crit(features, mask)`.

    The gradient of α·L with respect to α is L itself. Where L > 0, plain descent drives α below zero or,
    clipped at 0, never lets it leave 0, and the loss silently does nothing. So the rule is a choice:

    - `"ascent"`: dual ascent, α ← α + lr·(L - target) within [0, alpha_max]; the layer's weight grows while
      its loss is above the target. The sign is turned inside the module, so that any optimizer that
      descends does the right thing. A network with batch norm soon has L < 0: give it a target below the
      `layer_losses` that it starts with.
    - `"descent"`: α ← α - lr·L, to the letter and without bounds.
    - `"clipped"`: descent clipped to [0, 1], as the authors' code has it.
    - `"ramp"`: α rises linearly from 0 to alpha_max over `ramp_steps` training passes; it is not trained.

    Give α to the optimizer: `optimizer = Adam([*model.parameters(), *crit.parameters()])`. Every `patience`
    training passes the module checks whether every α is stuck at a bound, and warns once.

    Args:
        num_layers: L, the number of layers.
        alpha_rule: one of the rules above.
        alpha_init: α of every layer at the start of its training.
        alpha_max: the upper bound of `"ascent"` and the end of `"ramp"`.
        target: the loss of a layer at which `"ascent"` stops raising its α.
        ramp_steps: how many training passes `"ramp"` takes.
        active: False starts in the paper's first phase (warm start): α = 0 and frozen until `activate()`.
        patience: how many training passes α may stay at a bound before the warning.
        convention, exchange, group, mask_resize, ignore_index, eps, backend: as for
            `fdkernels.feature_discrepancy_loss`.
        reduction: `"mean"` or `"sum"` over the samples of a layer.

    Attributes:
        alpha: [L], a parameter, or a buffer under `"ramp"`.
        layer_losses: [L], L of every layer in the last call, detached; None before the first.
        exchange: the cross-sample term that calls add unless they name another.

    Raises:
        ValueError: num_layers below 1, an unknown name, a bound out of order.
    """

    alpha: Tensor
    steps: Tensor

    def __init__(
        self,
        num_layers: int,
        alpha_rule: str = "ascent",
        *,
        alpha_init: float = 0.0,
        alpha_max: float = 1.0,
        target: float = 0.0,
        ramp_steps: int = 1000,
        active: bool = True,
        patience: int = 25,
        convention: str | Convention = "paper",
        exchange: str = "none",
        group: dist.ProcessGroup | None = None,
        mask_resize: str | None = None,
        ignore_index: float | None = None,
        eps: float = 1e-12,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if isinstance(num_layers, bool) or not isinstance(num_layers, int):
            raise TypeError(f"num_layers must be an integer, got {type(num_layers).__name__}")
        for name, count in (
            ("num_layers", num_layers),
            ("ramp_steps", ramp_steps),
            ("patience", patience),
        ):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        checks.one_of("alpha_rule", alpha_rule, ALPHA_RULES)
        checks.one_of("reduction", reduction, ("mean", "sum"))
        self.bounds = _bounds(alpha_rule, alpha_max)
        if not self.bounds[0] <= alpha_init <= self.bounds[1]:
            raise ValueError(
                f"alpha_init must be within {list(self.bounds)} for alpha_rule={alpha_rule!r}, "
                f"got {alpha_init}"
            )
        self.alpha_rule = alpha_rule
        self.alpha_init = float(alpha_init)
        self.alpha_max = float(alpha_max)
        self.target = float(target)
        self.ramp_steps = ramp_steps
        self.patience = patience
        self.settings = Settings(
            get_convention(convention),
            exchange,
            mask_resize,
            ignore_index,
            eps,
            reduction,
            group,
            backend,
        )
        self.settings.check()
        if not math.isfinite(target):
            raise ValueError(f"target must be a finite number, got {target}")
        start = torch.full((num_layers,), 0.0 if alpha_rule == "ramp" else self.alpha_init)
        if alpha_rule == "ramp":
            self.register_buffer("alpha", start)
        else:
            self.alpha = nn.Parameter(start)
        self.layer_losses: Tensor | None = None
        # Training passes since alpha became active; a buffer, so that a compiled pass counts as well.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._active = True
        self._watch = _StuckWatch()
        if not active:
            self.freeze()

    @property
    def is_active(self) -> bool:
        """Whether α is in play: False in the warm start."""
        return self._active

    @property
    def exchange(self) -> str:
        """The cross-sample term that calls add unless they name another."""
        return self.settings.exchange

    def freeze(self) -> None:
        """Begin the warm start: α = 0 and not trained; calls return 0 and still record `layer_losses`."""
        self._active = False
        with torch.no_grad():
            self.alpha.zero_()
        self.alpha.requires_grad_(False)

    def activate(self) -> None:
        """End the warm start: α goes to `alpha_init` and is trained from here on (or ramped)."""
        if self._active:
            return
        self._active = True
        self.steps.zero_()
        self._watch = _StuckWatch()
        if self.alpha_rule != "ramp":
            with torch.no_grad():
                self.alpha.fill_(self.alpha_init)
            self.alpha.requires_grad_(True)

    def project_(self) -> None:
        """Bring α back into its bounds, as every training pass does first; call it to read α after a step."""
        with torch.no_grad():
            self.alpha.clamp_(*self.bounds)

    def forward(
        self,
        features: Tensor | Sequence[Tensor] | FeatureTaps,
        mask: Tensor,
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
            mask: [N, 1, *S0] or [N, *S0].
            pairing, domains, generator: as for `fdkernels.feature_discrepancy_loss`.
            exchange: the cross-sample term of this call, `"none"`, `"shuffle"` or `"pooled"`; None is the
                module's own. `"none"` leaves the term out of a batch that cannot be paired, such as one of a
                single sample, or of a single domain under `"pooled"`.
            group: the ranks over whose R·N samples this call makes its pairs and means; None is the module's
                own. A process group exists only once it is initialised, often after the module was made.
            count_step: False computes the same loss, but α is not projected or ramped and the pass does not
                count towards `steps` and `patience`. Give True for one part of an accumulated step and False
                for the others, so that a step of the optimizer counts once. Evaluation never counts.

        Returns:
            A scalar in the dtype of the layers' losses, float32, or float64 if any layer is; 0 while frozen.

        Raises:
            ValueError: another number of layers, and what `feature_discrepancy_loss` raises.
        """
        settings = self.settings
        if exchange is not None:
            settings = settings._replace(exchange=exchange)
        if group is not None:
            settings = settings._replace(group=group)
        layers, mask = check_features_and_mask(features, mask, settings)
        if len(layers) != self.alpha.shape[0]:
            raise ValueError(
                f"features must have {self.alpha.shape[0]} layers, one for each alpha, got {len(layers)}"
            )
        if self.alpha.device != layers[0].device:
            raise ValueError(
                f"features must be on the device of alpha, {self.alpha.device}, got {layers[0].device}; "
                "move the module with crit.to(device)"
            )
        partners = Partners(pairing, domains, generator)
        if not self._active:
            with torch.no_grad():
                losses, _ = losses_per_layer(layers, mask, settings, partners)
            self.layer_losses = losses
            return losses.new_zeros(())
        if self.training and count_step:
            self._begin_step()
        taps = features if isinstance(features, FeatureTaps) else None
        losses, _ = losses_per_layer(layers, mask, settings, partners, taps=taps)
        self.layer_losses = losses.detach()
        return self._weigh(losses)

    def extra_repr(self) -> str:
        """The settings that `print(crit)` shows."""
        state = "active" if self._active else "frozen"
        return (
            f"num_layers={self.alpha.shape[0]}, alpha_rule={self.alpha_rule!r}, {state}, "
            f"convention={self.settings.convention.name!r}, exchange={self.settings.exchange!r}"
        )

    def get_extra_state(self) -> dict[str, Any]:
        """The phase, so that a resumed run goes on where it stopped."""
        return {"active": self._active}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the phase; α and the number of steps are in the state dict themselves."""
        self._active = bool(state["active"])
        if self.alpha_rule != "ramp":
            self.alpha.requires_grad_(self._active)

    def _weigh(self, losses: Tensor) -> Tensor:
        if self.alpha_rule != "ascent":
            # A clone, because the next pass may clamp α in place before this one's backward has run.
            return (self.alpha.clone().to(losses.dtype) * losses).sum()
        alpha = self.alpha.to(losses.dtype)
        fixed = alpha.detach().clone()
        # (α - fixed) is zero: the second term only carries the gradient -(L - target) to α.
        return (fixed * losses).sum() - ((alpha - fixed) * (losses.detach() - self.target)).sum()

    def _begin_step(self) -> None:
        if self.alpha_rule == "ramp":
            risen = (self.steps / self.ramp_steps).clamp(max=1)
            self.alpha.copy_(self.alpha_max * risen.expand_as(self.alpha))
        else:
            self.project_()
            if not torch.compiler.is_compiling():
                self._watch.pass_by(self.alpha, self.bounds, self.alpha_rule, self.patience)
        self.steps += 1


def _bounds(alpha_rule: str, alpha_max: float) -> tuple[float, float]:
    if alpha_rule == "descent":
        return -float("inf"), float("inf")
    if alpha_rule == "clipped":
        return 0.0, 1.0
    if not alpha_max > 0:
        raise ValueError(f"alpha_max must be positive, got {alpha_max}")
    return 0.0, float(alpha_max)


class _StuckWatch:
    """Notice that no α has moved from a bound between two looks.

    On a GPU a look leaves its verdict in pinned memory and the next look reads it, so that nothing waits
    for the device.
    """

    def __init__(self) -> None:
        self._passes = 0
        self._last: Tensor | None = None
        self._verdict: Tensor | None = None
        self._warned = False

    def pass_by(self, alpha: Tensor, bounds: tuple[float, float], rule: str, patience: int) -> None:
        """Count a training pass; every `patience` of them, look."""
        if self._passes % patience == 0:
            self._look(alpha, bounds, rule, patience)
        self._passes += 1

    def _look(self, alpha: Tensor, bounds: tuple[float, float], rule: str, patience: int) -> None:
        if self._warned or (alpha.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        alpha = alpha.detach()
        if self._verdict is not None and alpha.is_cuda:
            self._warn_if(bool(self._verdict), bounds, rule, patience)
        if self._last is not None:
            at_bound = (alpha <= bounds[0]) | (alpha >= bounds[1]) | (alpha == 0)
            stuck = (at_bound & (alpha == self._last)).all()
            if alpha.is_cuda:
                self._verdict = torch.zeros((), dtype=torch.bool, pin_memory=True)
                self._verdict.copy_(stuck, non_blocking=True)
            else:
                self._warn_if(bool(stuck), bounds, rule, patience)
        self._last = alpha.clone()

    def _warn_if(self, stuck: bool, bounds: tuple[float, float], rule: str, patience: int) -> None:
        if not stuck:
            return
        self._warned = True
        warnings.warn(
            f"every alpha has stayed at a bound of {list(bounds)} or at 0 for {patience} training passes "
            f"under alpha_rule={rule!r}, so the weights of the feature discrepancy loss do not train. Is "
            "crit.alpha in the optimizer? 'clipped' never leaves 0 where a layer's loss is positive; "
            "'ascent' raises alpha only where it is above `target` (see crit.layer_losses).",
            stacklevel=6,
        )
