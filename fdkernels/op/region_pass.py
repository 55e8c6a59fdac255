"""Several regions under autograd: one pass over the features forward, one write of their gradient backward.

`RegionPass` maps features and the weights of R regions to their sums; README.md beside this file derives it
under (C1) to (C4). What follows from the sums are O(N·R·C) numbers; entries.py makes losses of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdkernels.classes import Classes, Planes
from fdkernels.op import reference, registered_regions
from fdkernels.op.pyramid import Pyramid, Regions
from fdkernels.op.weights import weights_of
from fdkernels.transforms import in_transform

__all__ = ["RegionCall", "pivots_of", "regions_of", "run_regions"]


def regions_of(
    planes: Planes,
    sizes: Sequence[torch.Size],
    dtype: torch.dtype,
    mask_resize: str,
    classes: Classes,
    backend: str,
) -> Regions:
    """Resize planes [N, K, *S0] to the weights of the regions of each layer, without pivots.

    Under `"multiclass"` each class is a region; else each class and its complement are, the classes first.
    Layers of one size share a tensor.

    Args:
        planes: a checked mask.
        sizes, dtype, mask_resize, backend: as for `weights_of`.
        classes: what the planes mean.
    """
    N, K = planes.values.shape[:2]
    flat = planes.values.flatten(0, 1).unsqueeze(1)  # [N·K, 1, *S0]
    given = weights_of(flat, sizes, dtype, mask_resize, planes.ignored, backend)
    weights: list[Tensor] = []
    made: list[tuple[Tensor, Tensor]] = []  # what each tensor of weights_of became
    for index, fg in enumerate(given.fg):
        known = [regions for source, regions in made if source is fg]
        if not known:
            regions = fg.unflatten(0, (N, K))  # [N, K, P]
            if classes.mode != "multiclass":
                rest = given.bg[index] if given.bg else _complement(fg)
                regions = torch.cat([regions, rest.unflatten(0, (N, K))], dim=1)
            known = [regions.contiguous()]
            made.append((fg, known[0]))
        weights.append(known[0])
    return Regions(weights, planes.selects)


def _complement(w: Tensor) -> Tensor:
    """1 - w; a byte that stands for NaN stays one."""
    return torch.where(w > 1, w, 1 - w) if w.dtype == torch.uint8 else 1 - w


def pivots_of(features: Sequence[Tensor], regions: Regions, pyramid: Pyramid) -> Tensor:
    """The feature where the weight of a region is largest, 0 for an empty region, [R, N, ΣC]."""
    pivots = []
    for layer, weights in zip(features, regions.weights, strict=True):
        largest, place = weights.detach().max(-1)  # [N, R]
        coordinates: list[Tensor] = []
        for extent in reversed(layer.shape[2:]):
            coordinates.append(place % extent)
            place = place // extent
        sample = torch.arange(layer.shape[0], device=layer.device).unsqueeze(1)
        at: tuple[Any, ...] = (sample, slice(None), *reversed(coordinates))
        found = layer.detach()[at]  # [N, R, C]
        found = torch.where((largest != 0).unsqueeze(-1), found.to(pyramid.dtype), 0)
        pivots.append(found.transpose(0, 1))
    return torch.cat(pivots, dim=-1)


class RegionCall(NamedTuple):
    """What a pass over regions asks for.

    Attributes:
        backend: the name of an available backend.
        pyramid: the layers.
        selects: as in `Regions`.
        tap: whether the features are returned, too, and take the gradient of what uses them.
    """

    backend: str
    pyramid: Pyramid
    selects: bool
    tap: bool = False


class RegionPass(torch.autograd.Function):
    """Features and weights of regions to sums and masses."""

    @staticmethod
    def forward(ctx: Any, call: RegionCall, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Run the kernels.

        Args:
            call: what to compute.
            tensors: the pivots [R, N, ΣC] or None, the features [N, C_l, *S_l], the weights [N, R, P_l].

        Returns:
            sums [R, N, ΣC], with pivots [2R, N, ΣC], and masses [R, N, L]; under `call.tap` the features.
        """
        pivots, *rest = tensors
        num_layers = len(call.pyramid.layers)
        features: list[Tensor] = rest[:num_layers]  # type: ignore[assignment]
        regions = Regions(rest[num_layers:], call.selects, pivots)  # type: ignore[arg-type]
        sums, masses = registered_regions.region_sums(features, regions, call.pyramid, call.backend)
        ctx.of_weights = any(ctx.needs_input_grad[_FIRST_FEATURE + num_layers :])
        ctx.of_features = any(ctx.needs_input_grad[_FIRST_FEATURE : _FIRST_FEATURE + num_layers])
        ctx.call = call
        kept = features if ctx.of_weights or pivots is not None else []
        ctx.save_for_backward(pivots, *regions.weights, *kept)
        ctx.set_materialize_grads(False)
        if not ctx.of_weights:
            ctx.mark_non_differentiable(masses)
        # Not views to autograd, which would refuse a change in place by the next layer.
        return (sums, masses, *([layer.detach() for layer in features] if call.tap else []))

    @staticmethod
    def backward(
        ctx: Any, grad_sums: Tensor | None, grad_masses: Tensor | None, *upstream: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Write the gradients of the features (C3), and of weights that require one (C4).

        Args:
            grad_sums: [R, N, ΣC] or [2R, N, ΣC].
            grad_masses: [R, N, L], None where no weights require a gradient.
            upstream: of the tapped features [N, C_l, *S_l].
        """
        call: RegionCall = ctx.call
        pyramid, num_layers = call.pyramid, len(call.pyramid.layers)
        pivots, *rest = ctx.saved_tensors
        regions, features = Regions(rest[:num_layers], call.selects, pivots), rest[num_layers:]
        grads: list[Tensor | None] = list(upstream) or [None] * num_layers
        of_weights: list[Tensor | None] = [None] * num_layers
        if grad_sums is not None and ctx.of_features:
            read = features if pivots is not None else []
            grads = list(
                registered_regions.region_gradient(
                    grad_sums, regions, read, list(upstream), pyramid, call.backend
                )
            )
        if grad_sums is not None and ctx.of_weights:
            of_weights = list(
                registered_regions.region_weight_gradient(grad_sums, regions, features, call.backend)
            )
        if grad_masses is not None and ctx.of_weights:
            for index, weight in enumerate(regions.weights):
                of_mass = grad_masses[..., index].t().unsqueeze(-1).expand(weight.shape)  # [N, R, P]
                given = of_weights[index]
                of_weights[index] = of_mass if given is None else given + of_mass
        return (None, None, *grads, *of_weights)


# Where the features begin among the arguments of `RegionPass.forward`.
_FIRST_FEATURE = 2


def run_regions(call: RegionCall, features: Sequence[Tensor], regions: Regions) -> tuple[Tensor, ...]:
    """Apply `RegionPass` to features [N, C_l, *S_l] and regions, and return what it returns."""
    if in_transform():
        aliases = [layer.view_as(layer) for layer in features] if call.tap else []
        return (*reference.region_sums(features, regions, call.pyramid), *aliases)
    outputs: tuple[Tensor, ...] = RegionPass.apply(call, regions.pivots, *features, *regions.weights)
    return outputs
