"""What forward and backward of backend `triton` share, from the sums to the distance of a pair.

A tile holds all channels of its samples, [BLOCK_N, BLOCK_C], in float64. Samples are int64 indices;
one outside of the batch does not count. Pairs are those of a TERM of the loss: "own" (L3),
"shuffle" (L4) or "pooled" (L5).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "distance_gradient",
    "distance_of",
    "entry_of",
    "load_gradient",
    "next_pair",
    "pair_distance",
    "pair_of",
    "region_features",
    "sample_weights",
    "slope_of",
    "total_distance",
]


@triton.jit
def sample_weights(masses_ptr, n, N, L, pixels, REGION_WEIGHT: tl.constexpr):
    """M_fg, the weights w_fg and w_bg of (L1), and which samples count, each [BLOCK_N]."""
    inside = (n >= 0) & (n < N)
    M_fg = tl.load(masses_ptr + n * L, mask=inside, other=0).to(tl.float64)
    M_bg = tl.load(masses_ptr + (N + n) * L, mask=inside, other=0).to(tl.float64)
    counts = M_fg + M_bg != 0
    if REGION_WEIGHT == "region":
        counts = (M_fg != 0) & (M_bg != 0)
        w_fg = M_fg
        w_bg = M_bg
    elif REGION_WEIGHT == "valid":
        w_fg = M_fg + M_bg
        w_bg = w_fg
    else:
        w_fg = tl.zeros_like(M_fg) + (pixels if REGION_WEIGHT == "pixels" else 1)
        w_bg = w_fg
    return M_fg, tl.where(counts, w_fg, 1), tl.where(counts, w_bg, 1), counts


@triton.jit
def region_features(
    sums_ptr, masses_ptr, n, N, L, total_channels, channels, pixels,
    REGION_WEIGHT: tl.constexpr, MASKED_BACKGROUND: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The f and b of (L1) [BLOCK_N, BLOCK_C], 0 where a sample does not count, and which do."""
    M_fg, w_fg, w_bg, counts = sample_weights(masses_ptr, n, N, L, pixels, REGION_WEIGHT)
    channel = tl.arange(0, BLOCK_C)
    mask = counts[:, None] & (channel < channels)[None, :]
    offsets = n[:, None] * total_channels + channel[None, :]
    S_fg = tl.load(sums_ptr + offsets, mask=mask, other=0).to(tl.float64)
    if MASKED_BACKGROUND:
        S_bg = tl.where(mask, M_fg[:, None] - S_fg, 0)
    else:
        bg_ptr = sums_ptr + N.to(tl.int64) * total_channels
        S_bg = tl.load(bg_ptr + offsets, mask=mask, other=0).to(tl.float64)
    # One division a sample: in float64 it costs more than all else here.
    return S_fg * (1 / w_fg)[:, None], S_bg * (1 / w_bg)[:, None], counts


@triton.jit
def pair_of(pairing_ptr, k, N, K, TERM: tl.constexpr):
    """The samples i and j of pair k, whose distance is that of foreground i and background j."""
    if TERM == "own":
        i = k
        j = k
    elif TERM == "shuffle":
        i = tl.load(pairing_ptr + k, mask=k < N, other=-1)
        j = k
    else:
        i = tl.load(pairing_ptr + 2 * k, mask=k < K, other=-1)
        j = tl.load(pairing_ptr + 2 * k + 1, mask=k < K, other=-1)
    return i, j


@triton.jit
def next_pair(pairing_ptr, n, last, N, K, TERM: tl.constexpr, BLOCK_COUNT: tl.constexpr):
    """For each n [BLOCK_N] the first pair after `last` that holds it; the number of pairs if none does."""
    pairs = K if TERM == "pooled" else N
    found = tl.zeros_like(n) + pairs
    for start in range(0, pairs, BLOCK_COUNT):
        k = start + tl.arange(0, BLOCK_COUNT).to(tl.int64)
        i, j = pair_of(pairing_ptr, k, N, K, TERM)
        holds = (i[None, :] == n[:, None]) | (j[None, :] == n[:, None])
        later = (k[None, :] > last[:, None]) & (k < pairs)[None, :]
        found = tl.minimum(found, tl.min(tl.where(holds & later, k[None, :], pairs), axis=1))
    return found


@triton.jit
def distance_of(f, b, EPS: tl.constexpr, NORM: tl.constexpr):
    """D of (L2) [BLOCK_N, 1], or its summands [BLOCK_N, BLOCK_C] for the norm over the batch."""
    x = f - b
    if NORM == "batch":
        distance = x * x
    elif NORM == "vector":
        distance = tl.sum(x * x, axis=1)[:, None]
    else:
        x = tl.sum(x, axis=1)[:, None]
        distance = x * x
        if NORM == "relative":
            z = tl.sum(f + b, axis=1)[:, None]
            distance /= z * z + tl.full((), EPS, tl.float64)
    return distance


