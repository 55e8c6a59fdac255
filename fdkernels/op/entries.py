"""Losses of the sums of several regions: each class of each sample is one sample more to the loss.

An entry sets one region of a sample against others. Put side by side, the entries of all samples are a
batch of N·E samples with a foreground and a background each, of which the formulas and kernels of two regions
make losses. What they say of samples that do not count holds for entries. README.md beside this file, (C5)
to (C7).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdkernels.classes import Classes
from fdkernels.conventions import Options
from fdkernels.exchange import Ranks, gather_batch
from fdkernels.op import loss_formulas, registered
from fdkernels.op.loss_formulas import Moments, for_channels, wide
from fdkernels.op.pyramid import Pyramid
from fdkernels.transforms import in_transform

__all__ = ["GatheredSums", "losses_of_regions"]


class GatheredSums:
    """The sums of the regions of a batch, over all ranks if there are several.

    Attributes:
        sums: [R, N, ΣC], about the pivots if there are any.
        moments: [R, N, ΣC], or None.
        pivots: [R, N, ΣC], or None.
        masses: [R, N, L].
    """

    def __init__(self, sums: Tensor, masses: Tensor, pivots: Tensor | None, ranks: Ranks | None) -> None:
        rows = sums if pivots is None else torch.cat([sums, pivots.to(sums.dtype)])
        if ranks is not None:
            rows, masses = gather_batch(rows, ranks), gather_batch(masses, ranks)
        self.masses, R = masses, masses.shape[0]
        self.sums = rows[:R]
        self.moments = None if pivots is None else rows[R : 2 * R]
        self.pivots = None if pivots is None else rows[2 * R :]


def losses_of_regions(
    found: GatheredSums,
    pyramid: Pyramid,
    options: Options,
    classes: Classes,
    pairing: Tensor | None,
    backend: str,
) -> Tensor:
    """Compute the losses of every class against its rest, or of the pairs of classes.

    Args:
        found: the sums of all regions.
        pyramid: the layers, of any batch size.
        options: any reduction; not a norm over the batch.
        classes: which regions make an entry.
        pairing: as for `losses_of`, of the N samples.
        backend: makes losses of sums where slopes can express their gradient.

    Returns:
        [L]; without reduction the entries [N, L, E], 0 where they do not count.
    """
    N = found.masses.shape[1]
    if found.moments is not None and found.pivots is not None:
        moments = _moments_of_sides(found.sums, found.moments, found.pivots, found.masses, pyramid, classes)
        (masses,) = _sides(classes, found.masses)  # [2, N·E, L]
        masses, partners = _counted(masses), _partners(pairing, masses.shape[1] // N)
        losses = loss_formulas.fisher_losses_of(moments, masses, pyramid, options, partners)
    else:
        sums, masses = _sides(classes, found.sums, found.masses)  # [2, N·E, ΣC] and [2, N·E, L]
        masses, partners = _counted(masses), _partners(pairing, masses.shape[1] // N)
        if options.reduction != "none" and not found.masses.requires_grad and not in_transform():
            narrow = sums.to(pyramid.dtype), masses.to(pyramid.dtype)
            call = (pyramid, options, partners, backend)
            losses = _LossesOfSums.apply(call, *narrow)
        else:
            losses = loss_formulas.losses_of(sums, masses, pyramid, options, partners)
    E = masses.shape[1] // N
    losses = losses.to(pyramid.dtype)
    return losses if options.reduction != "none" else losses.unflatten(0, (N, E)).transpose(1, 2)


def _sides(classes: Classes, *regions: Tensor) -> tuple[Tensor, ...]:
    """Foreground and background of all entries, [2, N·E, X] of each of some [R, N, X] that regions add up."""
    wides = [wide(values) for values in regions]
    rows = torch.cat(wides, dim=-1) if len(wides) > 1 else wides[0]
    sides = torch.stack(classes.sides(rows)).transpose(1, 2).flatten(1, 2)  # [2, N·E, all X]
    parts: tuple[Tensor, ...] = sides.split([values.shape[-1] for values in regions], dim=-1)
    return parts


def _counted(masses: Tensor) -> Tensor:
    """Masses [2, N·E, L], 0 for entries that lack pixels on either side: these do not count."""
    return torch.where((masses != 0).all(0), masses, 0)


def _partners(pairing: Tensor | None, E: int) -> Tensor | None:
    """The pairing of the entries, which meet the same class of another sample."""
    if pairing is None or E == 1:
        return pairing
    entries = torch.arange(E, device=pairing.device)
    return (pairing.unsqueeze(1) * E + entries).flatten()


def _moments_of_sides(
    sums: Tensor, moments: Tensor, pivots: Tensor, masses: Tensor, pyramid: Pyramid, classes: Classes
) -> Moments:
    """Mean and variance (C5) of both sides of all entries."""
    S, Q, p = wide(sums), wide(moments), wide(pivots)  # [R, N, ΣC]
    M = for_channels(wide(masses), pyramid)  # [R, N, ΣC]
    divisor = _divisor(M)
    regions = torch.stack([M, p + S / divisor, Q - S.square() / divisor], dim=1)  # [R, 3, N, ΣC]
    sides = torch.stack(classes.sides(regions, _join))  # [2, E, 3, N, ΣC]
    M, mean, squares = sides.permute(0, 3, 1, 2, 4).flatten(1, 2).unbind(2)  # [2, N·E, ΣC] each
    return Moments(mean, squares / _divisor(M))


def _join(a: Tensor, b: Tensor) -> Tensor:
    """(C7): mass, mean and squared deviations of two sets of regions, [R, 3, N, ΣC], as those of both."""
    (M_a, mean_a, squares_a), (M_b, mean_b, squares_b) = a.unbind(1), b.unbind(1)
    M, apart = M_a + M_b, mean_b - mean_a
    share = M_b / _divisor(M)
    squares = squares_a + squares_b + M_a * share * apart.square()
    return torch.stack([M, mean_a + share * apart, squares], dim=1)


def _divisor(masses: Tensor) -> Tensor:
    """Masses of any shape, 1 where there is none."""
    return torch.where(masses != 0, masses, 1)


class _LossesOfSums(torch.autograd.Function):
    """Sums [2, N, ΣC] and masses [2, N, L] to losses [L]; the kernel makes their slopes as well."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], sums: Tensor, masses: Tensor) -> Tensor:
        """Run the kernel of the losses."""
        losses, slopes = registered.losses(sums.detach(), masses.detach(), *call)
        ctx.save_for_backward(slopes, sums, masses)
        ctx.call = call
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[None, Tensor, None]:
        """Multiply the slopes (F1), or differentiate the formulas where gradients are recorded."""
        slopes, sums, masses = ctx.saved_tensors
        pyramid, options, pairing, _ = ctx.call
        if not torch.is_grad_enabled():
            return None, slopes * registered.expand_factor(grad_losses, pyramid), None
        S = sums.view_as(sums)
        losses = loss_formulas.losses_of(wide(S), wide(masses), pyramid, options, pairing)
        (grad,) = torch.autograd.grad(losses, S, grad_losses.to(losses.dtype), create_graph=True)
        return None, grad, None
