"""The losses of region sums in plain PyTorch, differentiable, and their slopes written out.

README.md beside this file derives them; (L..), (F1), (C5) and (C6) are its equations. Reductions and
derivatives that slopes cannot express go through `losses_of`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fdkernels.conventions import Options
from fdkernels.op.pyramid import Pyramid

__all__ = ["Moments", "fisher_losses_of", "for_channels", "losses_of", "slopes_of", "wide"]


def wide(numbers: Tensor) -> Tensor:
    """Numbers of any shape in float64, or unchanged on a device that has no float64."""
    return numbers if numbers.device.type == "mps" else numbers.double()


def losses_of(
    sums: Tensor, masses: Tensor, pyramid: Pyramid, options: Options, pairing: Tensor | None
) -> Tensor:
    """Compute the losses (L1) to (L6), differentiable with respect to sums and masses and in their dtype.

    Args:
        sums: [2, N, ΣC]; `wide` numbers, unless few digits are enough.
        masses: [2, N, L].
        pyramid: the layers, of any batch size.
        options: any reduction.
        pairing: int64, [N] for shuffle, [K, 2] for pooled (rows with a negative entry do not count), or None.

    Returns:
        [L]; without reduction the entries [N, L], or [ΣC] where the norm runs over the batch. Entries that do
        not count are 0.
    """
    all_losses = []
    for index, S in enumerate(sums.split(pyramid.channels, dim=-1)):  # [2, N, C]
        layer = _region_features(S, masses[..., index], pyramid.pixels[index], options)
        entries = torch.zeros((), dtype=S.dtype, device=S.device)
        for term in _terms(layer.counts, options, pairing):
            loss = -options.log_scale * _argument(layer, term, options).log()  # [K], or [C] over the batch
            entries = entries + (loss.sum() / _count(term.valid) if term.is_mean else loss)
        counted = _counted(layer, options)
        entries = torch.where(counted, entries, 0)  # [N], or [C] over the batch
        if options.reduction != "none":
            entries = entries.sum()
        if options.reduction == "mean":
            entries = entries / _count(counted)
        all_losses.append(entries)
    if options.reduction != "none":
        return torch.stack(all_losses)
    return torch.cat(all_losses) if options.norm == "batch" else torch.stack(all_losses, dim=-1)


def fisher_losses_of(
    moments: Moments, masses: Tensor, pyramid: Pyramid, options: Options, pairing: Tensor | None
) -> Tensor:
    """Compute the losses (C6) from mean and variance of both sides, as `losses_of` does from sums.

    Args:
        moments: of the foreground and the background.
        masses: [2, N, L].
        pyramid, options, pairing: as for `losses_of`.
    """
    counts = (masses != 0).all(0)  # [N, L]; true for NaN
    keep = for_channels(counts, pyramid)  # [N, ΣC]
    f, b = torch.where(keep, moments.mean, 0)
    spread_fg, spread_bg = _over_channels(torch.where(keep, moments.variance, 0), pyramid)  # [N, L] each
    entries = torch.zeros((), dtype=f.dtype, device=f.device)
    for term in _terms(counts, options, pairing):  # of K pairs
        keep = for_channels(term.valid, pyramid)
        D = torch.zeros((), dtype=f.dtype, device=f.device)
        for i, j in term.pairs:
            # Harmless numbers in the pairs left out, as in `_argument`.
            apart = (torch.where(keep, f[i], 1) - torch.where(keep, b[j], 0)).square()
            spread = torch.where(term.valid, spread_fg[i] + spread_bg[j], 1)
            D = D + _over_channels(apart, pyramid) / (spread + options.eps)  # [K, L]
        loss = -options.log_scale * torch.where(term.valid, D + options.eps, 1).log()
        entries = entries + (loss.sum(0) / _count(term.valid) if term.is_mean else loss)
    entries = torch.where(counts, entries, 0)  # [N, L]
    if options.reduction == "none":
        return entries
    return entries.sum(0) / _count(counts) if options.reduction == "mean" else entries.sum(0)


def for_channels(of_layers: Tensor, pyramid: Pyramid) -> Tensor:
    """What layers have, [..., L], for each of their channels, [..., ΣC]."""
    columns = zip(of_layers.split(1, dim=-1), pyramid.channels, strict=True)
    return torch.cat([column.expand(*column.shape[:-1], C) for column, C in columns], dim=-1)


def _over_channels(values: Tensor, pyramid: Pyramid) -> Tensor:
    """The sum over the channels of each layer, [..., L], of [..., ΣC]."""
    return torch.stack([part.sum(-1) for part in values.split(pyramid.channels, dim=-1)], dim=-1)


class Moments(NamedTuple):
    """Mean and variance (C5) of the features over foreground and background, [2, N, ΣC] each."""

    mean: Tensor
    variance: Tensor


def slopes_of(
    sums: Tensor, masses: Tensor, pyramid: Pyramid, options: Options, pairing: Tensor | None
) -> Tensor:
    """The slopes (F1) [2, N, ΣC] of sums [2, N, ΣC] and masses [2, N, L], for a reduction to one number.

    Written out, as compilers and dispatch modes run an op where autograd does not record.
    """
    slopes = []
    for index, S in enumerate(sums.split(pyramid.channels, dim=-1)):  # [2, N, C]
        layer = _region_features(S, masses[..., index], pyramid.pixels[index], options)
        slopes.append(_slopes(layer, options, pairing))
    return torch.cat(slopes, dim=-1)


class _RegionFeatures(NamedTuple):
    """f and b of (L1) [N, C], 0 in samples that do not count; which samples count [N]; w_fg and w_bg [N]."""

    f: Tensor
    b: Tensor
    counts: Tensor
    w_fg: Tensor
    w_bg: Tensor


def _region_features(S: Tensor, M: Tensor, pixels: int, options: Options) -> _RegionFeatures:
    """(L1) for the sums S [2, N, C] and the masses M [2, N] of one layer."""
    S_fg, S_bg = S
    M_fg, M_bg = M
    V = M_fg + M_bg
    counts = V != 0  # true for NaN: a NaN mask reaches the loss
    if options.masked_background:
        S_bg = M_fg.unsqueeze(-1) - S_fg
    if options.region_weight == "none":
        w_fg = w_bg = torch.ones_like(V)
    elif options.region_weight == "pixels":
        w_fg = w_bg = torch.full_like(V, pixels)
    elif options.region_weight == "valid":
        w_fg = w_bg = V
    else:
        w_fg, w_bg = M_fg, M_bg
        counts = (M_fg != 0) & (M_bg != 0)
    keep = counts.unsqueeze(-1)
    w_fg, w_bg = torch.where(counts, w_fg, 1), torch.where(counts, w_bg, 1)
    f = torch.where(keep, S_fg / w_fg.unsqueeze(-1), 0)
    b = torch.where(keep, S_bg / w_bg.unsqueeze(-1), 0)
    return _RegionFeatures(f, b, counts, w_fg, w_bg)


def _counted(layer: _RegionFeatures, options: Options) -> Tensor:
    """Which entries count, [N]; over the batch [C], all or none."""
    return layer.counts.any().expand(layer.f.shape[-1]) if options.norm == "batch" else layer.counts


def _count(flags: Tensor) -> Tensor:
    """How many samples or pairs [N] count, at least 1; of each layer for [N, L]."""
    return flags.sum(0).clamp(min=1)


class _Term(NamedTuple):
    """One logarithm of an entry, of the summed distances of the pairs (i, j) where valid, [K] or [K, L].

    `is_mean`: the mean over the valid pairs is part of every entry; else pair n is part of entry n.
    """

    pairs: list[tuple[Tensor, Tensor]]
    valid: Tensor
    is_mean: bool = False


def _terms(counts: Tensor, options: Options, pairing: Tensor | None) -> Iterator[_Term]:
    """The logarithms that an entry adds up, (L3) to (L6), for which samples count, [N] or [N, L]."""
    own = torch.arange(counts.shape[0], device=counts.device)
    yield _Term([(own, own)], counts)
    if options.exchange == "shuffle" and pairing is not None:
        yield _Term([(pairing, own)], counts & counts[pairing])
    if options.exchange == "pooled" and pairing is not None:
        used = (pairing >= 0).all(-1).view(-1, *[1] * (counts.dim() - 1))
        i, j = pairing.clamp(min=0).unbind(-1)
        valid = used & counts[i] & counts[j]
        yield _Term([(i, j), (j, i)], valid, is_mean=options.norm != "batch")


def _argument(layer: _RegionFeatures, term: _Term, options: Options) -> Tensor:
    """D + ε where a pair is valid, else 1: [K], or [C] over the batch."""
    keep = term.valid.unsqueeze(-1)
    D = torch.zeros((), dtype=layer.f.dtype, device=layer.f.device)
    for i, j in term.pairs:
        # Harmless numbers in the pairs left out: a NaN there would reach the gradient past `torch.where`.
        D = D + _distance(torch.where(keep, layer.f[i], 1), torch.where(keep, layer.b[j], 0), options)
    valid = term.valid
    if options.norm == "batch":
        D, valid = torch.where(keep, D, 0).sum(0), valid.any()
    return torch.where(valid, D + options.eps, 1)


def _distance(f: Tensor, b: Tensor, options: Options) -> Tensor:
    """D [K] of (L2) for rows f [K, C] and b [K, C]; its summands [K, C] over the batch."""
    if options.norm == "batch":
        return (f - b).square()
    if options.norm == "vector":
        return (f - b).square().sum(-1)
    x, z = (f - b).sum(-1), (f + b).sum(-1)
    return x.square() / (z.square() + options.eps) if options.norm == "relative" else x.square()


def _slopes(layer: _RegionFeatures, options: Options, pairing: Tensor | None) -> Tensor:
    """The slopes (F1) [2, N, C] of one layer, by (L7): the loss is a mean or a sum of its entries."""
    counted = _counted(layer, options)
    G = counted.to(layer.f.dtype)  # [N], or [C] over the batch: the gradient of the entries
    if options.reduction == "mean":
        G = G / _count(counted)
    grad_f, grad_b = torch.zeros_like(layer.f), torch.zeros_like(layer.b)
    for term in _terms(layer.counts, options, pairing):
        of_entry = G.sum() / _count(term.valid) if term.is_mean else G
        q = -options.log_scale * of_entry / _argument(layer, term, options)
        keep = term.valid.unsqueeze(-1)
        for i, j in term.pairs:
            d_f, d_b = _distance_gradient(layer.f[i], layer.b[j], options)
            q_pair = q if options.norm == "batch" else q.unsqueeze(-1)
            grad_f.index_add_(0, i, torch.where(keep, q_pair * d_f, 0))
            grad_b.index_add_(0, j, torch.where(keep, q_pair * d_b, 0))
    keep = layer.counts.unsqueeze(-1)
    slope_fg = torch.where(keep, grad_f / layer.w_fg.unsqueeze(-1), 0)
    slope_bg = torch.where(keep, grad_b / layer.w_bg.unsqueeze(-1), 0)
    if options.masked_background:
        slope_fg, slope_bg = slope_fg - slope_bg, torch.zeros_like(slope_bg)
    return torch.stack([slope_fg, slope_bg])


def _distance_gradient(f: Tensor, b: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """∂D/∂f and ∂D/∂b [K, C] for rows f [K, C] and b [K, C]."""
    if options.norm in ("batch", "vector"):
        return 2 * (f - b), -2 * (f - b)
    x, z = (f - b).sum(-1, keepdim=True), (f + b).sum(-1, keepdim=True)
    d = z.square() + options.eps if options.norm == "relative" else torch.ones_like(z)
    ratio = x * z / d if options.norm == "relative" else torch.zeros_like(z)
    return (2 * x / d * (1 - ratio)).expand_as(f), (-2 * x / d * (1 + ratio)).expand_as(b)
