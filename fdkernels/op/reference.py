"""Backend `reference`: its functions in plain PyTorch, the specification for any device and dtype.

README.md beside this file derives what they compute; (M..), (R..), (L..), (F..) and (C..) are its equations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fdkernels.checks import mask_tolerance
from fdkernels.conventions import Options
from fdkernels.op.loss_formulas import losses_of, slopes_of, wide
from fdkernels.op.pyramid import NO_WEIGHT, Pyramid, Regions, Sums, Weights, describe, weight_dtype

__all__ = [
    "gradient",
    "gradient_expression",
    "losses",
    "losses_of",
    "mask_gradient",
    "masks",
    "region_gradient",
    "region_sums",
    "region_weight_gradient",
    "sums",
    "wide",
]

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
    adds_up: bool = False,
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
    return Sums(all_sums, masses, loss.sum() if adds_up else loss, slopes if with_slopes else None)


def losses(
    sums: Tensor, masses: Tensor, pyramid: Pyramid, options: Options, pairing: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Losses [L] and slopes (F1) [2, N, ΣC] of sums [2, N, ΣC] and masses [2, N, L]."""
    S, M = wide(sums), wide(masses)
    loss = losses_of(S, M, pyramid, options, pairing)
    return loss.to(sums.dtype), slopes_of(S, M, pyramid, options, pairing).to(sums.dtype)


def gradient(
    grad_sums: Tensor,
    factor: Tensor | None,
    weights: Weights,
    upstream: Sequence[Tensor | None],
    pyramid: Pyramid,
) -> list[Tensor]:
    """Write the gradient (R3) of each layer, for g = grad_sums [2, N, ΣC] times factor [L], plus upstream."""
    made = gradient_expression(grad_sums, factor, weights, upstream, pyramid)
    return [
        torch.empty_strided(layer.shape, layer.stride, dtype=layer.dtype, device=grad.device).copy_(grad)
        for layer, grad in zip(pyramid.layers, made, strict=True)
    ]


def gradient_expression(
    grad_sums: Tensor,
    factor: Tensor | None,
    weights: Weights,
    upstream: Sequence[Tensor | None],
    pyramid: Pyramid,
) -> list[Tensor]:
    """`gradient` [N, C_l, *S_l] element by element, so that a compiler writes it with what comes next."""
    grads = []
    for index, g in enumerate(grad_sums.split(pyramid.channels, dim=-1)):  # [2, N, C]
        layer, w = pyramid.layers[index], _both(weights, index, grad_sums.dtype)
        scaled = g if factor is None else g * factor[index]
        # In the order in which the gradient lies in memory.
        channels_inner = layer.stride[1] == 1 and layer.channels > 1
        shape: tuple[int, ...] = layer.shape
        if channels_inner:
            grad = (scaled.unsqueeze(2) * w.unsqueeze(-1)).sum(0)  # [N, P, C]
            shape = (shape[0], *shape[2:], shape[1])
        else:
            grad = (scaled.unsqueeze(-1) * w.unsqueeze(2)).sum(0)  # [N, C, P]
        if weights.bg:
            grad = torch.where(_valid(w).unsqueeze(-1 if channels_inner else 1), grad, 0)
        grad = grad.reshape(shape)
        if channels_inner:
            grad = grad.movedim(-1, 1)
        added = upstream[index] if upstream else None
        grads.append((grad if added is None else grad + added).to(layer.dtype))
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


