"""The op under autograd: one pass over the features forward, one write of their gradient backward.

`Pass` maps features to losses, and under `tap` also to themselves; tapped.py does the same in two nodes, for
taps set before the mask is known, and region_pass.py for more than two regions.

Backward is one product: forward keeps how the losses change with the sums, the slopes (F1), and the kernel
multiplies them by the gradient of the losses (F2). What slopes cannot say (entries without reduction, masks
that require a gradient) is computed from the sums by `reference.losses_of`; second derivatives are as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdkernels.conventions import Options
from fdkernels.exchange import Ranks, gather_batch, reduce_batch
from fdkernels.op import reference, registered
from fdkernels.op.pyramid import Pyramid, Sums, Weights, describe, select_layers, unpack
from fdkernels.transforms import apply_plainly

__all__ = ["Call", "Kept", "Pass", "gradient_of_sums", "run_kernels", "run_pass", "with_losses"]


class Call(NamedTuple):
    """What a call asks for, whole from the public function to the kernels.

    Attributes:
        backend: the name of an available backend.
        pyramid: the layers.
        options: how sums become losses, with a reduction; None for sums and masses alone.
        ranks: those whose samples are one batch, or None.
        tap: whether the features are returned, too, and take the gradient of what uses them.
        adds_up: whether the losses of the layers are returned as their sum.
    """

    backend: str
    pyramid: Pyramid
    options: Options | None = None
    ranks: Ranks | None = None
    tap: bool = False
    adds_up: bool = False


class Kept(NamedTuple):
    """What forward saves first, for the gradient of the sums; a compiled graph keeps the slopes alone."""

    slopes: Tensor  # (F1) [2, N, ΣC]
    sums: Tensor  # [2, N, ΣC]
    masses: Tensor  # [2, N, L]
    pairing: Tensor | None


class Pass(torch.autograd.Function):
    """Features and weights to losses, sums and masses."""

    @staticmethod
    def forward(ctx: Any, call: Call, weights: Weights | None, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Run the kernels.

        Args:
            call: what to compute.
            weights: [N, P_l] of each layer, where they need no gradient; None where they are among `tensors`.
            tensors: the pairing or None; the features [N, C_l, *S_l]; unless given, all `fg`, then all `bg`.
                (The pairing is among them because torch.compile drops `ctx` from a forward without gradients
                that has as many arguments as parameters.)

        Returns:
            losses [L], under `call.adds_up` their sum [], and sums [2, N, ΣC] or, without `call.options`,
            sums and masses [2, N, L]; under `call.tap` followed by the features. A compiled graph has no sums
            beside losses: it would hand zeros to the backward of an unused output.
        """
        pairing, *rest = tensors
        num_layers = len(call.pyramid.layers)
        features: list[Tensor] = rest[:num_layers]  # type: ignore[assignment]
        if weights is None:
            weights = Weights(rest[num_layers : 2 * num_layers], rest[2 * num_layers :])  # type: ignore[arg-type]
        needs = ctx.needs_input_grad
        mask_gradient = True in needs[_FIRST_FEATURE + num_layers :]
        with_slopes = True in needs[_FIRST_FEATURE : _FIRST_FEATURE + num_layers]
        out = run_kernels(call, features, weights, pairing, with_slopes)
        keeps_sums = not torch.compiler.is_compiling()
        derivable = keeps_sums and call.options is not None  # a second time, from the sums
        kept = (out.sums, out.masses, pairing) if derivable else (None, None, None)
        ctx.save_for_backward(
            out.slopes, *kept, *weights.fg, *weights.bg, *(features if mask_gradient else ())
        )
        ctx.call, ctx.keeps_sums, ctx.mask_gradient = call, keeps_sums, mask_gradient
        ctx.has_bg, ctx.num_weights = len(weights.bg) > 0, len(rest) - num_layers
        ctx.set_materialize_grads(False)
        # Not views to autograd, which would refuse a change in place by the next layer.
        aliases = [layer.detach() for layer in features] if call.tap else []
        if out.losses is None:
            if not mask_gradient:
                ctx.mark_non_differentiable(out.masses)
            return out.sums, out.masses, *aliases
        return (out.losses, out.sums, *aliases) if keeps_sums else (out.losses, *aliases)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Write the gradients of the features, and of weights that require one.

        Args:
            grad_outputs: of losses [L] or [] and sums [2, N, ΣC], or of sums and masses [2, N, L]; then of
                the tapped features.
        """
        call: Call = ctx.call
        pyramid, num_layers = call.pyramid, len(call.pyramid.layers)
        grad_losses = grad_sums = grad_masses = None
        if call.options is None:
            grad_sums, grad_masses, *upstream = grad_outputs
        elif ctx.keeps_sums:
            grad_losses, grad_sums, *upstream = grad_outputs
        else:
            grad_losses, *upstream = grad_outputs
        if grad_losses is not None and call.adds_up:
            grad_losses = grad_losses.expand(num_layers)
        slopes, sums, masses, pairing, *rest = ctx.saved_tensors
        kept = Kept(slopes, sums, masses, pairing)
        ends = num_layers, num_layers * (2 if ctx.has_bg else 1)
        weights, features = Weights(rest[: ends[0]], rest[ends[0] : ends[1]]), rest[ends[1] :]
        g, factor = gradient_of_sums(ctx, kept, grad_losses, grad_sums)
        needs = ctx.needs_input_grad[_FIRST_FEATURE:]
        grads: list[Tensor | None] = [None] * num_layers
        wanted = [index for index in range(num_layers) if needs[index]]
        if g is None:
            grads = upstream or grads
        elif wanted:
            written = registered.gradient(
                select_layers(g, pyramid, wanted),
                factor[wanted] if factor is not None and len(wanted) < num_layers else factor,
                weights.select(wanted),
                [upstream[index] for index in wanted] if upstream else [],
                pyramid.select(wanted),
                call.backend,
            )
            for index, grad in zip(wanted, written, strict=True):
                grads[index] = grad
        of_weights: Sequence[Tensor | None] = [None] * ctx.num_weights
        if ctx.mask_gradient:
            of_weights = _gradient_of_weights(ctx, g, grad_masses, weights, features)
        return (*[None] * _FIRST_FEATURE, *grads, *of_weights)


# Where the features begin among the arguments of `Pass.forward`.
_FIRST_FEATURE = 3


def run_pass(
    call: Call, features: Sequence[Tensor], weights: Weights, pairing: Tensor | None
) -> tuple[Tensor, ...]:
    """Apply `Pass` to features [N, C_l, *S_l] and weights [N, P_l], and return what it returns."""
    # A compiler has to see every tensor, autograd those that need a gradient; elsewhere each costs time.
    seen = torch.compiler.is_compiling() or weights.fg[0].requires_grad
    given = (None, pairing, *features, *weights.fg, *weights.bg) if seen else (weights, pairing, *features)
    outputs: tuple[Tensor, ...] = apply_plainly(Pass, call, *given)
    return outputs


def run_kernels(
    call: Call,
    features: Sequence[Tensor],
    weights: Weights,
    pairing: Tensor | None,
    with_slopes: bool,
    known: Sequence[Tensor | None] = (),
) -> Sums:
    """The forward of a call. Over a group, losses and slopes [2, R·N, ΣC] are those of all ranks' samples.

    `known` holds the sums [2, N, C_l] of layers that need not be read, if any.
    """
    has_known = any(sums is not None for sums in known)
    if not has_known and (call.options is None or call.ranks is None):
        return registered.sums(
            features, weights, call.pyramid, call.options, pairing, with_slopes, call.backend, call.adds_up
        )
    if has_known:
        own = _with_known(call, features, weights, known)
    else:
        own = registered.sums(features, weights, call.pyramid, None, None, False, call.backend)
    return own if call.options is None else with_losses(call, own, pairing)


def with_losses(call: Call, own: Sums, pairing: Tensor | None) -> Sums:
    """Sums [2, N, ΣC] and masses [2, N, L] of this rank with losses and slopes, over a group of all ranks."""
    assert call.options is not None
    of_all = own.sums, own.masses
    if call.ranks is not None:
        of_all = gather_batch(own.sums, call.ranks), gather_batch(own.masses, call.ranks)
    losses, slopes = registered.losses(*of_all, call.pyramid, call.options, pairing, call.backend)
    return Sums(own.sums, own.masses, losses.sum() if call.adds_up else losses, slopes)


def _with_known(
    call: Call, features: Sequence[Tensor], weights: Weights, known: Sequence[Tensor | None]
) -> Sums:
    """Sums [2, N, ΣC] and masses [2, N, L]; of layers whose sums are known the kernel reads no channel."""
    read = [
        layer if sums is None else layer.narrow(1, 0, 0) for layer, sums in zip(features, known, strict=True)
    ]
    pyramid = describe(read)
    found = registered.sums(read, weights, pyramid, None, None, False, call.backend)
    parts = zip(found.sums.split(pyramid.channels, dim=-1), known, strict=True)
    all_sums = torch.cat([part if sums is None else sums for part, sums in parts], dim=-1)
    return Sums(all_sums.to(call.pyramid.dtype), found.masses, None, None)


def gradient_of_sums(
    ctx: Any, kept: Kept, grad_losses: Tensor | None, grad_sums: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return g of (R3) as `gradient` takes it: [2, N, ΣC], and the factor [L] of each layer or None for 1."""
    call: Call = ctx.call
    if grad_losses is None or call.options is None:
        return grad_sums, None
    if torch.is_grad_enabled() and ctx.keeps_sums:
        g = _differentiable_slopes(ctx, call.options, kept, grad_losses)
    elif call.ranks is None and grad_sums is None:
        return kept.slopes, grad_losses
    else:
        g = kept.slopes * registered.expand_factor(grad_losses, call.pyramid)
        if call.ranks is not None:
            g = reduce_batch(g, call.ranks)
    return g if grad_sums is None else g + grad_sums, None


