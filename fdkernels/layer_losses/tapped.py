"""The loss of tapped layers whose gradient is written where the gradient of the network arrives.

A tap lies in the network before the mask is known. So it puts out, beside the features, a stand-in for their
region sums, whose values are never looked at: the loss computes the sums of all layers in one forward and
is, to autograd, a function of the stand-ins. Their gradient is g of (R3). Autograd runs the backward of a
tap when g is there and the gradient that arrives at the features, and it writes their sum in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdkernels import backend as backends
from fdkernels.layer_losses.api import through_log_norm
from fdkernels.layer_masks import LayerMasks
from fdkernels.log_norm.options import Options
from fdkernels.region_sums import geometry as geo

__all__ = ["FusedTap", "Place", "Weights", "tapped_layer_losses", "tapped_region_sums"]


class Weights(NamedTuple):
    """What the backward of one tap needs beside g: the weights [N, P] of its layer, and the backend."""

    fg: Tensor
    bg: Tensor | None
    backend: str


class Place:
    """Where the loss, or its backward, leaves the weights of a layer for the backward of its tap."""

    weights: Weights | None = None


class FusedTap(torch.autograd.Function):
    """Features to themselves and a stand-in [2, N, C] for their region sums."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        ctx.place, ctx.geometry = place, geo.geometry_of(features)
        ctx.set_materialize_grads(False)
        stand_in = features.new_empty((2, *features.shape[:2]), dtype=geo.accumulate_dtype([features]))
        return features.view_as(features), stand_in

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, grad_sums: Tensor | None) -> tuple[Tensor | None, None]:
        if grad_sums is None:
            return upstream, None
        # Left there by the loss or by its backward, which autograd runs first.
        fg, bg, backend = ctx.place.weights
        backgrounds, added = [] if bg is None else [bg], [] if upstream is None else [upstream]
        if torch.is_grad_enabled() or not backends.may_call_directly([grad_sums, fg, *backgrounds, *added]):
            grads = torch.ops.fdkernels.region_sums_backward(
                grad_sums, [fg], backgrounds, added, [0] * len(added), [], geo.pack([ctx.geometry]), backend
            )[0]
        else:
            stage = backends.implementation("region_sums", backend)
            grads = stage.backward(grad_sums, [fg], backgrounds, added, [], [ctx.geometry])[0]
        return grads[0], None


class _TappedLosses(torch.autograd.Function):
    """Stand-ins to losses [L]; the features are read, and are nothing to autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Sequence[Tensor],
        places: Sequence[Place | None],
        has_bg: bool,
        options: Options,
        pairing: Tensor | None,
        backend: str,
        *tensors: Tensor | None,
    ) -> Tensor:
        num_layers = len(features)
        stand_ins, weights = tensors[:num_layers], tensors[num_layers:]
        fg, bg = weights[:num_layers], weights[num_layers:]
        if backends.may_call_directly(features):
            stage = backends.implementation("layer_losses", backend)
            outputs = stage.forward(features, fg, bg, pairing, options, True)
        else:
            outputs = torch.ops.fdkernels.layer_losses_forward(
                features, fg, bg, pairing, True, *options, backend
            )
        loss, sums, masses, slopes = outputs
        ctx.save_for_backward(slopes, sums, masses, pairing, *stand_ins, *weights)
        ctx.geometry = [geo.geometry_of(layer) for layer in features]
        ctx.places, ctx.has_bg, ctx.options, ctx.backend = places, has_bg, options, backend
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        num_layers = len(ctx.places)
        slopes, sums, masses, pairing, *rest = ctx.saved_tensors
        stand_ins, fg = rest[:num_layers], rest[num_layers : 2 * num_layers]
        bg = rest[2 * num_layers :] if ctx.has_bg else [None] * num_layers
        channels = [layer.shape[1] for layer in ctx.geometry]
        if torch.is_grad_enabled():
            sums = torch.cat(
                [
                    part if stand_in is None else _InPlaceOf.apply(part, stand_in)
                    for part, stand_in in zip(sums.split(channels, dim=-1), stand_ins, strict=True)
                ],
                dim=-1,
            )
            grads = through_log_norm(ctx, grad_loss, sums, masses, pairing).split(channels, dim=-1)
        else:
            parts = slopes.split(channels, dim=-1)
            grads = [part * grad for part, grad in zip(parts, grad_loss.unbind(), strict=True)]  # (F2)
        for place, layer_fg, layer_bg in zip(ctx.places, fg, bg, strict=True):
            if place is not None:
                place.weights = Weights(layer_fg, layer_bg, ctx.backend)
        of_stand_ins = (
            None if stand_in is None else grad for stand_in, grad in zip(stand_ins, grads, strict=True)
        )
        return (*([None] * 6), *of_stand_ins, *([None] * (len(rest) - num_layers)))


class _InPlaceOf(torch.autograd.Function):
    """The values of sums as if they were those of their stand-in, for second derivatives."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, stand_in: Tensor) -> Tensor:
        return sums.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def tapped_layer_losses(
    features: Sequence[Tensor],
    stand_ins: Sequence[Tensor | None],
    places: Sequence[Place | None],
    masks: LayerMasks,
    pairing: Tensor | None,
    options: Options,
    backend: str,
) -> Tensor:
    """The loss of every layer [L], whose gradient goes to the taps.

    Args:
        features: what each `FusedTap` put out.
        stand_ins: what it put out beside them; None for a layer that asks for no gradient.
        places: the place that it was given, likewise.
        masks, pairing, options, backend: as for `fused_layer_losses`.
    """
    loss: Tensor = _TappedLosses.apply(
        features, places, bool(masks.bg), options, pairing, backend, *stand_ins, *masks.fg, *masks.bg
    )
    return loss


def tapped_region_sums(
    features: Sequence[Tensor],
    stand_ins: Sequence[Tensor | None],
    places: Sequence[Place | None],
    masks: LayerMasks,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Sums [2, N, ΣC] and masses [2, N, L] of which a loss is made elsewhere; the gradient goes to the taps.

    For losses of which the kernels of one process know only a part: those of a group of ranks, or entries
    without reduction. The arguments are those of `tapped_layer_losses`.
    """
    channels = [layer.shape[1] for layer in features]
    with torch.no_grad():
        sums, masses = torch.ops.fdkernels.region_sums_forward(list(features), masks.fg, masks.bg, backend)
    parts = [
        part if stand_in is None else _InPlaceOf.apply(part, stand_in)
        for part, stand_in in zip(sums.split(channels, dim=-1), stand_ins, strict=True)
    ]
    for index, place in enumerate(places):
        if place is not None:
            place.weights = Weights(masks.fg[index], masks.bg[index] if masks.bg else None, backend)
    return torch.cat(parts, dim=-1), masses
