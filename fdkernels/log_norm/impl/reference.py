"""Backend `reference` of log_norm: the specification in plain PyTorch, for any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdkernels.log_norm.options import Options

__all__ = ["backward", "forward"]


def forward(
    sums: Tensor,
    masses: Tensor,
    pairing: Tensor | None,
    channels: Sequence[int],
    pixels: Sequence[int],
    options: Options,
) -> Tensor:
    """Losses [L], or [N, L] ([ΣC] over the batch) without reduction, by (L1) to (L6)."""
    losses = []
    for index, S in enumerate(sums.split(list(channels), dim=-1)):  # [2, N, C]
        layer = _region_features(S, masses[..., index], pixels[index], options)
        counted = layer.counts.any() if options.norm == "batch" else layer.counts
        entries = torch.zeros_like(S[0].sum(0 if options.norm == "batch" else 1))  # [C] or [N]
        for term in _terms(layer, pairing, options):
            entries = entries + term.loss(layer, options)
        entries = torch.where(counted, entries, 0)
        if options.reduction != "none":
            entries = entries.sum()
        if options.reduction == "mean":
            entries = entries / _number_of_entries(counted, channels[index])
        losses.append(entries)
    if options.reduction != "none":
        return torch.stack(losses)
    return torch.cat(losses) if options.norm == "batch" else torch.stack(losses, dim=-1)


def backward(
    grad_loss: Tensor,
    sums: Tensor,
    masses: Tensor,
    pairing: Tensor | None,
    channels: Sequence[int],
    pixels: Sequence[int],
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The gradients of sums [2, N, ΣC] and masses [2, N, L], by (L7)."""
    grad_sums, grad_masses = [], []
    start = 0
    for index, S in enumerate(sums.split(list(channels), dim=-1)):
        M = masses[..., index]
        layer = _region_features(S, M, pixels[index], options)
        if options.reduction != "none":
            G = grad_loss[index]
        elif options.norm == "batch":
            G = grad_loss[start : start + channels[index]]
        else:
            G = grad_loss[:, index]
        start += channels[index]
        counted = layer.counts.any() if options.norm == "batch" else layer.counts
        if options.reduction == "mean":
            G = G / _number_of_entries(counted, channels[index])
        G = torch.where(counted, G, 0)
        grad_f, grad_b = torch.zeros_like(layer.f), torch.zeros_like(layer.b)
        for term in _terms(layer, pairing, options):
            term.add_gradient(layer, G, grad_f, grad_b, options)
        grad_S, grad_M = _through_weights(layer, grad_f, grad_b, options)
        grad_sums.append(grad_S)
        grad_masses.append(grad_M)
    return torch.cat(grad_sums, dim=-1), torch.stack(grad_masses, dim=-1)


class _Layer(NamedTuple):
    """f [N, C] and b [N, C] of (L1), what divided them [N], and which samples count [N]."""

    f: Tensor
    b: Tensor
    w_fg: Tensor
    w_bg: Tensor
    counts: Tensor


def _region_features(S: Tensor, M: Tensor, pixels: int, options: Options) -> _Layer:
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
    return _Layer(f, b, w_fg, w_bg, counts)


