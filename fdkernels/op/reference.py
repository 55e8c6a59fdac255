"""Backend `reference`: the five functions in plain PyTorch, the specification for any device and dtype.

README.md beside this file derives what they compute; (M..), (R..), (L..) and (F..) are its equations.
`losses_of` is differentiable: reductions and derivatives that slopes cannot express go through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fdkernels.checks import mask_tolerance
from fdkernels.conventions import Options
from fdkernels.op.pyramid import NO_WEIGHT, Pyramid, Sums, Weights, weight_dtype

__all__ = ["gradient", "losses", "losses_of", "mask_gradient", "masks", "sums", "wide"]

_AVG_POOL = (
    functional.adaptive_avg_pool1d,
    functional.adaptive_avg_pool2d,
    functional.adaptive_avg_pool3d,
)
_MAX_POOL = (
    functional.adaptive_max_pool1d,
    functional.adaptive_max_pool2d,
    functional.adaptive_max_pool3d,
)


def masks(
    mask: Tensor,
    sizes: Sequence[torch.Size],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
) -> Weights:
    """Resize a mask [N, 1, *S0] to the weights (M3) to (M5) [N, P] of each size; differentiable."""
    y = _weights_or_nan(mask, dtype)
    if ignore_index is None and not mask.requires_grad:
        resized = _resize_all(y, sizes, mask_resize)
        return _stored(mask, sizes, dtype, mask_resize, resized, [])
    if ignore_index is None:
        valid = torch.ones_like(y)
    else:
        valid = (mask != ignore_index).to(dtype)  # (M1)
        y = torch.where(valid != 0, y, 0)
    if mask_resize == "max":
        # -1 marks an ignored pixel; it stays only where a whole cell is ignored.
        resized = _resize_all(torch.where(valid != 0, y, -1), sizes, mask_resize)
        fg = [torch.where(largest != -1, largest, 0) for largest in resized]
        bg = [torch.where(largest != -1, 1 - largest, 0) for largest in resized]
    else:
        both = torch.cat([valid * y, valid * (1 - y)], dim=1)  # [N, 2, *S0]
        resized = _resize_all(both, sizes, mask_resize)
        fg, bg = [w[:, :1] for w in resized], [w[:, 1:] for w in resized]
    return _stored(mask, sizes, dtype, mask_resize, fg, bg)


def _stored(
    mask: Tensor,
    sizes: Sequence[torch.Size],
    dtype: torch.dtype,
    mask_resize: str,
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
) -> Weights:
    """Weights [N, 1, *S] of each size as backends store them, [N, P] contiguous."""
    full = mask.shape[2:]
    dtypes = [weight_dtype(mask.dtype, size == full, dtype, mask_resize) for size in sizes]
    return Weights(
        [_in_dtype(w.flatten(1).contiguous(), stored) for w, stored in zip(fg, dtypes, strict=True)],
        [_in_dtype(w.flatten(1).contiguous(), stored) for w, stored in zip(bg, dtypes, strict=False)],
    )


def _in_dtype(w: Tensor, stored: torch.dtype) -> Tensor:
    return torch.where(w.isnan(), NO_WEIGHT, w).to(stored) if stored == torch.uint8 else w.to(stored)


def _weights_or_nan(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of a mask in the accumulation dtype, NaN where they are not in [0, 1]."""
    y = mask.to(dtype)
    if mask.dtype == torch.bool:
        return y
    if not mask.is_floating_point():
        return torch.where((mask == 0) | (mask == 1), y, float("nan"))
    tolerance = mask_tolerance(mask.dtype)
    compared = y if mask.element_size() == 1 else mask  # torch has no comparisons in 8-bit floats
    return torch.where((compared >= -tolerance) & (compared <= 1 + tolerance), y, float("nan"))


