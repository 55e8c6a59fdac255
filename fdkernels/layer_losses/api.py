"""Stages region_sums and log_norm as one piece of work: registered ops over the backends and their autograd.

Forward already knows how each loss changes with its sums, so it keeps these slopes, O(N·C) numbers, and
backward is one pass that writes the gradient. Masks that ask for a gradient, losses without reduction and
batches that are spread over ranks go through the two stages instead (`fdkernels.loss`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fdkernels import backend as backends
from fdkernels.layer_masks import LayerMasks
from fdkernels.log_norm.options import Options
from fdkernels.region_sums import geometry as geo

__all__ = ["fused_layer_losses"]

_OPTIONS = (
    "str region_weight, bool masked_background, str norm, float log_scale, float eps, str exchange, "
    "str reduction, str backend"
)
torch.library.define(
    "fdkernels::layer_losses_forward",
    f"(Tensor[] features, Tensor[] fg, Tensor[] bg, Tensor? pairing, bool with_slopes, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fdkernels::layer_losses_backward",
    # upstream holds the gradients that are added, upstream_layers the layers to which they belong.
    "(Tensor grad_loss, Tensor slopes, Tensor[] fg, Tensor[] bg, Tensor[] upstream, int[] upstream_layers, "
    "SymInt[] geometry, str backend) -> Tensor[]",
)


@torch.library.impl("fdkernels::layer_losses_forward", "CompositeExplicitAutograd")
def _forward(
    features: list[Tensor],
    fg: list[Tensor],
    bg: list[Tensor],
    pairing: Tensor | None,
    with_slopes: bool,
    *options_and_backend: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *options, backend = options_and_backend
    stage = backends.implementation("layer_losses", backend)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = stage.forward(
        features, fg, bg, pairing, Options(*options), with_slopes
    )
    return outputs


@torch.library.register_fake("fdkernels::layer_losses_forward")
def _forward_fake(
    features: list[Tensor],
    fg: list[Tensor],
    bg: list[Tensor],
    pairing: Tensor | None,
    with_slopes: bool,
    *options_and_backend: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, num_layers = features[0].shape[0], len(features)
    channels = sum(layer.shape[1] for layer in features)
    loss = features[0].new_empty(num_layers, dtype=geo.accumulate_dtype(features))
    sums = loss.new_empty((2, batch, channels))
    slopes = torch.empty_like(sums) if with_slopes else loss.new_empty(0)
    return loss, sums, loss.new_empty((2, batch, num_layers)), slopes


@torch.library.impl("fdkernels::layer_losses_backward", "CompositeExplicitAutograd")
def _backward(
    grad_loss: Tensor,
    slopes: Tensor,
    fg: list[Tensor],
    bg: list[Tensor],
    upstream: list[Tensor],
    upstream_layers: list[int],
    geometry: list[int],
    backend: str,
) -> list[Tensor]:
    stage = backends.implementation("layer_losses", backend)
    added: list[Tensor | None] = [None] * len(fg) if upstream else []
    for layer, grad in zip(upstream_layers, upstream, strict=True):
        added[layer] = grad
    grads: list[Tensor] = stage.backward(grad_loss, slopes, fg, bg, added, geo.unpack(geometry))
    return grads


@torch.library.register_fake("fdkernels::layer_losses_backward")
def _backward_fake(
    grad_loss: Tensor,
    slopes: Tensor,
    fg: list[Tensor],
    bg: list[Tensor],
    upstream: list[Tensor],
    upstream_layers: list[int],
    geometry: list[int],
    backend: str,
) -> list[Tensor]:
    return [
        torch.empty_strided(shape, stride, dtype=dtype, device=slopes.device)
        for shape, stride, dtype in geo.unpack(geometry)
    ]


class _LayerLosses(torch.autograd.Function):
    """Features to losses, sums and masses, and under `tap` also the features themselves.

    Sums and masses are outputs so that second derivatives, which go through the two stages, find their way
    from the saved sums back to the features.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        # Unpacked here: where no gradient is asked for, torch.compile leaves out ctx if there happen to be as
        # many parameters as arguments.
        backend, tap, has_bg, options, pairing, *tensors = arguments
        num_layers = len(tensors) // (3 if has_bg else 2)
        features = tensors[:num_layers]
        fg, bg = tensors[num_layers : 2 * num_layers], tensors[2 * num_layers :]
        with_slopes = any(ctx.needs_input_grad[5 : 5 + num_layers])
        loss, sums, masses, slopes = torch.ops.fdkernels.layer_losses_forward(
            features, fg, bg, pairing, with_slopes, *options, backend
        )
        ctx.mark_non_differentiable(masses)
        ctx.save_for_backward(slopes, sums, masses, pairing, *fg, *bg)
        ctx.set_materialize_grads(False)
        ctx.geometry = [geo.geometry_of(layer) for layer in features]
        ctx.backend, ctx.options = backend, options
        if tap:
            return loss, sums, masses, *(layer.view_as(layer) for layer in features)
        return loss, sums, masses

    @staticmethod
    def backward(
        ctx: Any,
        grad_loss: Tensor | None,
        grad_sums: Tensor | None,
        grad_masses: None,
        *upstream: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        slopes, sums, masses, pairing, *weights = ctx.saved_tensors
        num_layers = len(ctx.geometry)
        grads: list[Tensor | None] = [None] * num_layers
        wanted = [index for index in range(num_layers) if ctx.needs_input_grad[5 + index]]
        if grad_loss is None and grad_sums is None:
            grads = list(upstream) or grads
        elif wanted:
            fg, bg = weights[:num_layers], weights[num_layers:]
            tapped = [layer for layer, index in enumerate(wanted) if upstream and upstream[index] is not None]
            common = (
                [fg[index] for index in wanted],
                [bg[index] for index in wanted] if bg else [],
                [upstream[wanted[layer]] for layer in tapped],
                tapped,
            )
            geometry = geo.pack([ctx.geometry[index] for index in wanted])
            if grad_sums is None and not torch.is_grad_enabled():
                chosen = grad_loss if len(wanted) == num_layers else grad_loss[wanted]  # type: ignore[index]
                written = torch.ops.fdkernels.layer_losses_backward(
                    chosen, geo.select_layers(slopes, ctx.geometry, wanted), *common, geometry, ctx.backend
                )
            else:
                total = _through_log_norm(ctx, grad_loss, sums, masses, pairing, grad_sums)
                written = torch.ops.fdkernels.region_sums_backward(
                    geo.select_layers(total, ctx.geometry, wanted), *common, [], geometry, ctx.backend
                )[0]
            for index, grad in zip(wanted, written, strict=True):
                grads[index] = grad
        return (None, None, None, None, None, *grads, *([None] * len(weights)))


def _through_log_norm(
    ctx: Any,
    grad_loss: Tensor | None,
    sums: Tensor,
    masses: Tensor,
    pairing: Tensor | None,
    grad_sums: Tensor | None,
) -> Tensor:
    """The gradient of the sums, by ops that can be differentiated again."""
    if grad_loss is None:
        return grad_sums  # type: ignore[return-value]
    channels = [layer.shape[1] for layer in ctx.geometry]
    pixels = [torch.Size(layer.shape[2:]).numel() for layer in ctx.geometry]
    own: Tensor = torch.ops.fdkernels.log_norm_backward(
        grad_loss, sums, masses, pairing, channels, pixels, *ctx.options, ctx.backend
    )[0]
    return own if grad_sums is None else own + grad_sums


def fused_layer_losses(
    features: Sequence[Tensor],
    masks: LayerMasks,
    pairing: Tensor | None,
    options: Options,
    backend: str,
    tap: bool = False,
) -> tuple[Tensor, ...]:
    """The loss of every layer from features and masks, without checks.

    Args:
        features: a tensor [N, C_l, *S_l] for each of L layers.
        masks: the weights [N, P_l] of each layer; they get no gradient.
        pairing: int64, [N] for shuffle, [K, 2] for pooled (rows with a negative entry do not count), or None.
        options: convention, exchange and reduction, which is `"mean"` or `"sum"`.
        backend: the name of an available backend.
        tap: also return the features, as outputs whose gradient is added in the same backward pass.

    Returns:
        [L] in the accumulation dtype; under `tap` followed by the features.
    """
    loss, _, _, *aliases = _LayerLosses.apply(
        backend, tap, bool(masks.bg), tuple(options), pairing, *features, *masks.fg, *masks.bg
    )
    return loss, *aliases
