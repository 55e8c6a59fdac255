"""Stages region_sums and log_norm as one piece of work: registered ops over the backends and their autograd.

Forward already knows how each loss changes with its sums, so it keeps these slopes (F1), O(N·C) numbers, and
backward is one pass that writes the gradient (F2). Masks that ask for a gradient, losses without reduction
and batches that are spread over ranks go through the two stages instead (`fdkernels.loss`).
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

__all__ = ["fused_layer_losses", "one_loss", "through_log_norm"]

# Where the features begin among the arguments of the autograd function.
_FIRST_FEATURE = 8

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
    """Features to losses, under `tap` also the features themselves, and under `twice` their sums.

    With a `share` of 1 or 1/L the losses [L] become one, Σ_l share·L_l.

    Sums are an output so that second derivatives, which go through the two stages, find their way from the
    saved sums back to the features. A compiled graph has no second derivatives, and would hand zeros to the
    backward of an output that nobody used.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        # Unpacked here: where no gradient is asked for, torch.compile leaves out ctx if there happen to be as
        # many parameters as arguments.
        backend, tap, twice, share, options, pairing, num_layers, masks, *tensors = arguments
        features = tensors[:num_layers]
        # A compiler has to see every tensor; elsewhere each costs time, and the weights come as one argument.
        fg, bg = masks or (tensors[num_layers : 2 * num_layers], tensors[2 * num_layers :])
        with_slopes = any(ctx.needs_input_grad[_FIRST_FEATURE : _FIRST_FEATURE + num_layers])
        ctx.share, ctx.share_is_in_slopes = share, False
        if backends.may_call_directly(tensors):
            stage = backends.implementation("layer_losses", backend)
            ctx.geometry = geo.describe(features).geometry
            if share and getattr(stage, "COMBINES", False):
                ctx.share_is_in_slopes = True
                outputs = stage.forward(features, fg, bg, pairing, options, with_slopes, share)
            else:
                outputs = stage.forward(features, fg, bg, pairing, options, with_slopes)
        else:
            ctx.geometry = [geo.geometry_of(layer) for layer in features]
            outputs = torch.ops.fdkernels.layer_losses_forward(
                features, fg, bg, pairing, with_slopes, *options, backend
            )
        loss, sums, masses, slopes = outputs
        if share and not ctx.share_is_in_slopes:
            loss = one_loss(loss, share)
        ctx.save_for_backward(slopes, *fg, *bg, *((pairing, sums, masses) if twice else ()))
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.options, ctx.twice, ctx.has_bg = backend, options, twice, bool(bg)
        ctx.num_weights = len(tensors) - num_layers
        aliases = [layer.view_as(layer) for layer in features] if tap else []
        return (loss, *aliases, sums) if twice else (loss, *aliases)

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        num_layers = len(ctx.geometry)
        grad_sums = grad_outputs[-1] if ctx.twice else None
        upstream = list(grad_outputs[:-1] if ctx.twice else grad_outputs)
        slopes, *weights = ctx.saved_tensors
        fg, bg = weights[:num_layers], weights[num_layers : 2 * num_layers] if ctx.has_bg else []
        grads: list[Tensor | None] = [None] * num_layers
        wanted = [layer for layer in range(num_layers) if ctx.needs_input_grad[_FIRST_FEATURE + layer]]
        if grad_loss is None and grad_sums is None:
            grads = upstream or grads
        elif wanted:
            geometry = [ctx.geometry[layer] for layer in wanted]
            fg = [fg[layer] for layer in wanted]
            bg = [bg[layer] for layer in wanted] if bg else []
            added = [upstream[layer] for layer in wanted] if upstream else []
            if grad_loss is None or grad_sums is not None or (ctx.twice and torch.is_grad_enabled()):
                pairing, sums, masses = weights[-3:]
                total = torch.zeros_like(sums) if grad_sums is None else grad_sums
                if grad_loss is not None:
                    of_each = _of_each_layer(grad_loss, ctx.share, num_layers)
                    total = total + through_log_norm(ctx, of_each, sums, masses, pairing)
                through = geo.select_layers(total, ctx.geometry, wanted)
                tapped, places = _present(added)
                written = torch.ops.fdkernels.region_sums_backward(
                    through, fg, bg, tapped, places, [], geo.pack(geometry), ctx.backend
                )[0]
            else:
                if not ctx.share_is_in_slopes:
                    grad_loss = _of_each_layer(grad_loss, ctx.share, num_layers)
                chosen = grad_loss[wanted] if grad_loss.dim() and len(wanted) < num_layers else grad_loss
                chosen_slopes = geo.select_layers(slopes, ctx.geometry, wanted)
                written = _write_gradients(chosen, chosen_slopes, fg, bg, added, geometry, ctx.backend)
            for layer, grad in zip(wanted, written, strict=True):
                grads[layer] = grad
        return (*([None] * _FIRST_FEATURE), *grads, *([None] * ctx.num_weights))