def _differentiable_slopes(ctx: Any, options: Options, kept: Kept, grad_losses: Tensor) -> Tensor:
    """∂(Σ_l G_l·L_l)/∂S [2, N, ΣC] as a function of the sums and of G = grad_losses, in float64."""
    call: Call = ctx.call
    with torch.enable_grad():
        # An alias, so that the inner derivative ends at it and not at what made the sums.
        S = kept.sums.view_as(kept.sums) if kept.sums.requires_grad else kept.sums.detach().requires_grad_()
        sums, masses = reference.wide(S), reference.wide(kept.masses)
        if call.ranks is not None:
            sums, masses = gather_batch(sums, call.ranks), gather_batch(masses, call.ranks)
        losses = reference.losses_of(sums, masses, call.pyramid, options, kept.pairing)
        return torch.autograd.grad(losses, S, grad_losses.to(losses.dtype), create_graph=True)[0]


def _gradient_of_weights(
    ctx: Any, g: Tensor | None, grad_masses: Tensor | None, weights: Weights, features: Sequence[Tensor]
) -> list[Tensor | None]:
    """(R4) for weights that require a gradient: all `fg`, then all `bg`, [N, P_l] each."""
    grads: list[list[Tensor | None]] = [[None] * len(weights.fg), [None] * len(weights.bg)]
    if g is not None:
        grads = [list(of_all) for of_all in registered.mask_gradient(g, weights, features, ctx.call.backend)]
    if grad_masses is not None:
        of_fg, of_bg = grad_masses  # [N, L] each
        if not weights.bg:
            of_fg = of_fg - of_bg  # M_bg is the sum of 1 - fg
        for of_all, of_masses in zip(grads, (of_fg, of_bg), strict=True):
            for index, grad in enumerate(of_all):
                column = of_masses[:, index, None]  # [N, 1]
                of_all[index] = column.expand(weights.fg[index].shape) if grad is None else grad + column
    return grads[0] + grads[1]


