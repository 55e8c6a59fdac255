"""How a loss changes with the sums and masses of a layer, (L7), for backend `triton`.

`entry_slopes` finds once a layer what the gradients of all samples share; `sums_gradient` then walks over
the pairs of each of BLOCK_N samples in their order, so that no two programs write the same element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdkernels.log_norm.impl.triton_pairs import (
    distance_gradient,
    distance_of,
    load_gradient,
    next_pair,
    pair_of,
    region_features,
    sample_weights,
    slope_of,
    total_distance,
)

__all__ = ["entry_slopes", "sums_gradient"]


@triton.jit
def entry_slopes(
    grad_loss_ptr, sums_ptr, masses_ptr, pairing_ptr, layer, channel_start,
    N, L, K, total_channels, channels, pixels,
    REGION_WEIGHT: tl.constexpr, MASKED_BACKGROUND: tl.constexpr, NORM: tl.constexpr,
    LOG_SCALE: tl.constexpr, EPS: tl.constexpr, EXCHANGE: tl.constexpr, REDUCTION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_COUNT: tl.constexpr,
):  # fmt: skip
    """What a reduction multiplies gradients by, the gradient of a pooled pair, and q of (L6) for both terms.

    The first two are scalars and serve the norms of samples, the last two are [1, BLOCK_C] and serve the norm
    over the batch; the others are 0. Without `grad_loss_ptr` the loss has the gradient 1.
    """
    scale = tl.full((), 1, tl.float64)
    grad_pair = tl.zeros([], tl.float64)
    own = tl.zeros([1, BLOCK_C], tl.float64)
    crossed = tl.zeros([1, BLOCK_C], tl.float64)
    if NORM == "batch":
        channel = tl.arange(0, BLOCK_C)[None, :]
        if grad_loss_ptr is None:
            grad_entry = scale + own
        elif REDUCTION == "none":
            grad_ptr = grad_loss_ptr + channel_start + channel
            grad_entry = tl.load(grad_ptr, mask=channel < channels, other=0).to(tl.float64)
        else:
            grad_entry = tl.load(grad_loss_ptr + layer).to(tl.float64) + own
        if REDUCTION == "mean":
            grad_entry /= channels
        distance, met = total_distance(
            sums_ptr, masses_ptr, pairing_ptr, N, L, K, total_channels, channels, pixels,
            "own", REGION_WEIGHT, MASKED_BACKGROUND, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        own = slope_of(grad_entry, distance, met, EPS, LOG_SCALE)
        if EXCHANGE != "none":
            distance, met = total_distance(
                sums_ptr, masses_ptr, pairing_ptr, N, L, K, total_channels, channels, pixels,
                EXCHANGE, REGION_WEIGHT, MASKED_BACKGROUND, BLOCK_N, BLOCK_C,
            )  # fmt: skip
            crossed = slope_of(grad_entry, distance, met, EPS, LOG_SCALE)
    else:
        sample_count = tl.zeros([BLOCK_COUNT], tl.int32)
        sample_grad = tl.zeros([BLOCK_COUNT], tl.float64)
        for start in range(0, N, BLOCK_COUNT):
            m = start + tl.arange(0, BLOCK_COUNT).to(tl.int64)
            _M_fg, _w_fg, _w_bg, m_counts = sample_weights(masses_ptr, m, N, L, pixels, REGION_WEIGHT)
            sample_count += m_counts.to(tl.int32)
            sample_grad += load_gradient(grad_loss_ptr, m, m_counts, layer, L, REDUCTION)
        if REDUCTION == "mean":
            scale /= tl.maximum(tl.sum(sample_count, axis=0), 1)
        if EXCHANGE == "pooled":
            pairs = tl.zeros([BLOCK_COUNT], tl.int32)
            for start in range(0, K, BLOCK_COUNT):
                k = start + tl.arange(0, BLOCK_COUNT).to(tl.int64)
                i, j = pair_of(pairing_ptr, k, N, K, EXCHANGE)
                _M_fg, _w_fg, _w_bg, i_counts = sample_weights(masses_ptr, i, N, L, pixels, REGION_WEIGHT)
                _M_fg, _w_fg, _w_bg, j_counts = sample_weights(masses_ptr, j, N, L, pixels, REGION_WEIGHT)
                pairs += (i_counts & j_counts).to(tl.int32)
            grad_pair = scale * tl.sum(sample_grad, axis=0) / tl.maximum(tl.sum(pairs, axis=0), 1)
    return scale, grad_pair, own, crossed


@triton.jit
def sums_gradient(
    grad_loss_ptr, sums_ptr, masses_ptr, pairing_ptr, n, layer, scale, grad_pair, own, crossed,
    N, L, K, total_channels, channels, pixels,
    REGION_WEIGHT: tl.constexpr, MASKED_BACKGROUND: tl.constexpr, NORM: tl.constexpr,
    LOG_SCALE: tl.constexpr, EPS: tl.constexpr, EXCHANGE: tl.constexpr, REDUCTION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_COUNT: tl.constexpr,
):  # fmt: skip
    """∂L/∂S_fg, ∂L/∂S_bg [BLOCK_N, BLOCK_C] and ∂L/∂M_fg, ∂L/∂M_bg [BLOCK_N] of the samples n [BLOCK_N]."""
    f, b, counts = region_features(
        sums_ptr, masses_ptr, n, N, L, total_channels, channels, pixels,
        REGION_WEIGHT, MASKED_BACKGROUND, BLOCK_C,
    )  # fmt: skip
    if NORM == "batch":
        q = tl.where(counts[:, None], own, 0)
    else:
        grad_entry = scale * load_gradient(grad_loss_ptr, n, counts, layer, L, REDUCTION)
        distance = distance_of(f, b, EPS, NORM)
        q = slope_of(grad_entry[:, None], distance, counts[:, None], EPS, LOG_SCALE)
    grad_f, grad_b = distance_gradient(f, b, q, EPS, NORM)

    if EXCHANGE != "none":
        pairs = K if EXCHANGE == "pooled" else N
        k = next_pair(pairing_ptr, n, tl.zeros_like(n) - 1, N, K, EXCHANGE, BLOCK_COUNT)
        while tl.min(k, axis=0) < pairs:
            # Where a sample has no pair left, k is out of range and the pair does not count.
            i, j = pair_of(pairing_ptr, k, N, K, EXCHANGE)
            f_i, b_i, i_counts = region_features(
                sums_ptr, masses_ptr, i, N, L, total_channels, channels, pixels,
                REGION_WEIGHT, MASKED_BACKGROUND, BLOCK_C,
            )  # fmt: skip
            f_j, b_j, j_counts = region_features(
                sums_ptr, masses_ptr, j, N, L, total_channels, channels, pixels,
                REGION_WEIGHT, MASKED_BACKGROUND, BLOCK_C,
            )  # fmt: skip
            met = (i_counts & j_counts)[:, None]
            if NORM == "batch":
                q = tl.where(met, crossed, 0)
            else:
                distance = distance_of(f_i, b_j, EPS, NORM)
                if EXCHANGE == "pooled":
                    distance += distance_of(f_j, b_i, EPS, NORM)
                    grad_k = grad_pair + tl.zeros_like(distance)
                else:
                    grad_k = scale * load_gradient(grad_loss_ptr, j, j_counts, layer, L, REDUCTION)
                    grad_k = grad_k[:, None]
                q = slope_of(grad_k, distance, met, EPS, LOG_SCALE)
            is_i, is_j = (i == n)[:, None], (j == n)[:, None]
            grad_f_i, grad_b_j = distance_gradient(f_i, b_j, q, EPS, NORM)
            grad_f += tl.where(is_i, grad_f_i, 0)
            grad_b += tl.where(is_j, grad_b_j, 0)
            if EXCHANGE == "pooled":
                grad_f_j, grad_b_i = distance_gradient(f_j, b_i, q, EPS, NORM)
                grad_f += tl.where(is_j, grad_f_j, 0)
                grad_b += tl.where(is_i, grad_b_i, 0)
            k = next_pair(pairing_ptr, n, k, N, K, EXCHANGE, BLOCK_COUNT)

    # Back through the weights, (L7).
    inside = counts[:, None] & (tl.arange(0, BLOCK_C) < channels)[None, :]
    _M_fg, w_fg, w_bg, _counts = sample_weights(masses_ptr, n, N, L, pixels, REGION_WEIGHT)
    grad_S_fg = tl.where(inside, grad_f, 0) * (1 / w_fg)[:, None]
    grad_S_bg = tl.where(inside, grad_b, 0) * (1 / w_bg)[:, None]
    grad_M_fg = tl.zeros_like(w_fg)
    grad_M_bg = tl.zeros_like(w_bg)
    if REGION_WEIGHT == "valid":
        grad_M_fg -= tl.sum(grad_S_fg * f + grad_S_bg * b, axis=1)
        grad_M_bg = grad_M_fg
    elif REGION_WEIGHT == "region":
        grad_M_fg -= tl.sum(grad_S_fg * f, axis=1)
        grad_M_bg -= tl.sum(grad_S_bg * b, axis=1)
    if MASKED_BACKGROUND:
        grad_M_fg += tl.sum(grad_S_bg, axis=1)
        grad_S_fg -= grad_S_bg
        grad_S_bg = tl.zeros_like(grad_S_bg)
    return grad_S_fg, grad_S_bg, grad_M_fg, grad_M_bg