def one_loss(losses: Tensor, share: float) -> Tensor:
    """The losses [L] as one, Σ_l share·L_l; `share` is 1 or 1/L."""
    if losses.shape[0] == 1:
        return losses.squeeze(0)
    return losses.sum() if share == 1 else losses.mean()


def _of_each_layer(grad_loss: Tensor, share: float, num_layers: int) -> Tensor:
    """The gradients of the losses [L], which are given where `share` is 0, else from that of the one loss."""
    if not share:
        return grad_loss
    return (grad_loss if share == 1 else grad_loss * share).expand(num_layers)


def _write_gradients(
    grad_loss: Tensor,
    slopes: Tensor,
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    geometry: Sequence[geo.Geometry],
    backend: str,
) -> list[Tensor]:
    """The gradients of the features (F2) in one pass: grad_loss times the slopes, plus what arrived.

    grad_loss is [L], or [] for slopes that are those of the one loss.
    """
    added, places = _present(upstream)
    if backends.may_call_directly([grad_loss, slopes, *fg, *bg, *added]):
        stage = backends.implementation("layer_losses", backend)
        grads: list[Tensor] = stage.backward(grad_loss, slopes, fg, bg, upstream if added else [], geometry)
    else:
        grads = torch.ops.fdkernels.layer_losses_backward(
            grad_loss.expand(len(fg)), slopes, fg, bg, added, places, geo.pack(geometry), backend
        )
    return grads


def _present(upstream: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """The gradients that have arrived, and the places of their layers."""
    present = [(grad, place) for place, grad in enumerate(upstream) if grad is not None]
    return [grad for grad, _ in present], [place for _, place in present]


def through_log_norm(
    ctx: Any,
    grad_loss: Tensor,
    sums: Tensor,
    masses: Tensor,
    pairing: Tensor | None,
) -> Tensor:
    """The gradient of the sums, by an op that can be differentiated again."""
    channels = [layer.shape[1] for layer in ctx.geometry]
    pixels = [torch.Size(layer.shape[2:]).numel() for layer in ctx.geometry]
    grad_sums: Tensor = torch.ops.fdkernels.log_norm_backward(
        grad_loss, sums, masses, pairing, channels, pixels, *ctx.options, ctx.backend
    )[0]
    return grad_sums


def fused_layer_losses(
    features: Sequence[Tensor],
    masks: LayerMasks,
    pairing: Tensor | None,
    options: Options,
    backend: str,
    tap: bool = False,
    share: float = 0.0,
) -> tuple[Tensor, ...]:
    """The loss of every layer from features and masks, without checks.

    Args:
        features: a tensor [N, C_l, *S_l] for each of L layers.
        masks: the weights [N, P_l] of each layer; they get no gradient.
        pairing: int64, [N] for shuffle, [K, 2] for pooled (rows with a negative entry do not count), or None.
        options: convention, exchange and reduction, which is `"mean"` or `"sum"`.
        backend: the name of an available backend.
        tap: also return the features, as outputs whose gradient is added in the same backward pass.
        share: 0, or 1 or 1/L for the one loss Σ_l share·L_l.

    Returns:
        [L], or [] for one loss, in the accumulation dtype; under `tap` followed by the features.
    """
    num_layers = len(features)
    outputs: tuple[Tensor, ...]
    if torch.compiler.is_compiling():
        # The compiler adds up the losses itself.
        loss, *aliases = _LayerLosses.apply(
            backend, tap, False, 0.0, options, pairing, num_layers, None, *features, *masks.fg, *masks.bg
        )
        return (one_loss(loss, share) if share else loss), *aliases
    outputs = _LayerLosses.apply(backend, tap, True, share, options, pairing, num_layers, masks, *features)
    return outputs[:-1]
