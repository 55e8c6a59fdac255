"""The functions over any number of regions as registered ops, and the way past them, as in registered.py.

Where autograd records their gradients, these come from the reference, which it sees through.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdkernels.op.kernels import kernels_of
from fdkernels.op.pyramid import Pyramid, Regions, accumulate_dtype, describe, pack, unpack
from fdkernels.op.registered import empty_gradients, may_call_directly

__all__ = ["region_gradient", "region_sums", "region_weight_gradient"]

_SCHEMAS = {
    "region_sums": "(Tensor[] features, Tensor[] weights, Tensor? pivots, bool selects, str backend) "
    "-> (Tensor, Tensor)",
    "region_gradient": "(Tensor grad_sums, Tensor[] weights, Tensor? pivots, bool selects, "
    "Tensor[] features, Tensor[] upstream, int[] upstream_layers, SymInt[] pyramid, str backend) -> Tensor[]",
    "region_weight_gradient": "(Tensor grad_sums, Tensor[] weights, Tensor? pivots, bool selects, "
    "Tensor[] features, str backend) -> Tensor[]",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fdkernels::{_name}", _schema)


def region_sums(
    features: Sequence[Tensor], regions: Regions, pyramid: Pyramid, backend: str
) -> tuple[Tensor, Tensor]:
    """`Kernels.region_sums`."""
    if may_call_directly((*features, regions.weights[0])):
        return kernels_of(backend).region_sums(features, regions, pyramid)
    all_sums, masses = torch.ops.fdkernels.region_sums(
        features, regions.weights, regions.pivots, regions.selects, backend
    )
    return all_sums, masses


def region_gradient(
    grad_sums: Tensor,
    regions: Regions,
    features: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    pyramid: Pyramid,
    backend: str,
) -> list[Tensor]:
    """`Kernels.region_gradient`; through the reference where autograd records."""
    if torch.is_grad_enabled():
        return kernels_of("reference").region_gradient(grad_sums, regions, features, upstream, pyramid)
    if may_call_directly([grad_sums, *features, *upstream]):
        return kernels_of(backend).region_gradient(grad_sums, regions, features, upstream, pyramid)
    present = [(layer, grad) for layer, grad in enumerate(upstream) if grad is not None]
    grads: list[Tensor] = torch.ops.fdkernels.region_gradient(
        grad_sums,
        regions.weights,
        regions.pivots,
        regions.selects,
        features,
        [grad for _, grad in present],
        [layer for layer, _ in present],
        pack(pyramid),
        backend,
    )
    return grads


def region_weight_gradient(
    grad_sums: Tensor, regions: Regions, features: Sequence[Tensor], backend: str
) -> list[Tensor]:
    """`Kernels.region_weight_gradient`; through the reference where autograd records."""
    if torch.is_grad_enabled():
        return kernels_of("reference").region_weight_gradient(grad_sums, regions, features)
    if may_call_directly([grad_sums, *features]):
        return kernels_of(backend).region_weight_gradient(grad_sums, regions, features)
    grads: list[Tensor] = torch.ops.fdkernels.region_weight_gradient(
        grad_sums, regions.weights, regions.pivots, regions.selects, features, backend
    )
    return grads


@torch.library.impl("fdkernels::region_sums", "CompositeExplicitAutograd")
def _region_sums(
    features: list[Tensor], weights: list[Tensor], pivots: Tensor | None, selects: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return kernels_of(backend).region_sums(features, Regions(weights, selects, pivots), describe(features))


@torch.library.register_fake("fdkernels::region_sums")
def _region_sums_fake(
    features: list[Tensor], weights: list[Tensor], pivots: Tensor | None, selects: bool, backend: str
) -> tuple[Tensor, Tensor]:
    batch, R = weights[0].shape[:2]
    channels, rows = sum([layer.shape[1] for layer in features]), R if pivots is None else 2 * R
    all_sums = features[0].new_empty((rows, batch, channels), dtype=accumulate_dtype(features))
    return all_sums, all_sums.new_empty((R, batch, len(features)))


@torch.library.impl("fdkernels::region_gradient", "CompositeExplicitAutograd")
def _region_gradient(
    grad_sums: Tensor,
    weights: list[Tensor],
    pivots: Tensor | None,
    selects: bool,
    features: list[Tensor],
    upstream: list[Tensor],
    upstream_layers: list[int],
    pyramid: list[int],
    backend: str,
) -> list[Tensor]:
    added: list[Tensor | None] = [None] * len(weights) if upstream else []
    for layer, grad in zip(upstream_layers, upstream, strict=True):
        added[layer] = grad
    regions = Regions(weights, selects, pivots)
    return kernels_of(backend).region_gradient(grad_sums, regions, features, added, unpack(pyramid))


@torch.library.register_fake("fdkernels::region_gradient")
def _region_gradient_fake(
    grad_sums: Tensor,
    weights: list[Tensor],
    pivots: Tensor | None,
    selects: bool,
    features: list[Tensor],
    upstream: list[Tensor],
    upstream_layers: list[int],
    pyramid: list[int],
    backend: str,
) -> list[Tensor]:
    return empty_gradients(grad_sums, pyramid)


@torch.library.impl("fdkernels::region_weight_gradient", "CompositeExplicitAutograd")
def _region_weight_gradient(
    grad_sums: Tensor,
    weights: list[Tensor],
    pivots: Tensor | None,
    selects: bool,
    features: list[Tensor],
    backend: str,
) -> list[Tensor]:
    regions = Regions(weights, selects, pivots)
    return kernels_of(backend).region_weight_gradient(grad_sums, regions, features)


@torch.library.register_fake("fdkernels::region_weight_gradient")
def _region_weight_gradient_fake(
    grad_sums: Tensor,
    weights: list[Tensor],
    pivots: Tensor | None,
    selects: bool,
    features: list[Tensor],
    backend: str,
) -> list[Tensor]:
    return [grad_sums.new_empty(weight.shape) for weight in weights]