def _resize_all(mask: Tensor, sizes: Sequence[torch.Size], mask_resize: str) -> list[Tensor]:
    """Resize [N, K, *S0] to each size, once, from the smallest earlier map that its cells nest in."""
    full = mask.shape[2:]
    made = [(full, mask)]
    resized = []
    for size in sizes:
        source, found = mask, None
        for larger, candidate in made:
            if larger == size:
                found = candidate
            # The mean of means over equal cells is the mean of the whole cell, and so is the maximum; cells
            # that do not divide the mask overlap.
            elif mask_resize != "nearest" and _divides(size, larger) and _divides(larger, full):
                source = candidate
        if found is None:
            found = _resize(source, size, mask_resize)
            made.append((size, found))
        resized.append(found)
    return resized


def _resize(mask: Tensor, size: torch.Size, mask_resize: str) -> Tensor:
    if mask_resize == "nearest":
        return _nearest(mask, size)
    pools: tuple[Callable[..., Tensor], ...] = _AVG_POOL if mask_resize == "area" else _MAX_POOL
    return pools[len(size) - 1](mask, size)


def _nearest(mask: Tensor, size: torch.Size) -> Tensor:
    """(M5), in integers: torch's nearest-exact rounds positions to float32."""
    for dim, (out, total) in enumerate(zip(size, mask.shape[2:], strict=True), start=2):
        centre = (2 * torch.arange(out, device=mask.device) + 1) * total // (2 * out)
        mask = mask.index_select(dim, centre)
    return mask


def _divides(size: torch.Size, source: torch.Size) -> bool:
    return all(s and big % s == 0 for s, big in zip(size, source, strict=True))


def sums(
    features: Sequence[Tensor],
    weights: Weights,
    pyramid: Pyramid,
    options: Options | None,
    pairing: Tensor | None,
    with_slopes: bool,
) -> Sums:
    """Sum layers [N, C_l, *S_l] by (R2) to [2, N, ΣC] and [2, N, L], and make losses of the sums."""
    dtype = pyramid.dtype
    S, M = [], []
    for index, layer in enumerate(features):
        w = _both(weights, index, dtype)  # [2, N, P]
        F = layer.flatten(2).to(dtype)  # [N, C, P]
        if weights.bg:
            F = torch.where(_valid(w).unsqueeze(1), F, 0)
        S.append(torch.stack([(F * w_k.unsqueeze(1)).sum(-1) for w_k in w]))  # [2, N, C]
        M.append(w.sum(-1))  # [2, N]
    all_sums, masses = torch.cat(S, dim=-1), torch.stack(M, dim=-1)
    if options is None:
        return Sums(all_sums, masses, None, None)
    loss, slopes = losses(all_sums, masses, pyramid, options, pairing)
    return Sums(all_sums, masses, loss, slopes if with_slopes else None)