@triton.jit
def distance_gradient(f, b, q, EPS: tl.constexpr, NORM: tl.constexpr):
    """Products of q with ∂D/∂f and ∂D/∂b [BLOCK_N, BLOCK_C]."""
    x = f - b
    if NORM == "relative":
        x = tl.sum(x, axis=1)[:, None] + tl.zeros_like(f)
        z = tl.sum(f + b, axis=1)[:, None]
        d = z * z + tl.full((), EPS, tl.float64)
        grad_f = 2 * q * (x / d) * (1 - x * z / d)
        grad_b = -2 * q * (x / d) * (1 + x * z / d)
    else:
        if NORM == "channel_sum":
            x = tl.sum(x, axis=1)[:, None] + tl.zeros_like(f)
        grad_f = 2 * q * x
        grad_b = -grad_f
    return grad_f, grad_b


@triton.jit
def entry_of(distance, met, EPS: tl.constexpr, LOG_SCALE: tl.constexpr):
    """The entry -s log(D + ε) where met, else 0."""
    argument = tl.where(met, distance + tl.full((), EPS, tl.float64), 1)
    return -tl.full((), LOG_SCALE, tl.float64) * tl.log(argument)


@triton.jit
def slope_of(grad, distance, met, EPS: tl.constexpr, LOG_SCALE: tl.constexpr):
    """The factor q = -s G / (D + ε) where met, else 0."""
    argument = tl.where(met, distance + tl.full((), EPS, tl.float64), 1)
    return tl.where(met, -tl.full((), LOG_SCALE, tl.float64) * grad / argument, 0)


@triton.jit
def load_gradient(grad_loss_ptr, n, counts, layer, L, REDUCTION: tl.constexpr):
    """The upstream gradient (1 without a pointer) of the samples n that count, else 0 [BLOCK_N]."""
    if grad_loss_ptr is None:
        gradient = counts.to(tl.float64)
    else:
        offsets = (n * L if REDUCTION == "none" else tl.zeros_like(n)) + layer
        gradient = tl.load(grad_loss_ptr + offsets, mask=counts, other=0).to(tl.float64)
    return gradient


@triton.jit
def pair_distance(
    sums_ptr, masses_ptr, pairing_ptr, k, N, L, K, total_channels, channels, pixels,
    TERM: tl.constexpr, REGION_WEIGHT: tl.constexpr, MASKED_BACKGROUND: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """D of the pairs k as `distance_of` gives it, and of which both samples count [BLOCK_N, 1]."""
    i, j = pair_of(pairing_ptr, k, N, K, TERM)
    f_i, b_i, counts_i = region_features(
        sums_ptr, masses_ptr, i, N, L, total_channels, channels, pixels,
        REGION_WEIGHT, MASKED_BACKGROUND, BLOCK_C,
    )  # fmt: skip
    f_j, b_j, counts_j = region_features(
        sums_ptr, masses_ptr, j, N, L, total_channels, channels, pixels,
        REGION_WEIGHT, MASKED_BACKGROUND, BLOCK_C,
    )  # fmt: skip
    distance = distance_of(f_i, b_j, EPS, NORM)
    if TERM == "pooled":
        distance += distance_of(f_j, b_i, EPS, NORM)
    return distance, (counts_i & counts_j)[:, None]


@triton.jit
def total_distance(
    sums_ptr, masses_ptr, pairing_ptr, N, L, K, total_channels, channels, pixels,
    TERM: tl.constexpr, REGION_WEIGHT: tl.constexpr, MASKED_BACKGROUND: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """D of (L6) and which of its channels count, each [1, BLOCK_C]."""
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float64)
    met = tl.zeros([BLOCK_N, BLOCK_C], tl.int32)
    for start in range(0, K if TERM == "pooled" else N, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N).to(tl.int64)
        distance, pair_met = pair_distance(
            sums_ptr, masses_ptr, pairing_ptr, k, N, L, K, total_channels, channels, pixels,
            TERM, REGION_WEIGHT, MASKED_BACKGROUND, "batch", 0.0, BLOCK_C,
        )  # fmt: skip
        total += tl.where(pair_met, distance, 0)
        met += pair_met.to(tl.int32)
    counts = (tl.sum(met, axis=0) > 0) & (tl.arange(0, BLOCK_C) < channels)
    return tl.sum(total, axis=0)[None, :], counts[None, :]
