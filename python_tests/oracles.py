"""Truth for the tests: the formulas in float64, sample by sample and cell by cell.

Nothing here calls the package. Loops stand where the package has pooling, broadcasting or index arithmetic,
so that no mistake can be in both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CONVENTIONS = ("paper", "definition4", "algorithm1", "lemma7", "region_mean", "released")
EXCHANGES = ("none", "shuffle", "pooled")
RESIZES = ("area", "max", "nearest")


class Formula(NamedTuple):
    """How the sums of a layer become its entries."""

    region_weight: str = "valid"
    norm: str = "vector"
    log_scale: float = 1.0
    masked_background: bool = False


FORMULAS = {
    "paper": Formula(),
    "definition4": Formula("none", "channel_sum"),
    "algorithm1": Formula(log_scale=0.5),
    "lemma7": Formula("none", "relative", 0.5),
    "region_mean": Formula("region"),
    "released": Formula("pixels", "batch", 0.5, masked_background=True),
}


def formula_of(convention: str | Formula) -> Formula:
    """The formula itself, or that of a convention."""
    return FORMULAS[convention] if isinstance(convention, str) else convention


def resize_mask(
    mask: Tensor, size: Sequence[int], how: str, ignore_index: float | None = None
) -> tuple[Tensor, Tensor]:
    """y and v, [N, P] of float64, of a mask [N, *S0] at `size`; differentiable with respect to the mask."""
    y = mask.double()
    v = torch.ones_like(y)
    if ignore_index is not None:
        v = (mask.detach().double() != ignore_index).double()
        y = torch.where(v > 0, y, 0.0)
    cells_y, cells_v = [], []
    for cell in itertools.product(*(range(s) for s in size)):
        where = [slice(None)]
        for i, out, total in zip(cell, size, mask.shape[1:], strict=True):
            if how == "nearest":
                nearest = ((2 * i + 1) * total) // (2 * out)  # the pixel that holds the cell's centre
                where.append(slice(nearest, nearest + 1))
            else:
                where.append(slice(i * total // out, -((i + 1) * total // -out)))
        cell_y, cell_v = y[tuple(where)].flatten(1), v[tuple(where)].flatten(1)
        valid = cell_v.sum(1)
        if how == "max":
            best = torch.where(cell_v > 0, cell_y, -1.0).amax(1)
            cells_y.append(torch.where(valid > 0, best, 0.0))
            cells_v.append((valid > 0).double())
        else:
            mean = (cell_v * cell_y).sum(1) / valid.clamp(min=1)
            cells_y.append(mean)
            cells_v.append(valid / cell_v.shape[1])
    return torch.stack(cells_y, 1), torch.stack(cells_v, 1)


Rounding = Callable[[Tensor], Tensor]


class Regions(NamedTuple):
    """Sums [N, C], masses [N] and the sums of the absolute values of what was added up, of one layer."""

    fg: Tensor
    bg: Tensor
    fg_mass: Tensor
    bg_mass: Tensor
    abs_fg: Tensor
    abs_bg: Tensor
    pixels: int


def exactly(value: Tensor) -> Tensor:
    """The value as it is; a test of conditioning moves it by a rounding."""
    return value


def sums_under(
    features: Tensor, w_fg: Tensor, w_bg: Tensor | None = None, rounded: Rounding = exactly
) -> Regions:
    """S, M and Σ|w·F| of features [N, C, *S] under weights [N, P].

    Without `w_bg` every pixel is valid and the background has the weight 1 - w_fg.
    """
    w_fg = w_fg.double()
    valid = torch.ones_like(w_fg) if w_bg is None else ((w_fg != 0) | (w_bg != 0)).double()
    w_bg = 1 - w_fg if w_bg is None else w_bg.double()
    F = torch.where(valid.unsqueeze(1) > 0, features.double().flatten(2), 0.0)  # [N, C, P]
    fg = torch.stack([rounded(F[:, c] * w_fg).sum(1) for c in range(F.shape[1])], 1)
    bg = torch.stack([rounded(F[:, c] * w_bg).sum(1) for c in range(F.shape[1])], 1)
    with torch.no_grad():
        abs_fg, abs_bg = ((F.abs() * w.abs().unsqueeze(1)).sum(2) for w in (w_fg, w_bg))
    return Regions(fg, bg, w_fg.sum(1), w_bg.sum(1), abs_fg, abs_bg, F.shape[2])


def region_sums(
    features: Tensor,
    mask: Tensor,
    how: str = "area",
    ignore_index: float | None = None,
    rounded: Rounding = exactly,
) -> Regions:
    """S, M and Σ|w·F| of features [N, C, *S] under a mask [N, 1, *S0] or [N, *S0]."""
    mask = mask.squeeze(1) if mask.dim() == features.dim() else mask
    y, v = resize_mask(mask, features.shape[2:], how, ignore_index)
    sums = sums_under(features, v * y, v * (1 - y), rounded)
    # A mask that is averaged or narrowed is rounded, by an error that does not shrink with the weight.
    averaged = how == "area" and tuple(mask.shape[1:]) != tuple(features.shape[2:])
    if averaged or mask.dtype == torch.float64:
        with torch.no_grad():
            F = torch.where(v.unsqueeze(1) > 0, features.double().flatten(2), 0.0)
            whole = (F.abs() * v.unsqueeze(1)).sum(2)
        sums = sums._replace(abs_fg=whole, abs_bg=whole)
    return sums


def sums_gradients(features: Tensor, w_fg: Tensor, w_bg: Tensor | None, g: Tensor) -> list[Tensor]:
    """Σ_k g_k·∂S_k of g [2, N, C]: with respect to features, w_fg and, where it is given, w_bg."""
    leaves = [features.detach().double().requires_grad_(), w_fg.detach().double().requires_grad_()]
    if w_bg is not None:
        leaves.append(w_bg.detach().double().requires_grad_())
    sums = sums_under(*leaves)
    return list(torch.autograd.grad((sums.fg, sums.bg), leaves, (g[0].double(), g[1].double())))


def region_features(formula: Formula, sums: Regions, n: int) -> tuple[Tensor, Tensor] | None:
    """f and b [C] of sample n, or None where the sample is left out."""
    M_fg, M_bg = sums.fg_mass[n], sums.bg_mass[n]
    V = M_fg + M_bg
    if V <= 0:  # and not where it is NaN, which must reach the loss
        return None
    S_fg = sums.fg[n]
    S_bg = M_fg - S_fg if formula.masked_background else sums.bg[n]
    if formula.region_weight == "none":
        return S_fg, S_bg
    if formula.region_weight == "valid":
        return S_fg / V, S_bg / V
    if formula.region_weight == "region":
        return None if M_fg <= 0 or M_bg <= 0 else (S_fg / M_fg, S_bg / M_bg)
    return S_fg / sums.pixels, S_bg / sums.pixels


def discrepancy(norm: str, f: Tensor, b: Tensor, eps: float) -> Tensor:
    """D of one pair of region features [C]; [C] for the norm over the batch."""
    if norm == "batch":
        return (f - b) ** 2
    if norm == "vector":
        return ((f - b) ** 2).sum()
    D = (f - b).sum() ** 2
    return D / ((f + b).sum() ** 2 + eps) if norm == "relative" else D


def layer_entries(
    sums: Regions,
    convention: str | Formula,
    exchange: str = "none",
    pairing: Tensor | None = None,
    eps: float = 1e-12,
) -> tuple[Tensor, Tensor]:
    """The entries of a layer, [N] or [C], and which of them count."""
    N, C = sums.fg.shape
    formula = formula_of(convention)
    known = [region_features(formula, sums, n) for n in range(N)]
    partners = [] if pairing is None else pairing.tolist()
    scale = formula.log_scale

    def D(i: int, j: int) -> Tensor:
        return discrepancy(formula.norm, known[i][0], known[j][1], eps)

    def met(*samples: int) -> bool:
        return all(n >= 0 and known[n] is not None for n in samples)

    if exchange == "shuffle":
        crossed = [D(i, n) for n, i in enumerate(partners) if met(i, n)]
    elif exchange == "pooled":
        crossed = [D(i, j) + D(j, i) for i, j in partners if met(i, j)]
    else:
        crossed = []
    if formula.norm == "batch":
        own = [D(n, n) for n in range(N) if met(n)]
        entries = torch.zeros(C, dtype=torch.float64)
        for terms in (own, crossed):
            if terms:
                entries = entries - scale * torch.log(sum(terms) + eps)
        return entries, torch.full((C,), bool(own))
    zero = torch.zeros((), dtype=torch.float64)
    entries = [-scale * torch.log(D(n, n) + eps) if met(n) else zero for n in range(N)]
    if exchange == "shuffle":
        for n, i in enumerate(partners):
            if met(i, n):
                entries[n] = entries[n] - scale * torch.log(D(i, n) + eps)
    if exchange == "pooled" and crossed:
        shared = sum(-scale * torch.log(D_ij + eps) for D_ij in crossed) / len(crossed)
        entries = [e + shared if met(n) else e for n, e in enumerate(entries)]
    counts = torch.tensor([met(n) for n in range(N)], dtype=torch.bool)
    return torch.stack(entries) if entries else torch.zeros(0, dtype=torch.float64), counts


def combine(
    layers: Sequence[tuple[Tensor, Tensor]],
    reduction: str,
    layer_weights: Tensor | None,
    over_batch: bool,
) -> Tensor:
    """The entries of all layers as the result of one call."""
    weights = [1.0] * len(layers) if layer_weights is None else list(layer_weights.double())
    if reduction == "none":
        weighted = [w * entries for w, (entries, _) in zip(weights, layers, strict=True)]
        if over_batch:
            return torch.cat(weighted)
        return weighted[0] if len(weighted) == 1 else torch.stack(weighted, 1)
    total = torch.zeros((), dtype=torch.float64)
    for w, (entries, counts) in zip(weights, layers, strict=True):
        share = max(int(counts.sum()), 1) if reduction == "mean" else 1
        total = total + w * entries.sum() / share
    return total / len(layers) if reduction == "mean" and layer_weights is None else total


def loss(
    features: Sequence[Tensor],
    mask: Tensor,
    *,
    convention: str | Formula = "paper",
    exchange: str = "none",
    pairing: Tensor | None = None,
    layer_weights: Tensor | None = None,
    mask_resize: str | None = None,
    ignore_index: float | None = None,
    eps: float = 1e-12,
    reduction: str = "mean",
    rounded: Rounding = exactly,
) -> Tensor:
    """The feature discrepancy loss in float64, its products and sums as `rounded` leaves them."""
    how = mask_resize or ("max" if convention == "released" else "area")
    layers = []
    for layer in features:
        sums = region_sums(layer, mask, how, ignore_index, rounded)
        # Both by the same scale: a loss compares them, and rounds where they are added and subtracted.
        scale = sums.abs_fg + sums.abs_bg
        sums = sums._replace(
            fg=sums.fg + (rounded(scale) - scale),
            bg=sums.bg + (rounded(scale) - scale),
            fg_mass=rounded(sums.fg_mass),
            bg_mass=rounded(sums.bg_mass),
        )
        layers.append(layer_entries(sums, convention, exchange, pairing, eps))
    return combine(layers, reduction, layer_weights, formula_of(convention).norm == "batch")


class Truth(NamedTuple):
    """What an op must give, each with the error that rounding its inputs' sums explains."""

    loss: Tensor
    loss_band: Tensor
    grads: list[Tensor]
    bands: list[Tensor]


