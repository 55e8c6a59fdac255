"""Taps under autograd, set before the loss is known: `Tap` and `FromTaps` do what `Pass` does, in two nodes.

A `Tap` returns its features and a placeholder for their region sums, whose values are never read; to autograd
the losses are a function of the placeholders. The gradient of a placeholder is g of (R3). Once it and the
upstream gradient of the features have arrived, the backward of the `Tap` writes their sum in one pass.
`RegionsFromTaps` is the same for more than two regions, whose g travels beside the placeholder. `FromSums`
begins at the sums themselves, where a compiled network has made them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fdkernels.op import registered, registered_regions
from fdkernels.op.autograd import Call, Kept, gradient_of_sums, run_kernels, with_losses
from fdkernels.op.pyramid import Pyramid, Regions, Sums, Weights, accumulate_dtype, describe
from fdkernels.op.region_pass import RegionCall

__all__ = ["FromSums", "FromTaps", "RegionsFromTaps", "Tap", "TapSlot"]


class TapSlot:
    """What the backward of `FromTaps` or `RegionsFromTaps` leaves for the backward of one `Tap`.

    Attributes:
        weights: those of the layer.
        factor: [1], by which g is multiplied, or None.
        takes_factor: whether the backward of the tap multiplies by it; otherwise g comes multiplied.
        backend: the name of the backend.
        regions: of the layer, in place of weights and factor, and their gradient [R or 2R, N, C].
        features: under regions with pivots those of the layer, else empty.
        early, sums: the weights [N, P] that were known before the features were made, and the region sums
            [2, N, C] that came with them; else None. Set by the forward.
    """

    weights: Weights
    factor: Tensor | None
    backend: str
    takes_factor: bool = True
    regions: tuple[Regions, Tensor] | None = None
    features: Sequence[Tensor] = ()
    early: Weights | None = None
    sums: Tensor | None = None

    def gradient(self, g: Tensor, upstream: Tensor | None, pyramid: Pyramid) -> Tensor:
        """Write the gradient (R3) for g [2, N, C], or that of regions, plus the upstream one [N, C, *S].

        Args:
            g: of the placeholder; under regions theirs takes its place.
            upstream: of the features, or None.
            pyramid: describes the layer.
        """
        added = [] if upstream is None else [upstream]
        if self.regions is not None:
            regions, g = self.regions
            call = regions, self.features, added, pyramid, self.backend
            (grad,) = registered_regions.region_gradient(g, *call)
            return grad
        factor = None if self.factor is None else self.factor.to(g.dtype)
        (grad,) = registered.gradient(g, factor, self.weights, added, pyramid, self.backend)
        return grad


class Tap(torch.autograd.Function):
    """Features to themselves and a placeholder for their region sums."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, slot: TapSlot) -> tuple[Tensor, Tensor]:
        """Return the features [N, C, *S] and an unwritten placeholder [2, N, C]."""
        ctx.slot, ctx.pyramid = slot, describe([features])
        ctx.set_materialize_grads(False)
        placeholder = features.new_empty((2, *features.shape[:2]), dtype=accumulate_dtype([features]))
        # Not a view to autograd, which would refuse a change in place by the next layer without naming it;
        # it shares the count of such changes, by which the taps find it.
        return features.detach(), placeholder

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, g: Tensor | None) -> tuple[Tensor | None, None]:
        """Write the gradient (R3) for g [2, N, C], plus the upstream one [N, C, *S], in one pass."""
        if g is None:
            return upstream, None
        return ctx.slot.gradient(g, upstream, ctx.pyramid), None