def _sum_again(features: Sequence[Tensor], weights: Weights, backend: str) -> Tensor:
    """(R2) of cotangents, [2, N, ΣC]; differentiable with respect to both."""
    call = Call(backend, describe(features))
    sums: Tensor = Pass.apply(call, None, None, *features, *weights.fg, *weights.bg)[0]
    return sums


def _gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_sums, factor, fg, bg, _, upstream_layers, pyramid, backend = inputs
    ctx.save_for_backward(grad_sums, factor, *fg, *bg)
    ctx.pyramid, ctx.backend = unpack(pyramid), backend
    ctx.upstream_layers = list(upstream_layers)
    # torch takes an empty list of integers for one of tensors, whose gradient is a list.
    ctx.grad_of_integers = None if ctx.upstream_layers else []


def _gradient_backward(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """(R5) of `gradient`, which is linear in g = grad_sums·factor, in the weights and in `upstream`."""
    grad_sums, factor, *rest = ctx.saved_tensors
    pyramid: Pyramid = ctx.pyramid
    num_layers = len(pyramid.layers)
    weights = Weights(rest[:num_layers], rest[num_layers:])
    u = [
        torch.zeros(layer.shape, dtype=layer.dtype, device=grad_sums.device) if given is None else given
        for given, layer in zip(cotangents, pyramid.layers, strict=True)
    ]
    of_g = _sum_again(u, weights, ctx.backend)  # [2, N, ΣC]
    g, of_factor = grad_sums, None
    if factor is not None:
        parts = (of_g * grad_sums).split(pyramid.channels, dim=-1)
        of_factor = torch.stack([part.sum() for part in parts])
        g = grad_sums * registered.expand_factor(factor, pyramid)
        of_g = of_g * registered.expand_factor(factor, pyramid)
    of_weights = Weights([None] * len(weights.fg), [None] * len(weights.bg))  # type: ignore[list-item]
    if any(weight.requires_grad for weight in rest):
        of_weights = registered.mask_gradient(g, weights, u, ctx.backend)
    of_upstream = [cotangents[layer] for layer in ctx.upstream_layers]
    return of_g, of_factor, *map(list, of_weights), of_upstream, ctx.grad_of_integers, None, None


def _mask_gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_sums, fg, bg, features, backend = inputs
    ctx.save_for_backward(grad_sums, *fg, *bg, *features)
    ctx.num_layers, ctx.has_bg, ctx.backend = len(fg), bool(bg), backend


def _mask_gradient_backward(
    ctx: Any, of_fg: Sequence[Tensor | None], of_bg: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """(R5) of `mask_gradient`, which is linear in g and in the features; the weights only select pixels."""
    grad_sums, *rest = ctx.saved_tensors
    num_layers = ctx.num_layers
    fg, features = rest[:num_layers], rest[-num_layers:]
    bg = rest[num_layers:-num_layers]
    r_fg = _materialized(of_fg, fg, grad_sums.dtype)
    if bg:
        r_bg = _materialized(of_bg, fg, grad_sums.dtype)
        valid = [(w_fg != 0) | (w_bg != 0) for w_fg, w_bg in zip(fg, bg, strict=True)]
        r_fg = [torch.where(v, r, 0) for v, r in zip(valid, r_fg, strict=True)]
        r_bg = [torch.where(v, r, 0) for v, r in zip(valid, r_bg, strict=True)]
    else:
        r_bg = [-r for r in r_fg]  # with the background implied, fg stands for both: ∂/∂fg is a difference
    r = Weights([each.contiguous() for each in r_fg], [each.contiguous() for each in r_bg])
    of_g = _sum_again(features, r, ctx.backend)
    of_features = registered.gradient(grad_sums, None, r, [], describe(features), ctx.backend)
    return of_g, [None] * len(fg), [None] * len(bg), of_features, None


def _materialized(grads: Sequence[Tensor | None], like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.zeros_like(weight, dtype=dtype) if grad is None else grad
        for grad, weight in zip(grads or [None] * len(like), like, strict=True)
    ]


torch.library.register_autograd("fdkernels::gradient", _gradient_backward, setup_context=_gradient_setup)
torch.library.register_autograd(
    "fdkernels::mask_gradient", _mask_gradient_backward, setup_context=_mask_gradient_setup
)
