"""Adds α to an optimizer that others made, and to the schedules of its learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from fdkernels.criterion import FeatureDiscrepancyLoss

__all__ = ["add_alpha_group"]

# What torch's schedulers keep for each group: in themselves, and in the group.
_RATES = ("base_lrs", "_last_lr", "min_lrs", "max_lrs")
_OTHERS = ("lr_lambdas", "base_momentums", "max_momentums")
_RATES_OF_GROUP = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")


def add_alpha_group(
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[Any],
    criterion: FeatureDiscrepancyLoss,
    lr: float | None = None,
) -> None:
    """Give α to the first optimizer in a group of its own, without weight decay, unless one has it already.

    The group takes its other options from the optimizer's first group, and its learning rate is always the
    same multiple of that group's, so that it follows the same schedule.

    Args:
        optimizers: of the network.
        schedulers: of their learning rates, torch's; others are left alone.
        criterion: owns α; under `alpha_rule="ramp"` nothing trains it, and nothing is added.
        lr: α's learning rate where the first group has its initial one, or its `max_lr`; None is that one.
    """
    optimizer = optimizers[0]
    known = {
        id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]
    }
    for group in criterion.parameter_groups():
        if any(id(parameter) in known for parameter in group["params"]):
            continue
        first = optimizer.param_groups[0]
        usual = first.get("max_lr", first.get("initial_lr", first["lr"]))
        factor = 1.0 if lr is None else lr / usual
        options = {key: value for key, value in first.items() if key not in ("params", "param_names", "name")}
        for key in _RATES_OF_GROUP:
            if key in options:
                options[key] = options[key] * factor
        if "weight_decay" in options:
            options["weight_decay"] = 0.0
        if "param_names" in first:
            options["params"] = [("alpha", parameter) for parameter in group["params"]]
        else:
            options["params"] = group["params"]
        optimizer.add_param_group(options)
        for scheduler in schedulers:
            _follow(scheduler, optimizer, factor)


def _follow(scheduler: Any, optimizer: Optimizer, factor: float) -> None:
    """Let a scheduler, and those that it holds, move the last group as it moves the first."""
    for inner in getattr(scheduler, "_schedulers", ()):
        _follow(inner, optimizer, factor)
    if getattr(scheduler, "optimizer", None) is not optimizer:
        return
    for name in (*_RATES, *_OTHERS):
        of_groups = getattr(scheduler, name, None)
        if isinstance(of_groups, list) and len(of_groups) == len(optimizer.param_groups) - 1:
            of_groups.append(of_groups[0] * factor if name in _RATES else of_groups[0])