class FromTaps(torch.autograd.Function):
    """Placeholders of tapped layers to losses, sums and masses; the features are read, unseen by autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        features: Sequence[Tensor],
        weights: Weights,
        pairing: Tensor | None,
        slots: Sequence[TapSlot | None],
        *placeholders: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run the kernels.

        Args:
            call: what to compute.
            features: [N, C_l, *S_l], as each `Tap` returned them.
            weights: [N, P_l] of each layer; they get no gradient.
            pairing: as for `Kernels.sums`.
            slots: that of each `Tap`; None for a layer that needs no gradient.
            placeholders: [2, N, C_l] from each `Tap`, likewise.

        Returns:
            losses [L] and sums [2, N, ΣC] or, without `call.options`, sums and masses [2, N, L].
        """
        known = [
            slot.sums if slot is not None and slot.early is not None and slot.early.fg[0] is fg else None
            for slot, fg in zip(slots, weights.fg, strict=True)
        ]
        out = run_kernels(call, features, weights, pairing, True, known)
        # Saved and not only referred to, so that autograd notices a mask that was modified in place.
        ctx.save_for_backward(out.slopes, out.sums, out.masses, pairing, *weights.fg, *weights.bg)
        ctx.call, ctx.slots, ctx.keeps_sums = call, slots, True
        ctx.set_materialize_grads(False)
        if out.losses is None:
            ctx.mark_non_differentiable(out.masses)
            return out.sums, out.masses
        return out.losses, out.sums

    @staticmethod
    def backward(ctx: Any, first: Tensor | None, second: Tensor | None) -> tuple[Tensor | None, ...]:
        """Hand g of (R3) to each tap: through its placeholder, and its factor and weights through its slot.

        Args:
            first, second: of losses [L] and sums [2, N, ΣC], or of sums and masses [2, N, L].
        """
        call: Call = ctx.call
        grad_losses, grad_sums = (None, first) if call.options is None else (first, second)
        slopes, sums, masses, pairing, *rest = ctx.saved_tensors
        weights = Weights(rest[: len(ctx.slots)], rest[len(ctx.slots) :])
        kept = Kept(slopes, sums, masses, pairing)
        g, factor = gradient_of_sums(ctx, kept, grad_losses, grad_sums)
        if (
            g is not None
            and factor is not None
            and not all(slot is None or slot.takes_factor for slot in ctx.slots)
        ):
            g, factor = g * registered.expand_factor(factor.to(g.dtype), call.pyramid), None
        for index, slot in enumerate(ctx.slots):
            if slot is not None:
                slot.weights, slot.backend = weights.select([index]), call.backend
                slot.factor = None if factor is None else factor[index : index + 1]
        parts: Sequence[Tensor | None] = [None] * len(ctx.slots)
        if g is not None:
            parts = g.split(call.pyramid.channels, dim=-1)
        chosen = (None if slot is None else part for slot, part in zip(ctx.slots, parts, strict=True))
        return (None, None, None, None, None, *chosen)


class FromSums(torch.autograd.Function):
    """Region sums that were made elsewhere to losses."""

    @staticmethod
    def forward(ctx: Any, call: Call, sums: Tensor, masses: Tensor, pairing: Tensor | None) -> Tensor:
        """Run the kernel of the losses.

        Args:
            call: what to compute, with options.
            sums: [2, N, ΣC].
            masses: [2, N, L].
            pairing: as for `Kernels.sums`.

        Returns:
            losses [L].
        """
        out = with_losses(call, Sums(sums, masses, None, None), pairing)
        assert out.losses is not None
        ctx.save_for_backward(out.slopes, sums, masses, pairing)
        ctx.call, ctx.keeps_sums = call, True
        return out.losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the slopes by the gradient of the losses [L]: g of (R3), [2, N, ΣC]."""
        if torch.is_grad_enabled():  # what a compiler made of the sums need not be differentiable again
            raise RuntimeError(
                "the sums of a compiled network have no second derivatives; leave sums_only out of "
                "taps.mask(mask, sums_only=True)"
            )
        g, factor = gradient_of_sums(ctx, Kept(*ctx.saved_tensors), grad_losses, None)
        if g is not None and factor is not None:
            g = g * registered.expand_factor(factor.to(g.dtype), ctx.call.pyramid)
        return None, g, None, None


class RegionsFromTaps(torch.autograd.Function):
    """Placeholders of tapped layers to sums and masses of regions; autograd does not see the features."""

    @staticmethod
    def forward(
        ctx: Any,
        call: RegionCall,
        features: Sequence[Tensor],
        regions: Regions,
        slots: Sequence[TapSlot | None],
        *placeholders: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run the kernels.

        Args:
            call: what to compute.
            features: [N, C_l, *S_l], as each `Tap` returned them.
            regions: their weights get no gradient.
            slots, placeholders: as for `FromTaps`.

        Returns:
            sums [R, N, ΣC], with pivots [2R, N, ΣC], and masses [R, N, L].
        """
        sums, masses = registered_regions.region_sums(features, regions, call.pyramid, call.backend)
        # Without what made them, as a tap's graph holds its slot. They share the count of changes in place.
        read = [] if regions.pivots is None else [layer.detach() for layer in features]
        ctx.save_for_backward(regions.pivots, *regions.weights, *read)
        ctx.call, ctx.slots = call, slots
        ctx.mark_non_differentiable(masses)
        ctx.set_materialize_grads(False)
        return sums, masses

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Hand the gradient of the sums [R or 2R, N, ΣC] to the taps' slots, and zeros to placeholders."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused taps have no second derivatives with several classes or convention='fisher'; "
                "set FeatureTaps(..., fused=False) for them"
            )
        pivots, *rest = ctx.saved_tensors
        call: RegionCall = ctx.call
        num_layers = len(ctx.slots)
        regions, features = Regions(rest[:num_layers], call.selects, pivots), rest[num_layers:]
        zeros: list[Tensor | None] = [None] * num_layers
        if grad_sums is None:
            return None, None, None, None, *zeros
        for index, (slot, g) in enumerate(
            zip(ctx.slots, grad_sums.split(call.pyramid.channels, dim=-1), strict=True)
        ):
            if slot is not None:
                slot.regions = regions.select([index], call.pyramid), g
                slot.features, slot.backend = features[index : index + 1], call.backend
                zeros[index] = g.new_zeros(()).expand(2, *g.shape[1:])
        return None, None, None, None, *zeros
