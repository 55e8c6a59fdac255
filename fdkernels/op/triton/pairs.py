"""The pairs of samples of a layer and their distances, in float64, for backend `triton`.

(L1) to (L6) of ../README.md. A `LayerSums` and the options travel whole; `TERM` names the pairs of a
logarithm: "own" for (L3), "shuffle" for (L4), "pooled" for (L5).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = [
    "LayerSums",
    "distance_gradient",
    "distance_of",
    "entry_of",
    "next_pair",
    "pair_distance",
    "pair_of",
    "region_features",
    "sample_weights",
    "slope_of",
    "total_distance",
]


class LayerSums(NamedTuple):
    """The sums and masses of one layer; the pointers are to its first channel and its column of masses."""

    sums_ptr: Any  # [2, N, total_channels]
    masses_ptr: Any  # [2, N, L]
    pairing_ptr: Any  # [N], [K, 2], or None
    N: Any
    L: Any
    K: Any
    total_channels: Any
    channels: Any
    pixels: Any


@triton.jit
def sample_weights(layer, n, OPTIONS: tl.constexpr):
    """M_fg, the weights w_fg and w_bg of (L1), and which samples count, each [BLOCK_N]."""
    inside = (n >= 0) & (n < layer.N)
    M_fg = tl.load(layer.masses_ptr + n * layer.L, mask=inside, other=0).to(tl.float64)
    M_bg = tl.load(layer.masses_ptr + (layer.N + n) * layer.L, mask=inside, other=0).to(tl.float64)
    counts = M_fg + M_bg != 0
    if OPTIONS.region_weight == "region":
        counts = (M_fg != 0) & (M_bg != 0)
        w_fg = M_fg
        w_bg = M_bg
    elif OPTIONS.region_weight == "valid":
        w_fg = M_fg + M_bg
        w_bg = w_fg
    else:
        w_fg = tl.zeros_like(M_fg) + (layer.pixels if OPTIONS.region_weight == "pixels" else 1)
        w_bg = w_fg
    return M_fg, tl.where(counts, w_fg, 1), tl.where(counts, w_bg, 1), counts


@triton.jit
def region_features(layer, n, OPTIONS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The f and b of (L1) [BLOCK_N, BLOCK_C], 0 where a sample does not count, and which do."""
    M_fg, w_fg, w_bg, counts = sample_weights(layer, n, OPTIONS)
    channel = tl.arange(0, BLOCK_C)
    mask = counts[:, None] & (channel < layer.channels)[None, :]
    offsets = n[:, None] * layer.total_channels + channel[None, :]
    S_fg = tl.load(layer.sums_ptr + offsets, mask=mask, other=0).to(tl.float64)
    if OPTIONS.masked_background:
        S_bg = tl.where(mask, M_fg[:, None] - S_fg, 0)
    else:
        bg_ptr = layer.sums_ptr + layer.N.to(tl.int64) * layer.total_channels
        S_bg = tl.load(bg_ptr + offsets, mask=mask, other=0).to(tl.float64)
    # One division a sample: in float64 it costs more than all else here.
    return S_fg * (1 / w_fg)[:, None], S_bg * (1 / w_bg)[:, None], counts


@triton.jit
def pair_of(layer, k, TERM: tl.constexpr):
    """The samples i and j of pair k, whose distance is that of foreground i and background j."""
    if TERM == "own":
        i = k
        j = k
    elif TERM == "shuffle":
        i = tl.load(layer.pairing_ptr + k, mask=k < layer.N, other=-1)
        j = k
    else:
        i = tl.load(layer.pairing_ptr + 2 * k, mask=k < layer.K, other=-1)
        j = tl.load(layer.pairing_ptr + 2 * k + 1, mask=k < layer.K, other=-1)
    return i, j


@triton.jit
def next_pair(layer, n, last, TERM: tl.constexpr, BLOCK_COUNT: tl.constexpr):
    """For each n [BLOCK_N] the first pair after `last` that holds it; the number of pairs if none does."""
    pairs = layer.K if TERM == "pooled" else layer.N
    found = tl.zeros_like(n) + pairs
    for start in range(0, pairs, BLOCK_COUNT):
        k = start + tl.arange(0, BLOCK_COUNT).to(tl.int64)
        i, j = pair_of(layer, k, TERM)
        holds = (i[None, :] == n[:, None]) | (j[None, :] == n[:, None])
        later = (k[None, :] > last[:, None]) & (k < pairs)[None, :]
        found = tl.minimum(found, tl.min(tl.where(holds & later, k[None, :], pairs), axis=1))
    return found