def losses(
    sums: Tensor, masses: Tensor, pyramid: Pyramid, options: Options, pairing: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Losses [L] and slopes (F1) [2, N, ΣC] of sums [2, N, ΣC] and masses [2, N, L]."""
    S, M = wide(sums), wide(masses)
    loss = losses_of(S, M, pyramid, options, pairing)
    slopes = []
    for index, of_layer in enumerate(S.split(pyramid.channels, dim=-1)):  # [2, N, C]
        layer = _region_features(of_layer, M[..., index], pyramid.pixels[index], options)
        slopes.append(_slopes(layer, options, pairing))
    return loss.to(sums.dtype), torch.cat(slopes, dim=-1).to(sums.dtype)


def gradient(
    grad_sums: Tensor,
    factor: Tensor | None,
    weights: Weights,
    upstream: Sequence[Tensor | None],
    pyramid: Pyramid,
) -> list[Tensor]:
    """Write the gradient (R3) of each layer, for g = grad_sums [2, N, ΣC] times factor [L], plus upstream."""
    dtype = grad_sums.dtype
    grads = []
    for index, g in enumerate(grad_sums.split(pyramid.channels, dim=-1)):  # [2, N, C]
        layer, w = pyramid.layers[index], _both(weights, index, dtype)
        scaled = g if factor is None else g * factor[index]
        grad = (scaled.unsqueeze(-1) * w.unsqueeze(2)).sum(0)  # [N, C, P]
        if weights.bg:
            grad = torch.where(_valid(w).unsqueeze(1), grad, 0)
        grad = grad.reshape(layer.shape)
        added = upstream[index] if upstream else None
        if added is not None:
            grad = grad + added
        out = torch.empty_strided(layer.shape, layer.stride, dtype=layer.dtype, device=grad.device)
        grads.append(out.copy_(grad))
    return grads


def mask_gradient(grad_sums: Tensor, weights: Weights, features: Sequence[Tensor]) -> Weights:
    """Write the gradients (R4) of the weights [N, P], without the part that goes through the masses."""
    dtype = grad_sums.dtype
    fg, bg = [], []
    parts = grad_sums.split([layer.shape[1] for layer in features], dim=-1)
    for index, (layer, g) in enumerate(zip(features, parts, strict=True)):  # g is [2, N, C]
        F = layer.flatten(2).to(dtype)  # [N, C, P]
        if not weights.bg:
            fg.append(((g[0] - g[1]).unsqueeze(-1) * F).sum(1))  # [N, P]
            continue
        F = torch.where(_valid(_both(weights, index, dtype)).unsqueeze(1), F, 0)
        fg.append((g[0].unsqueeze(-1) * F).sum(1))
        bg.append((g[1].unsqueeze(-1) * F).sum(1))
    return Weights(fg, bg)


def _both(weights: Weights, index: int, dtype: torch.dtype) -> Tensor:
    """The two weights (R1) of one layer, [2, N, P]."""
    w_fg = _as_number(weights.fg[index], dtype)
    w_bg = _as_number(weights.bg[index], dtype) if weights.bg else 1 - w_fg
    return torch.stack([w_fg, w_bg])


def _as_number(w: Tensor, dtype: torch.dtype) -> Tensor:
    """A stored weight [N, P]. Of bytes, which are 0 or 1, any other stands for NaN."""
    return torch.where(w > 1, float("nan"), w.to(dtype)) if w.dtype == torch.uint8 else w.to(dtype)


def _valid(w: Tensor) -> Tensor:
    return (w != 0).any(0)


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
        for term in _terms(layer, options, pairing):
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
    return flags.sum().clamp(min=1)


class _Term(NamedTuple):
    """One logarithm of an entry, of the summed distances of the pairs (i, j) where these are valid [K].

    `is_mean`: the mean over the valid pairs is part of every entry; else pair n is part of entry n.
    """

    pairs: list[tuple[Tensor, Tensor]]
    valid: Tensor
    is_mean: bool = False


def _terms(layer: _RegionFeatures, options: Options, pairing: Tensor | None) -> Iterator[_Term]:
    """The logarithms that an entry adds up, (L3) to (L6)."""
    counts = layer.counts
    own = torch.arange(counts.shape[0], device=counts.device)
    yield _Term([(own, own)], counts)
    if options.exchange == "shuffle" and pairing is not None:
        yield _Term([(pairing, own)], counts & counts[pairing])
    if options.exchange == "pooled" and pairing is not None:
        used = (pairing >= 0).all(-1)
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
    """The slopes (F1) [2, N, C] of one layer, by (L7): the loss is a mean or a sum of its entries.

    Written out, as compilers and dispatch modes run an op where autograd does not record.
    """
    counted = _counted(layer, options)
    G = counted.to(layer.f.dtype)  # [N], or [C] over the batch: the gradient of the entries
    if options.reduction == "mean":
        G = G / _count(counted)
    grad_f, grad_b = torch.zeros_like(layer.f), torch.zeros_like(layer.b)
    for term in _terms(layer, options, pairing):
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
