"""The road of a call: from features, a mask and settings to the loss of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdkernels.exchange import Ranks, draw_pairing, gather_batch, ranks_of
from fdkernels.inputs import Inputs
from fdkernels.op.autograd import Call, run_pass
from fdkernels.op.entries import GatheredSums, losses_of_regions
from fdkernels.op.loss_formulas import losses_of, wide
from fdkernels.op.pyramid import Regions
from fdkernels.op.region_pass import RegionCall, pivots_of, regions_of, run_regions
from fdkernels.op.tapped import FromSums, FromTaps, RegionsFromTaps
from fdkernels.op.transformed import refuse_group, run_transformed
from fdkernels.op.weights import make_weights
from fdkernels.settings import Settings, has_two_regions, resize_of
from fdkernels.taps import FeatureTaps
from fdkernels.taps.early import EarlyMask
from fdkernels.taps.graph_sums import GraphSums
from fdkernels.transforms import apply_plainly, in_transform

__all__ = ["Partners", "losses_per_layer", "region_sums_of"]


class Partners(NamedTuple):
    """The sample pairs of the exchange term, or how to draw them."""

    pairing: Tensor | None = None
    domains: Tensor | None = None
    generator: torch.Generator | None = None


def region_sums_of(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """Sum layers [N, C_l, *S_l] over foreground and background, of each class if there are several.

    Returns:
        Sums [2, N, ΣC] and masses [2, N, L]; of several classes [2, N, E, ΣC] and [2, N, E, L].
    """
    layers, planes, plan = inputs
    backend, pyramid = plan.backend, plan.pyramid
    if plan.weights is not None:
        weights = make_weights(planes.values, plan.weights)
        run = run_transformed if in_transform() else run_pass
        sums, masses = run(Call(backend, pyramid), layers, weights, None)
        return sums, masses
    regions = regions_of(planes, plan.sizes, pyramid.dtype, resize_of(settings), settings.classes, backend)
    sums, masses = run_regions(RegionCall(backend, pyramid, regions.selects), layers, regions)
    of_sums, of_masses = (torch.stack(settings.classes.sides(of)).transpose(1, 2) for of in (sums, masses))
    return of_sums, of_masses


def losses_per_layer(
    inputs: Inputs,
    settings: Settings,
    partners: Partners,
    tapped: bool = False,
    taps: FeatureTaps | None = None,
    combines: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss of each layer from checked arguments.

    Args:
        inputs: L layers [N, C_l, *S_l] and the mask.
        settings, partners: what to compute.
        tapped: whether to return the layers, too, as `tap` does.
        taps: those that recorded the layers, if any.
        combines: whether the mean or sum over the layers will do, where one pass gives it.

    Returns:
        [L], with `combines` perhaps [], without reduction [N, L], of several classes [N, L, E], or [ΣC] (over
        a group this rank's rows), and under `tapped` an alias of each layer, else an empty list.
    """
    layers, planes, _ = inputs
    device, batch = layers[0].device, layers[0].shape[0]
    placeholders = None
    # Placeholders are of features as the network gave them, with their channels in place 1.
    if taps is not None and not planes.values.requires_grad and settings.channel_dim == 1:
        placeholders = taps.take_placeholders()
    early, graph_sums = None, None if taps is None else taps.graph_sums()
    if taps is not None and (placeholders or graph_sums) and has_two_regions(settings):
        early = taps.early_mask(planes.values, resize_of(settings), planes.ignored)
    if graph_sums is not None:
        _refuse_other_than_sums(settings, early)
    ranks = ranks_of(settings.group, batch, device)
    total = batch if ranks is None else ranks.total
    pairing = draw_pairing(settings.exchange, total, device, *partners, ranks)
    run = _of_two_regions if has_two_regions(settings) else _of_several_regions
    shared = Batch(ranks, pairing, placeholders, tapped, early, graph_sums, combines)
    losses, aliases = run(inputs, settings, shared)
    if ranks is not None and losses.dim() > 1:
        losses = losses[ranks.own]
    return losses, aliases


class Batch(NamedTuple):
    """What the roads of a call take beside inputs and settings.

    Attributes:
        ranks: those that share the batch, or None.
        pairing: the partners of the samples of all ranks, or None.
        placeholders: the slots and placeholders of fused taps, or None.
        tapped: whether the layers are returned, too.
        early: the mask, where it was known before the features were made.
        graph_sums: the sums of the layers where a compiled network has made them; the layers are stand-ins.
        combines: whether the mean or sum over the layers will do.
    """

    ranks: Ranks | None
    pairing: Tensor | None
    placeholders: tuple[Any, ...] | None
    tapped: bool
    early: EarlyMask | None = None
    graph_sums: list[GraphSums] | None = None
    combines: bool = False


