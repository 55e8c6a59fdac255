"""The checked arguments of a call, and what calls of their kind share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdkernels import backend as backends
from fdkernels import checks, geometry
from fdkernels.classes import Planes, check_class_mask
from fdkernels.conventions import Options
from fdkernels.op.pyramid import Pyramid, describe
from fdkernels.op.weights import WeightsPlan, plan_weights
from fdkernels.settings import Settings, resize_of
from fdkernels.taps import FeatureTaps
from fdkernels.transforms import in_transform, unwrap_dead

__all__ = ["Inputs", "Plan", "check_inputs"]


class Plan(NamedTuple):
    """What follows from layers, mask and settings without their values.

    Attributes:
        backend: the name of the one that computes.
        pyramid: the layers.
        sizes: S_l of each.
        weights: how the mask is resized to them; None for several classes.
        options: how sums become the loss of each layer.
        combining: the same with the share of each layer in the loss of all.
        is_eager: whether no compiler and no transform sees the call.
        accepts: whether the values of a mask [N, 1, *S0] are valid, by a kernel; None where no kernel reads
            it, or it can hold only 0 and 1.
    """

    backend: str
    pyramid: Pyramid
    sizes: list[torch.Size]
    weights: WeightsPlan | None
    options: Options
    combining: Options
    is_eager: bool
    accepts: Callable[[Tensor], bool] | None


class Inputs(NamedTuple):
    """Checked layers and their mask.

    Attributes:
        layers: [N, C_l, *S_l] for each of L layers.
        planes: the mask.
        plan: what calls of their kind share.
    """

    layers: list[Tensor]
    planes: Planes
    plan: Plan


# Of the calls whose layers, mask and settings have passed the checks; a network has few kinds.
_plans: dict[Hashable, Plan] = {}
_MOST_PLANS = 64


def check_inputs(
    features: Tensor | Sequence[Tensor] | FeatureTaps, mask: Tensor | None, settings: Settings
) -> Inputs:
    """Check features and mask; of a kind that was seen before only the values of the mask.

    Without a mask it is the one that taps were given before the forward pass.
    """
    given_mask: Any = mask  # None is refused below, as what is no tensor
    if mask is None and isinstance(features, FeatureTaps):
        given_mask = features.given_mask
        if given_mask is None:
            raise TypeError(
                "mask must be given, here or to the taps: with taps.mask(mask): logits = model(images); "
                "got None"
            )
    given = features.features_for_loss() if isinstance(features, FeatureTaps) else features
    kind, plan = _look_up(given, given_mask, settings)
    if plan is not None:
        layers = [unwrap_dead(layer) for layer in ([given] if isinstance(given, Tensor) else given)]
        return Inputs(layers, _known_planes(unwrap_dead(given_mask), layers, settings, plan), plan)
    layers = checks.as_layers(given)
    # Not `layers is not given`, which torch 2.6 compiles to a comparison of tensors.
    channels_last = settings.channel_dim not in (1, 1 - layers[0].dim())
    layers = geometry.channels_first(layers, settings.channel_dim)
    check = backends.mask_check(given_mask)
    planes = _planes(given_mask, layers, settings, check)
    geometry.check_aspect(planes.values, layers, settings.aspect, channels_last)
    plan = _make_plan(layers, planes, settings, check)
    if kind is not None:
        if len(_plans) == _MOST_PLANS:
            _plans.clear()
        _plans[kind] = plan
    return Inputs(layers, planes, plan)


def _make_plan(
    layers: list[Tensor], planes: Planes, settings: Settings, check: checks.MaskCheck | None
) -> Plan:
    """The plan of checked layers [N, C_l, *S_l] and planes [N, K, *S0]."""
    values, ignored = planes.values, planes.ignored
    backend = backends.resolve(settings.backend, layers[0].device)
    pyramid, sizes = describe(layers), [layer.shape[2:] for layer in layers]
    is_eager = not torch.compiler.is_compiling() and not in_transform()
    weights = accepts = None
    if settings.classes.is_binary:
        weights = plan_weights(values, sizes, pyramid.dtype, resize_of(settings), ignored, backend)
        if is_eager and check is not None and values.dtype != torch.bool:
            accepts = check(values, ignored)
    convention, kind = settings.convention, (settings.exchange, settings.reduction, settings.eps)
    share = 1 / len(layers) if settings.reduction == "mean" else 1.0
    return Plan(
        backend=backend,
        pyramid=pyramid,
        sizes=sizes,
        weights=weights,
        options=convention.options(*kind),
        combining=convention.options(*kind, share),
        is_eager=is_eager,
        accepts=accepts,
    )


def _look_up(given: Any, mask: Any, settings: Settings) -> tuple[Hashable | None, Plan | None]:
    """All on which the checks and the plan depend, and the plan where such a call was seen before.

    None where it has to be looked at again in each call.
    """
    # A process group must not outlive its owner, and channels elsewhere make other tensors of the layers.
    is_plain = settings.group is None and settings.channel_dim == 1 and settings.classes.is_binary
    is_plain = is_plain and settings.channel_dim is not True  # which equals 1, and is refused
    if not is_plain or torch.compiler.is_compiling() or in_transform():
        return None, None
    layers = [given] if isinstance(given, Tensor) else given
    if not isinstance(layers, (list, tuple)):
        return None, None
    try:
        of_layers = [(layer.shape, layer.stride(), layer.dtype, layer.device) for layer in layers]
        of_mask = mask.layout, mask.is_neg(), mask.shape, mask.stride(), mask.dtype, mask.device
        kind = settings, backends.selected(), checks.is_debugging(), type(mask), of_mask, *of_layers
        return kind, _plans.get(kind)
    except (AttributeError, TypeError, RuntimeError):  # no tensors, no strides, sizes that stay symbolic
        return None, None


def _planes(
    mask: Any,
    layers: list[Tensor],
    settings: Settings,
    check: checks.MaskCheck | None,
) -> Planes:
    """The checked mask as planes [N, K, *S0] for layers [N, C_l, *S_l]."""
    ignore_index = settings.ignore_index
    if not settings.classes.is_binary:
        return check_class_mask(mask, layers, settings.classes, ignore_index)
    return _of_one_class(checks.check_mask(mask, layers, ignore_index, check), settings)


def _known_planes(mask: Tensor, layers: list[Tensor], settings: Settings, plan: Plan) -> Planes:
    """The same for a mask of a kind that was seen before, of which only the values are checked."""
    ignore_index = settings.ignore_index
    if ignore_index is not None:  # True equals 1, and only one of them is a number here
        checks.check_ignore_index(ignore_index, mask.dtype)
    values = mask if mask.dim() == layers[0].dim() else mask.unsqueeze(1)
    if plan.accepts is None or not plan.accepts(values):
        checks.check_plane_values(values, ignore_index, None)
    return _of_one_class(values, settings)


def _of_one_class(values: Tensor, settings: Settings) -> Planes:
    """The planes of a checked mask [N, 1, *S0]."""
    return Planes(values, settings.ignore_index, selects=settings.ignore_index is not None)