@triton.jit
def distance_of(f, b, OPTIONS: tl.constexpr):
    """D of (L2) [BLOCK_N, 1], or its summands [BLOCK_N, BLOCK_C] for the norm over the batch."""
    x = f - b
    if OPTIONS.norm == "batch":
        distance = x * x
    elif OPTIONS.norm == "vector":
        distance = tl.sum(x * x, axis=1)[:, None]
    else:
        x = tl.sum(x, axis=1)[:, None]
        distance = x * x
        if OPTIONS.norm == "relative":
            z = tl.sum(f + b, axis=1)[:, None]
            distance /= z * z + tl.full((), OPTIONS.eps, tl.float64)
    return distance


@triton.jit
def distance_gradient(f, b, q, OPTIONS: tl.constexpr):
    """Products of q with ∂D/∂f and ∂D/∂b [BLOCK_N, BLOCK_C]."""
    x = f - b
    if OPTIONS.norm == "relative":
        x = tl.sum(x, axis=1)[:, None] + tl.zeros_like(f)
        z = tl.sum(f + b, axis=1)[:, None]
        d = z * z + tl.full((), OPTIONS.eps, tl.float64)
        grad_f = 2 * q * (x / d) * (1 - x * z / d)
        grad_b = -2 * q * (x / d) * (1 + x * z / d)
    else:
        if OPTIONS.norm == "channel_sum":
            x = tl.sum(x, axis=1)[:, None] + tl.zeros_like(f)
        grad_f = 2 * q * x
        grad_b = -grad_f
    return grad_f, grad_b


@triton.jit
def entry_of(distance, valid, OPTIONS: tl.constexpr):
    """The entry -s log(D + ε) where valid, else 0."""
    argument = tl.where(valid, distance + tl.full((), OPTIONS.eps, tl.float64), 1)
    return -tl.full((), OPTIONS.log_scale, tl.float64) * tl.log(argument)


@triton.jit
def slope_of(grad, distance, valid, OPTIONS: tl.constexpr):
    """The factor q = -s G / (D + ε) where valid, else 0."""
    argument = tl.where(valid, distance + tl.full((), OPTIONS.eps, tl.float64), 1)
    return tl.where(valid, -tl.full((), OPTIONS.log_scale, tl.float64) * grad / argument, 0)


@triton.jit
def pair_distance(layer, k, TERM: tl.constexpr, OPTIONS: tl.constexpr, BLOCK_C: tl.constexpr):
    """D of the pairs k as `distance_of` gives it, and of which both samples count [BLOCK_N, 1]."""
    i, j = pair_of(layer, k, TERM)
    f_i, b_i, counts_i = region_features(layer, i, OPTIONS, BLOCK_C)
    f_j, b_j, counts_j = region_features(layer, j, OPTIONS, BLOCK_C)
    distance = distance_of(f_i, b_j, OPTIONS)
    if TERM == "pooled":
        distance += distance_of(f_j, b_i, OPTIONS)
    return distance, (counts_i & counts_j)[:, None]


@triton.jit
def total_distance(
    layer, TERM: tl.constexpr, OPTIONS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """D of (L6) and which of its channels count, each [1, BLOCK_C]."""
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float64)
    valid_pairs = tl.zeros([BLOCK_N, BLOCK_C], tl.int32)
    for start in range(0, layer.K if TERM == "pooled" else layer.N, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N).to(tl.int64)
        distance, valid = pair_distance(layer, k, TERM, OPTIONS, BLOCK_C)
        total += tl.where(valid, distance, 0)
        valid_pairs += valid.to(tl.int32)
    counts = (tl.sum(valid_pairs, axis=0) > 0) & (tl.arange(0, BLOCK_C) < layer.channels)
    return tl.sum(total, axis=0)[None, :], counts[None, :]