def unit(*dtypes: torch.dtype) -> float:
    """The allowed relative error of a sum: 1e-6 of float32 and narrower, as many ulps of float64."""
    return 1e-6 if torch.float64 not in dtypes else 1e-6 * 2.0 ** (23 - 52)


def truth(
    features: Sequence[Tensor],
    mask: Tensor,
    upstream: Callable[[Tensor], Tensor] = torch.ones_like,
    moves: int = 4,
    **options: Any,
) -> Truth:
    """The loss, its gradients (features, then mask and layer weights where they ask for one), and bands.

    The loss is a logarithm of a difference: how far it moves when each sum moves by `unit` of what was added
    up is what its conditioning allows. The bands are that, found by moving products, sums and masses so many
    times; without moves they are those of a well-conditioned loss.
    """
    weights = options.pop("layer_weights", None)
    u = unit(*(layer.dtype for layer in features))
    generator = torch.Generator().manual_seed(7)

    def move(value: Tensor) -> Tensor:
        by = torch.rand(value.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return value * (1 + u * (by + by.sign()))

    def run(rounded: Rounding) -> tuple[Tensor, list[Tensor]]:
        leaves = [layer.detach().cpu().double().requires_grad_() for layer in features]
        inputs = list(leaves)
        m = mask.detach().cpu()
        if mask.requires_grad:
            m = m.double().requires_grad_()
            inputs.append(m)
        w = None if weights is None else weights.detach().cpu().double().requires_grad_()
        if weights is not None and weights.requires_grad:
            inputs.append(w)
        value = loss(leaves, m, layer_weights=w, rounded=rounded, **options)
        if not value.requires_grad:
            return value, [torch.zeros_like(leaf) for leaf in inputs]
        grads = torch.autograd.grad(
            value, inputs, upstream(value.detach()).double(), allow_unused=True, materialize_grads=True
        )
        return value.detach(), [grad.detach() for grad in grads]

    value, grads = run(exactly)
    loss_band = 2 * u * (value.abs() + 1)  # the logarithm turns relative errors into absolute ones
    bands = [2 * u * _row_max(grad) for grad in grads]
    for _ in range(moves):
        shaken, shaken_grads = run(move)
        loss_band = torch.maximum(loss_band, (shaken - value).abs())
        bands = [
            torch.maximum(band, _row_max(moved - grad))
            for band, moved, grad in zip(bands, shaken_grads, grads, strict=True)
        ]
    return Truth(value, loss_band, grads, bands)


def losses_of(
    sums: Tensor,
    masses: Tensor,
    channels: Sequence[int],
    pixels: Sequence[int],
    reduction: str,
    convention: str | Formula,
    **options: Any,
) -> Tensor:
    """What is made of sums [2, N, ΣC] and masses [2, N, L]: [L], without reduction [N, L] or [ΣC]."""
    over_batch = formula_of(convention).norm == "batch"
    losses, start = [], 0
    for index, C in enumerate(channels):
        S, M = sums[:, :, start : start + C].double(), masses[:, :, index].double()
        start += C
        regions = Regions(S[0], S[1], M[0], M[1], S[0].abs(), S[1].abs(), pixels[index])
        layer = layer_entries(regions, convention, **options)
        losses.append(combine([layer], reduction, None, over_batch))
    if reduction != "none":
        return torch.stack(losses)
    return torch.cat(losses) if over_batch else torch.stack(losses, 1)


def _row_max(values: Tensor) -> Tensor:
    """The largest magnitude of every sample, shaped so that it broadcasts."""
    if values.dim() < 2 or not values.numel():
        return values.abs()
    return values.abs().flatten(1).amax(1).view(-1, *[1] * (values.dim() - 1))


def assert_within(
    actual: Tensor, wanted: Tensor, band: Tensor | float, what: str = "value", ulps: float = 0.51
) -> None:
    """|actual - wanted| ≤ band and one rounding to the dtype of `actual`; NaN and Inf in the same places."""
    kind = torch.finfo(actual.dtype)
    assert actual.shape == wanted.shape, f"{what}: {list(actual.shape)} for {list(wanted.shape)}"
    got = actual.detach().cpu().double()
    wanted = wanted.detach().cpu()
    finite = wanted.isfinite()
    assert torch.equal(got.isnan(), wanted.isnan()), f"{what}: NaN where {wanted} is wanted: {got}"
    # Beyond the range of a half the gradient is Inf, which is right.
    got, wanted = (x.nan_to_num(0.0).clamp(-kind.max, kind.max) for x in (got, wanted))
    allowed = band + ulps * kind.eps * wanted.abs() + kind.smallest_normal * kind.eps
    error = torch.where(finite, (got - wanted).abs(), 0.0)
    if (error > allowed).any():
        worst = int((error - allowed).argmax())
        got, wanted, error, allowed = (
            x.broadcast_to(finite.shape).flatten()[worst].item() for x in (got, wanted, error, allowed)
        )
        raise AssertionError(f"{what}: got {got}, wanted {wanted}, error {error:.3g}, allowed {allowed:.3g}")