def _through_weights(
    layer: _Layer, grad_f: Tensor, grad_b: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """grad_f and grad_b [N, C] back through (L1) to sums [2, N, C] and masses [2, N]."""
    keep = layer.counts.unsqueeze(-1)
    grad_S_fg = torch.where(keep, grad_f / layer.w_fg.unsqueeze(-1), 0)
    grad_S_bg = torch.where(keep, grad_b / layer.w_bg.unsqueeze(-1), 0)
    grad_w_fg, grad_w_bg = -(grad_S_fg * layer.f).sum(-1), -(grad_S_bg * layer.b).sum(-1)
    zero = torch.zeros_like(grad_w_fg)
    if options.region_weight == "valid":
        grad_M_fg = grad_M_bg = grad_w_fg + grad_w_bg
    elif options.region_weight == "region":
        grad_M_fg, grad_M_bg = grad_w_fg, grad_w_bg
    else:
        grad_M_fg = grad_M_bg = zero
    if options.masked_background:
        grad_M_fg = grad_M_fg + grad_S_bg.sum(-1)
        grad_S_fg, grad_S_bg = grad_S_fg - grad_S_bg, torch.zeros_like(grad_S_bg)
    return torch.stack([grad_S_fg, grad_S_bg]), torch.stack([grad_M_fg, grad_M_bg])


class _Term(NamedTuple):
    """One logarithm of an entry: the pairs (i, j) [K] whose distances its argument adds up.

    `crossed` adds D_ji to D_ij; `shared` makes the mean over the pairs that met part of every entry.
    """

    i: Tensor
    j: Tensor
    met: Tensor
    crossed: bool
    shared: bool

    def distance(self, layer: _Layer, options: Options) -> Tensor:
        """D [K], or [C] over the batch."""
        D = _distance(layer.f[self.i], layer.b[self.j], options)
        if self.crossed:
            D = D + _distance(layer.f[self.j], layer.b[self.i], options)
        if options.norm == "batch":
            D = torch.where(self.met.unsqueeze(-1), D, 0).sum(0)
        return D

    def loss(self, layer: _Layer, options: Options) -> Tensor:
        """-s·log(D + ε) where the pair met, else 0; [N] or [C]."""
        met = self.met.any() if options.norm == "batch" else self.met
        argument = torch.where(met, self.distance(layer, options) + options.eps, 1)
        loss = -options.log_scale * argument.log()
        if self.shared and options.norm != "batch":
            return loss.sum() / self.met.sum().clamp(min=1)
        return loss

    def add_gradient(
        self, layer: _Layer, G: Tensor, grad_f: Tensor, grad_b: Tensor, options: Options
    ) -> None:
        """Add the gradient of `loss` to grad_f and grad_b [N, C]; G [N] or [C] is the entries' upstream."""
        if self.shared and options.norm != "batch":
            G = (G.sum() / self.met.sum().clamp(min=1)).expand(self.i.shape)
        met = self.met.any() if options.norm == "batch" else self.met
        argument = torch.where(met, self.distance(layer, options) + options.eps, 1)
        q = -options.log_scale * G / argument
        if options.norm != "batch":
            q = q.unsqueeze(-1)  # [K, 1]
        pairs = [(self.i, self.j), (self.j, self.i)] if self.crossed else [(self.i, self.j)]
        for i, j in pairs:
            d_f, d_b = _distance_gradient(layer.f[i], layer.b[j], options)
            keep = self.met.unsqueeze(-1)
            grad_f.index_add_(0, i, torch.where(keep, q * d_f, 0))
            grad_b.index_add_(0, j, torch.where(keep, q * d_b, 0))


def _terms(layer: _Layer, pairing: Tensor | None, options: Options) -> list[_Term]:
    own = torch.arange(layer.counts.shape[0], device=layer.counts.device)
    terms = [_Term(own, own, layer.counts, crossed=False, shared=False)]
    if options.exchange == "shuffle" and pairing is not None:
        met = layer.counts & layer.counts[pairing]
        terms.append(_Term(pairing, own, met, crossed=False, shared=False))
    if options.exchange == "pooled" and pairing is not None:
        used = (pairing >= 0).all(-1)
        i, j = pairing.clamp(min=0).unbind(-1)
        met = used & layer.counts[i] & layer.counts[j]
        terms.append(_Term(i, j, met, crossed=True, shared=True))
    return terms


def _distance(f: Tensor, b: Tensor, options: Options) -> Tensor:
    """D [K] of (L2) for rows f [K, C] and b [K, C]; [K, C] over the batch."""
    if options.norm == "batch":
        return (f - b).square()
    if options.norm == "vector":
        return (f - b).square().sum(-1)
    x, z = (f - b).sum(-1), (f + b).sum(-1)
    return x.square() / (z.square() + options.eps) if options.norm == "relative" else x.square()


def _distance_gradient(f: Tensor, b: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """∂D/∂f and ∂D/∂b, [K, C] each (or [K, 1], the same for all channels)."""
    if options.norm in ("batch", "vector"):
        return 2 * (f - b), -2 * (f - b)
    x, z = (f - b).sum(-1, keepdim=True), (f + b).sum(-1, keepdim=True)
    d = z.square() + options.eps if options.norm == "relative" else torch.ones_like(z)
    turn = x * z / d if options.norm == "relative" else torch.zeros_like(z)
    d_f, d_b = 2 * x / d * (1 - turn), -2 * x / d * (1 + turn)
    return d_f.expand_as(f), d_b.expand_as(b)


def _number_of_entries(counted: Tensor, channels: int) -> Tensor:
    number = counted.sum() if counted.dim() else counted * channels
    return number.clamp(min=1)
