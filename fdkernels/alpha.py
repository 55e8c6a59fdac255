"""The rules by which the weights α of the layers move, and a watch that says when one does nothing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fdkernels import checks
from fdkernels.transforms import version_of

__all__ = ["ALPHA_RULES", "AlphaWatch", "Rule", "bounds_of"]

ALPHA_RULES = ("ascent", "descent", "clipped", "ramp")
# A warm start of so many training passes is worth a reminder.
LONG_WARM_START = 1000


def bounds_of(alpha_rule: str, alpha_max: float) -> tuple[float, float]:
    """Return the least and the greatest α that a rule allows.

    Raises:
        ValueError: alpha_max is not positive.
    """
    if alpha_rule == "descent":
        return -float("inf"), float("inf")
    if alpha_rule == "clipped":
        return 0.0, 1.0
    if not alpha_max > 0:
        raise ValueError(f"alpha_max must be positive, got {alpha_max}")
    return 0.0, float(alpha_max)


class Rule(NamedTuple):
    """How α moves: the rule's name, its bounds, and after how many passes a still α is looked into."""

    name: str
    bounds: tuple[float, float]
    patience: int


class _Look(NamedTuple):
    """α, L, the target and whether α had left its bounds, [4, L] on the host once `event` has come."""

    values: Tensor
    stepped: bool
    event: torch.cuda.Event | None

    def is_there(self) -> bool:
        return self.event is None or self.event.query()


