"""Stage region_sums: registered ops over the backends, their autograd, and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdkernels import backend as backends
from fdkernels import checks
from fdkernels.conventions import MASK_RESIZES
from fdkernels.layer_masks import LayerMasks, layer_masks
from fdkernels.region_sums import geometry as geo

__all__ = ["RegionSums", "region_sums", "sum_regions"]

torch.library.define(
    "fdkernels::region_sums_forward",
    "(Tensor[] features, Tensor[] fg, Tensor[] bg, str backend) -> (Tensor, Tensor)",
)
torch.library.define(
    "fdkernels::region_sums_backward",
    # upstream holds the gradients that are added, upstream_layers the layers to which they belong.
    "(Tensor grad_sums, Tensor[] fg, Tensor[] bg, Tensor[] upstream, int[] upstream_layers, "
    "Tensor[] features, SymInt[] geometry, str backend) -> (Tensor[], Tensor[], Tensor[])",
)


def _contiguous(weights: list[Tensor]) -> list[Tensor]:
    # Masks come so from layer_masks; in second derivatives their place is taken by cotangents of any strides.
    return [weight.contiguous() for weight in weights]


@torch.library.impl("fdkernels::region_sums_forward", "CompositeExplicitAutograd")
def _forward(
    features: list[Tensor], fg: list[Tensor], bg: list[Tensor], backend: str
) -> tuple[Tensor, Tensor]:
    stage = backends.implementation("region_sums", backend)
    sums: tuple[Tensor, Tensor] = stage.forward(features, _contiguous(fg), _contiguous(bg))
    return sums


@torch.library.register_fake("fdkernels::region_sums_forward")
def _forward_fake(
    features: list[Tensor], fg: list[Tensor], bg: list[Tensor], backend: str
) -> tuple[Tensor, Tensor]:
    batch = features[0].shape[0]
    channels = sum(layer.shape[1] for layer in features)
    dtype = geo.accumulate_dtype(features)
    sums = features[0].new_empty((2, batch, channels), dtype=dtype)
    return sums, features[0].new_empty((2, batch, len(features)), dtype=dtype)


@torch.library.impl("fdkernels::region_sums_backward", "CompositeExplicitAutograd")
def _backward(
    grad_sums: Tensor,
    fg: list[Tensor],
    bg: list[Tensor],
    upstream: list[Tensor],
    upstream_layers: list[int],
    features: list[Tensor],
    geometry: list[int],
    backend: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    stage = backends.implementation("region_sums", backend)
    added: list[Tensor | None] = [None] * len(fg) if upstream else []
    for layer, grad in zip(upstream_layers, upstream, strict=True):
        added[layer] = grad
    grads: tuple[list[Tensor], list[Tensor], list[Tensor]] = stage.backward(
        grad_sums, _contiguous(fg), _contiguous(bg), added, features, geo.unpack(geometry)
    )
    return grads


@torch.library.register_fake("fdkernels::region_sums_backward")
def _backward_fake(
    grad_sums: Tensor,
    fg: list[Tensor],
    bg: list[Tensor],
    upstream: list[Tensor],
    upstream_layers: list[int],
    features: list[Tensor],
    geometry: list[int],
    backend: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    grad_features = [
        torch.empty_strided(shape, stride, dtype=dtype, device=grad_sums.device)
        for shape, stride, dtype in geo.unpack(geometry)
    ]
    masks = [grad_sums.new_empty(weight.shape) for weight in fg] if features else []
    return grad_features, masks, [torch.empty_like(grad) for grad in masks] if bg else []


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_sums, fg, bg, _, upstream_layers, features, geometry, backend = inputs
    ctx.save_for_backward(grad_sums, *fg, *bg, *features)
    ctx.sizes = (len(fg), len(bg), len(features))
    ctx.upstream_layers = list(upstream_layers)
    # torch takes an empty list of integers for an empty list of tensors and wants its kind of gradient back.
    ctx.grad_upstream_layers = None if len(upstream_layers) else []
    ctx.grad_geometry = None if len(geometry) else []
    ctx.geometry = geo.unpack(geometry)
    ctx.backend = backend


def _backward_backward(
    ctx: Any,
    grad_grad_features: Sequence[Tensor | None],
    grad_grad_fg: Sequence[Tensor | None],
    grad_grad_bg: Sequence[Tensor | None],
) -> tuple[Any, ...]:
    """Second derivatives by (R5): each is again a forward or a backward of this stage."""
    grad_sums, *rest = ctx.saved_tensors
    num_layers, num_bg, num_features = ctx.sizes
    fg, bg = rest[:num_layers], rest[num_layers : num_layers + num_bg]
    features = rest[num_layers + num_bg :]
    zero = torch.zeros_like(grad_sums)
    grad_g, grad_fg, grad_bg, grad_features = zero, [None] * num_layers, [None] * num_bg, []
    if any(u is not None for u in grad_grad_features):
        u = [
            torch.zeros(shape, dtype=dtype, device=grad_sums.device) if cotangent is None else cotangent
            for cotangent, (shape, _, dtype) in zip(grad_grad_features, ctx.geometry, strict=True)
        ]
        grad_g = grad_g + _apply(u, fg, bg, ctx.backend)[0]
        if any(weight.requires_grad for weight in fg):
            _, grad_fg, grad_bg = torch.ops.fdkernels.region_sums_backward(
                grad_sums, fg, bg, [], [], u, [], ctx.backend
            )
    if num_features:
        r_fg = _materialized(grad_grad_fg, fg, grad_sums.dtype)
        # With the background weight implied, d/dy is the difference of the two: the cotangent enters both.
        r_bg = _materialized(grad_grad_bg, fg, grad_sums.dtype) if bg else [-r for r in r_fg]
        grad_g = grad_g + _apply(features, r_fg, r_bg, ctx.backend)[0]
        grad_features = torch.ops.fdkernels.region_sums_backward(
            grad_sums,
            r_fg,
            r_bg,
            [],
            [],
            [],
            geo.pack([geo.geometry_of(layer) for layer in features]),
            ctx.backend,
        )[0]
    grad_upstream = [grad_grad_features[layer] for layer in ctx.upstream_layers]
    return (
        grad_g,
        grad_fg,
        grad_bg,
        grad_upstream,
        ctx.grad_upstream_layers,
        grad_features,
        ctx.grad_geometry,
        None,
    )


torch.library.register_autograd(
    "fdkernels::region_sums_backward", _backward_backward, setup_context=_backward_setup
)


def _materialized(grads: Sequence[Tensor | None], like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    if not grads:
        return [torch.zeros_like(weight, dtype=dtype) for weight in like]
    return [
        torch.zeros_like(weight, dtype=dtype) if grad is None else grad
        for grad, weight in zip(grads, like, strict=True)
    ]


class _RegionSums(torch.autograd.Function):
    """Features and weights to sums and masses, and under `tap` also the features themselves."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        # Unpacked here: where no gradient is asked for, torch.compile leaves out ctx if there happen to be as
        # many parameters as arguments.
        backend, tap, has_bg, *tensors = arguments
        num_layers = len(tensors) // (3 if has_bg else 2)
        features = tensors[:num_layers]
        fg, bg = tensors[num_layers : 2 * num_layers], tensors[2 * num_layers :]
        sums, masses = torch.ops.fdkernels.region_sums_forward(features, fg, bg, backend)
        mask_gradient = any(ctx.needs_input_grad[3 + num_layers :])
        if not mask_gradient:
            ctx.mark_non_differentiable(masses)
        ctx.save_for_backward(*fg, *bg, *(features if mask_gradient else ()))
        ctx.set_materialize_grads(False)
        ctx.geometry = [geo.geometry_of(layer) for layer in features]
        ctx.backend, ctx.num_bg, ctx.mask_gradient = backend, len(bg), mask_gradient
        if tap:
            return sums, masses, *(layer.view_as(layer) for layer in features)
        return sums, masses

    @staticmethod
    def backward(
        ctx: Any, grad_sums: Tensor | None, grad_masses: Tensor | None, *upstream: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        num_layers = len(ctx.geometry)
        saved = ctx.saved_tensors
        fg, bg = saved[:num_layers], saved[num_layers : num_layers + ctx.num_bg]
        features = saved[num_layers + ctx.num_bg :]
        needs = ctx.needs_input_grad[3:]
        grad_features: list[Tensor | None] = [None] * num_layers
        grad_fg: list[Tensor | None] = [None] * num_layers
        grad_bg: list[Tensor | None] = [None] * ctx.num_bg
        if grad_sums is None:
            grad_features = list(upstream) or grad_features
        else:
            wanted = [index for index in range(num_layers) if needs[index]]
            tapped = [layer for layer, index in enumerate(wanted) if upstream and upstream[index] is not None]
            if wanted:
                grads = torch.ops.fdkernels.region_sums_backward(
                    geo.select_layers(grad_sums, ctx.geometry, wanted),
                    [fg[index] for index in wanted],
                    [bg[index] for index in wanted] if bg else [],
                    [upstream[wanted[layer]] for layer in tapped],
                    tapped,
                    [],
                    geo.pack([ctx.geometry[index] for index in wanted]),
                    ctx.backend,
                )[0]
                for index, grad in zip(wanted, grads, strict=True):
                    grad_features[index] = grad
            if ctx.mask_gradient:
                _, grad_fg, grad_bg = torch.ops.fdkernels.region_sums_backward(
                    grad_sums, fg, bg, [], [], features, [], ctx.backend
                )
        if ctx.mask_gradient and grad_masses is not None:
            grad_fg = _add_mass_gradient(grad_fg, grad_masses[0], fg)
            grad_bg = _add_mass_gradient(grad_bg, grad_masses[1], fg)
        grads_in = (*grad_features, *grad_fg, *grad_bg)
        return (
            None,
            None,
            None,
            *(grad if need else None for grad, need in zip(grads_in, needs, strict=True)),
        )


def _add_mass_gradient(
    grads: Sequence[Tensor | None], grad_mass: Tensor, weights: Sequence[Tensor]
) -> list[Tensor | None]:
    columns = [column.unsqueeze(1) for column in grad_mass.unbind(-1)]  # [N, 1] each
    return [
        column.expand(weight.shape) if grad is None else grad + column
        for grad, column, weight in zip(grads, columns, weights, strict=False)
    ]


def _apply(
    features: Sequence[Tensor],
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    backend: str,
    tap: bool = False,
) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = _RegionSums.apply(backend, tap, bool(bg), *features, *fg, *bg)
    return outputs


def sum_regions(
    features: Sequence[Tensor], masks: LayerMasks, backend: str, tap: bool = False
) -> tuple[Tensor, ...]:
    """The stage itself, without checks: (R2) over checked layers and masks of their sizes.

    Args:
        features: a tensor [N, C_l, *S_l] for each of L layers.
        masks: the weights [N, P_l] of each layer.
        backend: the name of an available backend.
        tap: also return the features, as outputs whose gradient is added in the backward pass of the sums.

    Returns:
        sums [2, N, ΣC_l] and masses [2, N, L] (foreground first) in the accumulation dtype; under `tap`
        followed by the features.
    """
    return _apply(features, masks.fg, masks.bg, backend, tap)


class RegionSums(NamedTuple):
    """Region sums of one layer, (R2) in README.md.

    Attributes:
        fg, bg: [N, C], the features summed under the foreground and the background weight.
        fg_mass, bg_mass: [N], the weights summed.
    """

    fg: Tensor
    bg: Tensor
    fg_mass: Tensor
    bg_mass: Tensor


def region_sums(
    features: Tensor | Sequence[Tensor],
    mask: Tensor,
    *,
    mask_resize: str = "area",
    ignore_index: float | None = None,
    backend: str = "auto",
) -> RegionSums | list[RegionSums]:
    """Sum features over the foreground and over the background, in one read of them.

    S_fg[n,c] = Σ_p v·y·F, S_bg[n,c] = Σ_p v·(1-y)·F, M_fg[n] = Σ_p v·y, M_bg[n] = Σ_p v·(1-y), with the mask
    y and the validity v at the layer's size. Differentiable with respect to features and soft masks. For one
    layer of the mask's size, it replaces::

        fg = (features * mask).flatten(2).sum(-1)
        bg = (features * (1 - mask)).flatten(2).sum(-1)

    Args:
        features: [N, C, *S] with 1 to 3 spatial dimensions, float32, float64, bfloat16 or float16, in any
            layout; or a sequence of them, one for each layer, of one batch size and device.
        mask: [N, 1, *S0] or [N, *S0], bool, integer {0, 1} or floating point in [0, 1].
        mask_resize: how the mask comes to a layer's size, `"area"`, `"max"` or `"nearest"`.
        ignore_index: the mask value of pixels to leave out.
        backend: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`.

    Returns:
        A `RegionSums` of float32 (float64 if any layer is float64), or a list of them for a sequence.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, value or name.
        RuntimeError: the backend is not available.
    """
    layers = checks.as_layers(features)
    mask = checks.check_mask(mask, layers, ignore_index)
    checks.one_of("mask_resize", mask_resize, MASK_RESIZES)
    name = backends.resolve(backend, layers[0].device)
    sizes = [layer.shape[2:] for layer in layers]
    masks = layer_masks(mask, sizes, geo.accumulate_dtype(layers), mask_resize, ignore_index, name)
    sums, masses = sum_regions(layers, masks, name)
    parts = sums.split([layer.shape[1] for layer in layers], dim=-1)
    results = [
        RegionSums(part[0], part[1], masses[0, :, index], masses[1, :, index])
        for index, part in enumerate(parts)
    ]
    return results[0] if isinstance(features, Tensor) else results
