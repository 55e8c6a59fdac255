"""How far a loss and its gradients may be off, at most: the oracle's formulas in interval arithmetic.

`oracles.truth` moves sums and masses at random a few times, by up to 2 `unit` of what was added up, and
takes how far the loss moves as its band. Where a difference of region features cancels, four moves do not
find the worst. Here the whole box of such moves goes through the formulas: every sum and mass is an
interval, and what comes out encloses the loss and the gradients of any rounding within.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import oracles
from oracles import Formula, Regions, Truth


class Interval(NamedTuple):
    """All numbers from `low` to `high`, for each element of two float64 tensors of one shape."""

    low: Tensor
    high: Tensor

    @classmethod
    def around(cls, middle: Tensor, radius: Tensor | float) -> Interval:
        return cls(middle - radius, middle + radius)

    def __getitem__(self, index: Any) -> Interval:
        return Interval(self.low[index], self.high[index])

    def __add__(self, other: Interval | float) -> Interval:
        other = _interval(other)
        return Interval(self.low + other.low, self.high + other.high)

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low)

    def __sub__(self, other: Interval | float) -> Interval:
        return self + (-_interval(other))

    def __mul__(self, other: Interval | Tensor | float) -> Interval:
        other = _interval(other)
        ends = torch.stack(torch.broadcast_tensors(*(a * b for a in self for b in other)))
        return Interval(ends.amin(0), ends.amax(0))

    def __truediv__(self, other: Interval | Tensor | float) -> Interval:
        """By an interval above 0."""
        other = _interval(other)
        return self * Interval(1 / other.high, 1 / other.low)

    def sum(self, dim: int = -1) -> Interval:
        return Interval(self.low.sum(dim), self.high.sum(dim))

    def square(self) -> Interval:
        ends = torch.stack([self.low**2, self.high**2])
        holds_zero = (self.low <= 0) & (self.high >= 0)
        return Interval(torch.where(holds_zero, 0.0, ends.amin(0)), ends.amax(0))

    def log(self) -> Interval:
        return Interval(self.low.log(), self.high.log())

    def within(self, most: Tensor | float) -> Interval:
        """The part of it from -most to most, which is known to hold the value."""
        most = torch.as_tensor(most, dtype=torch.float64)
        return Interval(self.low.clamp(min=-most), self.high.clamp(max=most))

    def farthest(self, value: Tensor) -> Tensor:
        """The largest distance of a number in the interval from `value`."""
        return torch.maximum(self.high - value, value - self.low).clamp(min=0)


def _interval(value: Interval | Tensor | float) -> Interval:
    if isinstance(value, Interval):
        return value
    value = torch.as_tensor(value, dtype=torch.float64)
    return Interval(value, value)


def _zeros(*shape: int) -> Interval:
    return _interval(torch.zeros(shape, dtype=torch.float64))


class Layer:
    """One layer: its entries, and the gradients of Σ weight·entry with respect to its sums and masses."""

    def __init__(
        self, sums: Regions, formula: Formula, exchange: str, partners: list, eps: float, u: float
    ) -> None:
        self.formula, self.exchange, self.partners, self.eps = formula, exchange, partners, eps
        self.N, self.C = sums.fg.shape
        both = sums.abs_fg + sums.abs_bg
        self.S_fg = Interval.around(sums.fg, 2 * u * (sums.abs_fg + both))
        self.S_bg = Interval.around(sums.bg, 2 * u * (sums.abs_bg + both))
        self.M_fg = Interval.around(sums.fg_mass, 2 * u * sums.fg_mass)
        self.M_bg = Interval.around(sums.bg_mass, 2 * u * sums.bg_mass)
        self.pixels = sums.pixels
        self.counts = [oracles.region_features(formula, sums, n) is not None for n in range(self.N)]
        self.f, self.b = zip(*(self._region_features(n) for n in range(self.N)), strict=True)
        self.grad_f = [_zeros(self.C) for _ in range(self.N)]
        self.grad_b = [_zeros(self.C) for _ in range(self.N)]

    def _divisors(self, n: int) -> tuple[Interval, Interval]:
        if self.formula.region_weight == "none":
            return _interval(1.0), _interval(1.0)
        if self.formula.region_weight == "valid":
            return (self.M_fg[n] + self.M_bg[n],) * 2
        if self.formula.region_weight == "region":
            return self.M_fg[n], self.M_bg[n]
        return (_interval(float(self.pixels)),) * 2

    def _region_features(self, n: int) -> tuple[Interval, Interval]:
        if not self.counts[n]:
            return _zeros(self.C), _zeros(self.C)
        w_fg, w_bg = self._divisors(n)
        S_bg = self.M_fg[n] - self.S_fg[n] if self.formula.masked_background else self.S_bg[n]
        return self.S_fg[n] / w_fg, S_bg / w_bg

    def terms(self) -> tuple[list[list[tuple[int, int]]], list[list[tuple[int, int]]]]:
        """The pairs of each logarithm that counts: the samples' own, and the exchange's."""
        own = [[(n, n)] if self.counts[n] else [] for n in range(self.N)]
        crossed: list[list[tuple[int, int]]] = []
        if self.exchange == "shuffle":
            met = (self.counts[i] and self.counts[n] for n, i in enumerate(self.partners))
            crossed = [
                [(i, n)] if ok else [] for (n, i), ok in zip(enumerate(self.partners), met, strict=True)
            ]
        elif self.exchange == "pooled":
            crossed = [[(i, j), (j, i)] for i, j in self.partners if self.counts[i] and self.counts[j]]
        return own, crossed

    def _distance(self, i: int, j: int) -> Interval:
        f, b = self.f[i], self.b[j]
        if self.formula.norm == "batch":
            return (f - b).square()
        if self.formula.norm == "vector":
            return (f - b).square().sum()
        squared = (f - b).sum().square()
        return squared / ((f + b).sum().square() + self.eps) if self.formula.norm == "relative" else squared

    def add_term(self, pairs: list[tuple[int, int]], weight: Tensor | float) -> Interval:
        """-s·log(ΣD + eps), [] or [C]; adds the gradient of `weight` times it."""
        T = self._distance(*pairs[0])
        for pair in pairs[1:]:
            T = T + self._distance(*pair)
        scale = -self.formula.log_scale
        q = _interval(scale * torch.as_tensor(weight, dtype=torch.float64)) / (T + self.eps)
        most = (scale * torch.as_tensor(weight, dtype=torch.float64)).abs() / math.sqrt(
            self.eps
        )  # |2d|/(d²+eps)
        for i, j in pairs:
            f, b = self.f[i], self.b[j]
            if self.formula.norm in ("batch", "vector"):
                g_f = (q * (f - b) * 2.0).within(most)
                g_b = -g_f
            elif self.formula.norm == "channel_sum":
                g_f = (q * (f - b).sum() * 2.0).within(most) * torch.ones(self.C, dtype=torch.float64)
                g_b = -g_f
            else:
                d, s = (f - b).sum(), (f + b).sum()
                R = s.square() + self.eps
                g = (q * d * 2.0 / R).within(most / R.low.sqrt())
                ratio = d * s / R
                ones = torch.ones(self.C, dtype=torch.float64)
                g_f, g_b = g * (_interval(1.0) - ratio) * ones, -(g * (ratio + 1.0)) * ones
            self.grad_f[i], self.grad_b[j] = self.grad_f[i] + g_f, self.grad_b[j] + g_b
        return -((T + self.eps).log() * self.formula.log_scale)

    def entries(self, weights: Tensor) -> Interval:
        """The entries, [N] or [C], under the weights [N] or [C] of their gradient."""
        own, crossed = self.terms()
        if self.formula.norm == "batch":
            total = _zeros(self.C)
            for terms in (own, crossed):
                pairs = [pair for term in terms for pair in term]
                if pairs:
                    total = total + self.add_term(pairs, weights)
            return total
        entries = [_zeros() for _ in range(self.N)]
        for n in range(self.N):
            for term in [own[n], crossed[n] if self.exchange == "shuffle" else []]:
                if term:
                    entries[n] = entries[n] + self.add_term(term, weights[n])
        if self.exchange == "pooled" and crossed:
            counted = torch.tensor(self.counts)
            share = weights[counted].sum() / len(crossed)
            shared = _zeros()
            for term in crossed:
                shared = shared + self.add_term(term, share) * (1 / len(crossed))
            entries = [e + shared if ok else e for e, ok in zip(entries, self.counts, strict=True)]
        return Interval(torch.stack([e.low for e in entries]), torch.stack([e.high for e in entries]))

    def gradients(self) -> tuple[list[Interval], list[Interval], list[Interval], list[Interval]]:
        """With respect to S_fg and S_bg, [C] a sample, and to M_fg and M_bg."""
        found: tuple[list[Interval], ...] = ([], [], [], [])
        for n in range(self.N):
            if not self.counts[n]:
                for part, shape in zip(found, ((self.C,), (self.C,), (), ()), strict=True):
                    part.append(_zeros(*shape))
                continue
            w_fg, w_bg = self._divisors(n)
            by_fg, by_bg = self.grad_f[n] / w_fg, self.grad_b[n] / w_bg
            of_fg, of_bg = (by_fg * self.f[n]).sum(), (by_bg * self.b[n]).sum()
            mass_fg, mass_bg = _zeros(), _zeros()
            if self.formula.region_weight == "valid":
                mass_fg = mass_bg = -(of_fg + of_bg)
            elif self.formula.region_weight == "region":
                mass_fg, mass_bg = -of_fg, -of_bg
            if self.formula.masked_background:
                mass_fg = mass_fg + by_bg.sum()
                by_fg, by_bg = by_fg - by_bg, _zeros(self.C)
            for part, value in zip(found, (by_fg, by_bg, mass_fg, mass_bg), strict=True):
                part.append(value)
        return found  # type: ignore[return-value]


def stacked(intervals: Sequence[Interval], dim: int = 0) -> Interval:
    return Interval(*(torch.stack(ends, dim) for ends in zip(*intervals, strict=True)))


def _feature_gradient(g_fg: Interval, g_bg: Interval, fg: Tensor, bg: Tensor, rounding: Tensor) -> Interval:
    """g_fg·w_fg + g_bg·w_bg, [N, C, P] of [N, C] and [N, P]; weights are rounded, but not below 0."""
    total = _interval(0.0)
    for g, w in ((g_fg, fg), (g_bg, bg)):
        rounded = Interval((w - rounding).clamp(min=0), w + rounding)
        total = total + g[:, :, None] * rounded[:, None]
    return total


def widest(
    truth: Truth,
    features: Sequence[Tensor],
    mask: Tensor,
    upstream: Callable[[Tensor], Tensor],
    *,
    convention: str | Formula = "paper",
    exchange: str = "none",
    pairing: Tensor | None = None,
    layer_weights: Tensor | None = None,
    mask_resize: str | None = None,
    ignore_index: float | None = None,
    eps: float = 1e-12,
    reduction: str = "mean",
) -> Truth:
    """The truth of a call with the bands of interval arithmetic, which no rounding within `unit` leaves."""
    formula = oracles.formula_of(convention)
    over_batch = formula.norm == "batch"
    how = mask_resize or ("max" if convention == "released" else "area")
    u = oracles.unit(*(layer.dtype for layer in features))
    alpha = torch.ones(len(features)) if layer_weights is None else layer_weights.detach()
    G = upstream(truth.loss).double()
    wide = mask.detach().cpu().double().requires_grad_()
    squeezed = wide.squeeze(1) if wide.dim() == features[0].dim() else wide

    losses, of_features, of_weights, of_mask = [], [], [], torch.zeros_like(wide)
    first = 0  # entry of the layer, where they stand in a row
    for index, (layer, weight) in enumerate(zip(features, alpha.cpu().double(), strict=True)):
        F = layer.detach().cpu().double()
        sums = oracles.region_sums(F.to(layer.dtype), mask.detach().cpu(), how, ignore_index)
        here = Layer(sums, formula, exchange, [] if pairing is None else pairing.tolist(), eps, u)
        size = here.C if over_batch else here.N
        share = 1.0  # of an entry in the result
        if reduction == "mean":
            counted = (here.C if any(here.counts) else 0) if over_batch else sum(here.counts)
            share = 1 / max(counted, 1) / (len(features) if layer_weights is None else 1)
        if reduction != "none":
            slopes = G.expand(size) * share
        elif over_batch:
            slopes = G[first : first + size]
        else:
            slopes = G if len(features) == 1 else G[:, index]
        first += size
        entries = here.entries(slopes * weight)
        losses.append(entries * (weight * share))
        of_weights.append((entries * slopes).sum())
        g_fg, g_bg, g_fg_mass, g_bg_mass = (stacked(part) for part in here.gradients())
        y, v = oracles.resize_mask(squeezed, layer.shape[2:], how, ignore_index)
        fg, bg = (v * y).detach(), (v * (1 - y)).detach()
        grad = _feature_gradient(g_fg, g_bg, fg, bg, 2 * u * v)
        of_features.append(Interval(grad.low.view(F.shape), grad.high.view(F.shape)))
        if mask.requires_grad:
            inside = torch.where(v[:, None] > 0, F.flatten(2), 0.0)
            of_y = ((g_fg - g_bg)[:, :, None] * inside).sum(1) + (g_fg_mass - g_bg_mass)[:, None]
            # The truth lies inside: no value is farther from it than the interval is wide.
            width = (of_y.high - of_y.low) * v
            of_mask = of_mask + torch.autograd.grad(y, wide, width, materialize_grads=True)[0]

    if reduction != "none":
        box = stacked([part.sum() for part in losses]).sum()
    elif over_batch:
        box = Interval(*(torch.cat(ends) for ends in zip(*losses, strict=True)))
    else:
        box = losses[0] if len(losses) == 1 else stacked(losses, 1)
    boxes = [x.farthest(grad) for x, grad in zip(of_features, truth.grads, strict=False)]
    boxes += [of_mask] if mask.requires_grad else []
    if len(boxes) < len(truth.grads):
        boxes.append(stacked(of_weights).farthest(truth.grads[-1]))
    bands = [torch.maximum(*pair) for pair in zip(boxes, truth.bands, strict=True)]
    return truth._replace(loss_band=torch.maximum(box.farthest(truth.loss), truth.loss_band), bands=bands)