def region_sums(features: Sequence[Tensor], regions: Regions, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
    """Sum layers [N, C_l, *S_l] by (C1) and (C2): [R, N, ΣC], or [2R, N, ΣC], and masses [R, N, L]."""
    dtype = pyramid.dtype
    S, M = [], []
    for index, layer in enumerate(features):
        w = _as_number(regions.weights[index], dtype).transpose(0, 1)  # [R, N, P]
        centred = [_centred(layer, regions, w, pivots) for pivots in _pivots_of(regions, index, pyramid)]
        first = [(x * w_k.unsqueeze(1)).sum(-1) for x, w_k in zip(centred, w, strict=True)]
        second = []
        if regions.pivots is not None:
            second = [(x.square() * w_k.unsqueeze(1)).sum(-1) for x, w_k in zip(centred, w, strict=True)]
        S.append(torch.stack(first + second))
        M.append(w.sum(-1))
    return torch.cat(S, dim=-1), torch.stack(M, dim=-1)


def region_gradient(
    grad_sums: Tensor,
    regions: Regions,
    features: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    pyramid: Pyramid,
) -> list[Tensor]:
    """Write the gradient (C3) of each layer for grad_sums [R, N, ΣC] or [2R, N, ΣC], plus upstream."""
    grads = []
    for index, of_layer in enumerate(grad_sums.split(pyramid.channels, dim=-1)):  # [R or 2R, N, C]
        layer = pyramid.layers[index]
        w = _as_number(regions.weights[index], grad_sums.dtype).transpose(0, 1)  # [R, N, P]
        g, h = of_layer[: regions.num_regions].unsqueeze(-1), of_layer[regions.num_regions :].unsqueeze(-1)
        grad = torch.zeros((), dtype=grad_sums.dtype, device=grad_sums.device)
        for k, pivots in enumerate(_pivots_of(regions, index, pyramid)):
            slope = g[k]  # [N, C, 1]
            if pivots is not None:
                slope = slope + 2 * h[k] * _centred(features[index], regions, w, pivots)
            grad = grad + slope * w[k].unsqueeze(1)
        if regions.selects:
            grad = torch.where(_valid(w).unsqueeze(1), grad, 0)
        grad = grad.reshape(layer.shape)
        added = upstream[index] if upstream else None
        if added is not None:
            grad = grad + added
        out = torch.empty_strided(layer.shape, layer.stride, dtype=layer.dtype, device=grad.device)
        grads.append(out.copy_(grad))
    return grads


def region_weight_gradient(grad_sums: Tensor, regions: Regions, features: Sequence[Tensor]) -> list[Tensor]:
    """Write the gradients (C4) of the weights [N, R, P_l], without the part that goes through the masses."""
    pyramid = describe(features)
    grads = []
    for index, of_layer in enumerate(grad_sums.split(pyramid.channels, dim=-1)):  # [R or 2R, N, C]
        w = _as_number(regions.weights[index], grad_sums.dtype).transpose(0, 1)  # [R, N, P]
        g, h = of_layer[: regions.num_regions].unsqueeze(-1), of_layer[regions.num_regions :].unsqueeze(-1)
        of_regions = []
        for k, pivots in enumerate(_pivots_of(regions, index, pyramid)):
            x = _centred(features[index], regions, w, pivots)
            of_regions.append((g[k] * x if pivots is None else g[k] * x + h[k] * x.square()).sum(1))
        grads.append(torch.stack(of_regions, dim=1))
    return grads


def _pivots_of(regions: Regions, index: int, pyramid: Pyramid) -> Sequence[Tensor | None]:
    """The pivots [N, C, 1] of each region in one layer."""
    if regions.pivots is None:
        return [None] * regions.num_regions
    of_layer = regions.pivots.split(pyramid.channels, dim=-1)[index]  # [R, N, C]
    return list(of_layer.unsqueeze(-1))


def _centred(layer: Tensor, regions: Regions, w: Tensor, pivots: Tensor | None) -> Tensor:
    """A layer [N, C, *S] less the pivots [N, C, 1] of a region, 0 at ignored pixels, [N, C, P]."""
    x = layer.flatten(2).to(w.dtype)
    if pivots is not None:
        x = x - pivots
    return torch.where(_valid(w).unsqueeze(1), x, 0) if regions.selects else x


def _both(weights: Weights, index: int, dtype: torch.dtype) -> Tensor:
    """The two weights (R1) of one layer, [2, N, P]."""
    w_fg = _as_number(weights.fg[index], dtype)
    w_bg = _as_number(weights.bg[index], dtype) if weights.bg else 1 - w_fg
    return torch.stack([w_fg, w_bg])


def _as_number(w: Tensor, dtype: torch.dtype) -> Tensor:
    """A stored weight of any shape. Of bytes, which are 0 or 1, any other stands for NaN."""
    return torch.where(w > 1, float("nan"), w.to(dtype)) if w.dtype == torch.uint8 else w.to(dtype)


def _valid(w: Tensor) -> Tensor:
    return (w != 0).any(0)