def _refuse_other_than_sums(settings: Settings, early: EarlyMask | None) -> None:
    """Refuse a loss that sums of two regions, made under another mask or none, do not serve."""
    if torch.compiler.is_compiling():
        reason = "the loss is compiled as well, where the features stay in the graph without it"
    elif not has_two_regions(settings):
        reason = "several classes and convention='fisher' need the features"
    elif settings.channel_dim != 1:
        reason = f"the sums are of features [N, C, *S], got channel_dim={settings.channel_dim}"
    elif early is None:
        reason = (
            "the loss must be given the same mask, unchanged, or none, and must resize it likewise, "
            f"mask_resize={resize_of(settings)!r} and ignore_index={settings.ignore_index}"
        )
    else:
        return
    raise RuntimeError(
        f"with taps.mask(mask, sums_only=True) a compiled network puts out region sums alone: {reason}; "
        "leave sums_only out"
    )


def _of_two_regions(inputs: Inputs, settings: Settings, shared: Batch) -> tuple[Tensor, list[Tensor]]:
    """The losses of foreground and background, over a group of all samples, and the tapped layers."""
    layers, planes, plan = inputs
    ranks, pairing, placeholders, tapped, _, graph_sums, combines = shared
    # Slopes hold one number a layer and none for the masses; without them the losses are made of the sums
    # below.
    has_slopes = settings.reduction != "none" and not planes.values.requires_grad
    has_slopes = has_slopes and (graph_sums is None or not in_transform())
    adds_up = combines and plan.is_eager and has_slopes and placeholders is None and graph_sums is None
    options = plan.combining if adds_up else plan.options
    call = Call(plan.backend, plan.pyramid, options if has_slopes else None, ranks, tapped, adds_up)
    if graph_sums is not None:
        outputs = _from_sums(call, graph_sums, pairing)
    else:
        outputs = _from_layers(call, inputs, settings, shared)
    aliases = list(outputs[-len(layers) :]) if tapped else []
    if call.options is not None:
        return outputs[0], aliases
    sums, masses = outputs[:2]
    if ranks is not None:
        sums, masses = gather_batch(sums, ranks), gather_batch(masses, ranks)
    entries = losses_of(wide(sums), wide(masses), plan.pyramid, options, pairing).to(plan.pyramid.dtype)
    return entries, aliases


def _from_sums(call: Call, graph_sums: Sequence[GraphSums], pairing: Tensor | None) -> tuple[Tensor, ...]:
    """The losses of sums that a compiled network has made, or sums [2, N, ΣC] and masses [2, N, L]."""
    sums = torch.cat([layer.sums for layer in graph_sums], dim=-1).to(call.pyramid.dtype)
    masses = torch.cat([layer.masses for layer in graph_sums], dim=-1).to(call.pyramid.dtype)
    if call.options is not None:
        return (FromSums.apply(call, sums, masses, pairing),)
    return sums, masses


def _from_layers(call: Call, inputs: Inputs, settings: Settings, shared: Batch) -> tuple[Tensor, ...]:
    """What the kernels give for layers [N, C_l, *S_l]: losses, or sums and masses, and tapped layers."""
    layers, planes, plan = inputs
    _, pairing, placeholders, _, early, *_ = shared
    backend, dtype = call.backend, call.pyramid.dtype
    weights = None if early is None else early.weights_of_all(layers, dtype, backend)
    if weights is None:
        assert plan.weights is not None  # as there are two regions
        weights = make_weights(planes.values, plan.weights)
    if in_transform():
        return run_transformed(call, layers, weights, pairing)
    if placeholders is None:
        return run_pass(call, layers, weights, pairing)
    outputs: tuple[Tensor, ...] = apply_plainly(FromTaps, call, layers, weights, pairing, *placeholders)
    return outputs


def _of_several_regions(inputs: Inputs, settings: Settings, shared: Batch) -> tuple[Tensor, list[Tensor]]:
    """The losses of several classes, or of second moments, as `_of_two_regions` returns its own."""
    ranks, pairing, placeholders, tapped, *_ = shared
    layers, planes, plan = inputs
    backend, pyramid = plan.backend, plan.pyramid
    classes, convention = settings.classes, settings.convention
    regions = regions_of(planes, plan.sizes, pyramid.dtype, resize_of(settings), classes, backend)
    if convention.norm == "fisher":
        regions = Regions(regions.weights, regions.selects, pivots_of(layers, regions, pyramid))
    call = RegionCall(backend, pyramid, regions.selects, tapped)
    if in_transform():
        refuse_group(ranks)
    if placeholders is None:
        sums, masses, *aliases = run_regions(call, layers, regions)
    else:
        sums, masses, *aliases = RegionsFromTaps.apply(call, layers, regions, *placeholders)
    found = GatheredSums(sums, masses, regions.pivots, ranks)
    losses = losses_of_regions(found, pyramid, plan.options, classes, pairing, backend)
    is_plain = classes.is_binary and losses.dim() == 3  # [N, L, 1]
    return losses.squeeze(-1) if is_plain else losses, aliases