class AlphaWatch:
    """Warn about weights that do nothing: never stepped, held at 0, of detached features, or one a rank.

    Looks every `patience` counted passes and compares with the look before. On a GPU the values travel to
    pinned memory and are compared at the next look, so that nothing waits for the device. Names each layer
    and says each other thing once.
    """

    def __init__(self) -> None:
        self._passes = 0
        self._version: int | None = None
        self._stepped = False
        self._left: Tensor | None = None  # whether α left its bounds before this look, a scalar
        self._looks: list[_Look] = []
        self._rose: Tensor | None = None
        self._said: set[object] = set()
        self._frozen_passes = 0

    def __reduce__(self) -> tuple[type[AlphaWatch], tuple[()]]:
        """Copy and pickle as a fresh one: a copy of the module goes its own way."""
        return AlphaWatch, ()

    def before_projection(self, alpha: Tensor, rule: Rule) -> None:
        """Notice a step of the optimizer: a change of α [L] in place that is not the projection's own.

        Fused optimizers and others count no change; theirs is seen where it took α out of its bounds.
        """
        if self._version is not None and version_of(alpha) != self._version:
            self._stepped = True
        elif self._passes and self._passes % rule.patience == 0 and not _is_captured(alpha):
            low, high = rule.bounds
            left = ((alpha.detach() < low) | (alpha.detach() > high)).any()
            self._left = left if self._left is None else self._left | left

    def after_projection(self, alpha: Tensor) -> None:
        """Leave the change of α [L] by the projection out of account."""
        self._version = version_of(alpha)

    def pass_by(
        self,
        alpha: Tensor,
        losses: Tensor | None,
        target: Tensor,
        rule: Rule,
        layers: Sequence[Tensor],
        grouped: bool,
    ) -> None:
        """Count a training pass; every `patience` of them, look.

        Args:
            alpha: [L], projected.
            losses: [L] of the pass before, or None.
            target: a scalar, inf where there is none.
            rule: how α moves.
            layers: the features of the pass, [N, C_l, *S_l] each.
            grouped: whether the loss is that of a group of ranks, which gives all of them one gradient.
        """
        if self._passes % rule.patience == 0 and not _is_captured(alpha):
            if self._passes and "detached" not in self._said and checks.warn_if_detached(layers):
                self._said.add("detached")
            if rule.name != "ramp":
                if not grouped:
                    self._warn_of_ranks(alpha)
                self._look(alpha.detach(), losses, target, rule)
        self._passes += 1

    def pass_by_frozen(self) -> None:
        """Count a training pass of a warm start; after many of them, call to mind that it is to end."""
        if torch.compiler.is_compiling():
            return
        self._frozen_passes += 1
        if self._frozen_passes == LONG_WARM_START:
            self._warn(
                "frozen",
                f"the feature discrepancy loss has been frozen (active=False) for {LONG_WARM_START} training "
                "passes and adds 0 to the loss; call crit.activate() to end the warm start, or "
                "crit.freeze() if it is meant to last.",
            )

    def _look(self, alpha: Tensor, losses: Tensor | None, target: Tensor, rule: Rule) -> None:
        losses = torch.full_like(alpha, float("nan")) if losses is None else losses.to(alpha.dtype)
        left = alpha.new_zeros(()) if self._left is None else self._left.to(alpha.dtype)
        values = torch.stack([alpha, losses, target.to(alpha.dtype).expand_as(alpha), left.expand_as(alpha)])
        event = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._looks = [*self._looks[-2:], _Look(values, self._stepped, event)]
        self._stepped, self._left = False, None
        ready = self._looks if event is None else self._looks[:-1]
        if len(ready) >= 2 and ready[-2].is_there() and ready[-1].is_there():
            self._judge(ready[-2], ready[-1], rule)

    def _judge(self, before: _Look, now: _Look, rule: Rule) -> None:
        alpha, losses, target, left = now.values
        still = alpha == before.values[0]  # [L]
        if not now.stepped and not left.any() and still.all():
            self._warn(
                "optimizer",
                f"alpha has not been stepped in {rule.patience} training passes, so the weights of the "
                "feature discrepancy loss do not train: give crit.parameter_groups() to the optimizer. "
                "(Where gradients of several passes make one step, pass count_step=False for all but one.)",
            )
            return
        risen = (alpha != 0) | (before.values[0] != 0)
        self._rose = risen if self._rose is None else self._rose | risen
        # Under ascent an α that comes back to 0 has done its work; under "clipped" it stays there for good.
        held = still & (alpha == 0) & (~self._rose if rule.name == "ascent" else ~risen)
        held = held & (rule.name != "descent")
        layers = [index for index in held.nonzero().flatten().tolist() if index not in self._said]
        if layers:
            self._said.update(layers)
            reasons = "; ".join(
                f"alpha[{index}], {_reason(float(losses[index]), float(target[index]), rule)}"
                for index in layers
            )
            self._warn(
                None,
                f"alpha has stayed at 0 for {rule.patience} training passes in {len(layers)} of "
                f"{len(alpha)} layers, where the feature discrepancy loss does nothing: {reasons}.",
            )
        if (still & (alpha >= rule.bounds[1])).all():
            self._warn(
                "upper",
                f"every alpha has stayed at a bound of {list(rule.bounds)} for {rule.patience} training "
                f"passes under alpha_rule={rule.name!r}, so the weights of the layers no longer train; "
                "raise alpha_max if the loss should weigh more.",
            )

    def _warn_of_ranks(self, alpha: Tensor) -> None:
        """Warn where each rank would train an α of its own."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        # DistributedDataParallel around the module averages the gradient; a sharded α is torch's to care for.
        inside = getattr(DistributedDataParallel, "_active_ddp_module", None) is not None
        if inside or not alpha.requires_grad or type(alpha.data) is not Tensor:
            return
        self._warn(
            "ranks",
            f"torch.distributed runs {dist.get_world_size()} ranks, and nothing keeps alpha the same on "
            "every rank: pass group=torch.distributed.group.WORLD for the loss of the whole batch, or wrap "
            "the module in DistributedDataParallel, or average alpha.grad over the ranks yourself.",
        )

    def _warn(self, once: str | None, text: str) -> None:
        if once is not None and once in self._said:
            return
        self._said.add(once)
        warnings.warn(text, stacklevel=8)


def _is_captured(tensor: Tensor) -> bool:
    """Whether the work on a tensor of any shape goes into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _reason(loss: float, target: float, rule: Rule) -> str:
    """Say why α stays at 0."""
    if rule.name == "clipped" and loss > 0:
        return f"whose loss is {loss:.4g}: 'clipped' never leaves 0 where a layer's loss is positive"
    if rule.name == "ascent" and loss <= target:
        return (
            f"whose loss {loss:.4g} is not above target={target:.4g} (lower it, or let target=None find one)"
        )
    return f"whose loss is {loss:.4g}, though the rule would move it; is its learning rate 0?"
