"""The slopes of a layer, how its loss changes with its sums (F1), for backend `triton`.

`_shared_slopes` finds what the gradients of all samples share; `_sums_gradient` then walks over the pairs of
each of BLOCK_N samples in their order, so that no two programs write the same element.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fdkernels.op.triton.pairs import (
    distance_gradient,
    distance_of,
    next_pair,
    pair_of,
    region_features,
    sample_weights,
    slope_of,
    total_distance,
)

__all__ = ["write_slopes"]


class SharedSlopes(NamedTuple):
    """What the gradients of a layer's samples share."""

    scale: Any  # by which the reduction multiplies gradients
    grad_pair: Any  # the gradient of a pooled pair
    own: Any  # q of (L6) [1, BLOCK_C], for the norm over the batch
    exchanged: Any  # the same of the exchange term


@triton.jit
def _shared_slopes(
    layer, OPTIONS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_COUNT: tl.constexpr
):
    """The first two serve the norms of samples, the last two the norm over the batch; the others are 0."""
    EXCHANGE: tl.constexpr = OPTIONS.exchange  # Triton 3.6 passes no field of a tuple on as a constant
    scale = tl.full((), 1, tl.float64)
    grad_pair = tl.zeros([], tl.float64)
    own = tl.zeros([1, BLOCK_C], tl.float64)
    exchanged = tl.zeros([1, BLOCK_C], tl.float64)
    if OPTIONS.norm == "batch":
        grad_entry = scale + own
        if OPTIONS.reduction == "mean":
            grad_entry /= layer.channels
        distance, valid = total_distance(layer, "own", OPTIONS, BLOCK_N, BLOCK_C)
        own = slope_of(grad_entry, distance, valid, OPTIONS)
        if EXCHANGE != "none":
            distance, valid = total_distance(layer, EXCHANGE, OPTIONS, BLOCK_N, BLOCK_C)
            exchanged = slope_of(grad_entry, distance, valid, OPTIONS)
    else:
        sample_count = tl.zeros([BLOCK_COUNT], tl.int32)
        for start in range(0, layer.N, BLOCK_COUNT):
            m = start + tl.arange(0, BLOCK_COUNT).to(tl.int64)
            _M_fg, _w_fg, _w_bg, m_counts = sample_weights(layer, m, OPTIONS)
            sample_count += m_counts.to(tl.int32)
        samples = tl.sum(sample_count, axis=0)
        if OPTIONS.reduction == "mean":
            scale /= tl.maximum(samples, 1)
        if EXCHANGE == "pooled":
            pairs = tl.zeros([BLOCK_COUNT], tl.int32)
            for start in range(0, layer.K, BLOCK_COUNT):
                k = start + tl.arange(0, BLOCK_COUNT).to(tl.int64)
                i, j = pair_of(layer, k, "pooled")
                _M_fg, _w_fg, _w_bg, i_counts = sample_weights(layer, i, OPTIONS)
                _M_fg, _w_fg, _w_bg, j_counts = sample_weights(layer, j, OPTIONS)
                pairs += (i_counts & j_counts).to(tl.int32)
            grad_pair = scale * samples.to(tl.float64) / tl.maximum(tl.sum(pairs, axis=0), 1)
    return SharedSlopes(scale, grad_pair, own, exchanged)


@triton.jit
def _sums_gradient(layer, n, shared, OPTIONS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_COUNT: tl.constexpr):
    """∂L/∂S_fg and ∂L/∂S_bg [BLOCK_N, BLOCK_C] of the samples n [BLOCK_N]."""
    EXCHANGE: tl.constexpr = OPTIONS.exchange  # Triton 3.6 passes no field of a tuple on as a constant
    f, b, counts = region_features(layer, n, OPTIONS, BLOCK_C)
    if OPTIONS.norm == "batch":
        q = tl.where(counts[:, None], shared.own, 0)
    else:
        grad_entry = shared.scale * counts.to(tl.float64)
        q = slope_of(grad_entry[:, None], distance_of(f, b, OPTIONS), counts[:, None], OPTIONS)
    grad_f, grad_b = distance_gradient(f, b, q, OPTIONS)

    if EXCHANGE != "none":
        pairs = layer.K if EXCHANGE == "pooled" else layer.N
        k = next_pair(layer, n, tl.zeros_like(n) - 1, EXCHANGE, BLOCK_COUNT)
        while tl.min(k, axis=0) < pairs:
            # Where a sample has no pair left, k is out of range and the pair does not count.
            i, j = pair_of(layer, k, EXCHANGE)
            f_i, b_i, i_counts = region_features(layer, i, OPTIONS, BLOCK_C)
            f_j, b_j, j_counts = region_features(layer, j, OPTIONS, BLOCK_C)
            valid = (i_counts & j_counts)[:, None]
            if OPTIONS.norm == "batch":
                q = tl.where(valid, shared.exchanged, 0)
            else:
                distance = distance_of(f_i, b_j, OPTIONS)
                if EXCHANGE == "pooled":
                    distance += distance_of(f_j, b_i, OPTIONS)
                    grad_k = shared.grad_pair + tl.zeros_like(distance)
                else:
                    grad_k = (shared.scale * j_counts.to(tl.float64))[:, None]
                q = slope_of(grad_k, distance, valid, OPTIONS)
            is_i, is_j = (i == n)[:, None], (j == n)[:, None]
            grad_f_i, grad_b_j = distance_gradient(f_i, b_j, q, OPTIONS)
            grad_f += tl.where(is_i, grad_f_i, 0)
            grad_b += tl.where(is_j, grad_b_j, 0)
            if EXCHANGE == "pooled":
                grad_f_j, grad_b_i = distance_gradient(f_j, b_i, q, OPTIONS)
                grad_f += tl.where(is_j, grad_f_j, 0)
                grad_b += tl.where(is_i, grad_b_i, 0)
            k = next_pair(layer, n, k, EXCHANGE, BLOCK_COUNT)

    # Back through the weights, (L7).
    inside = counts[:, None] & (tl.arange(0, BLOCK_C) < layer.channels)[None, :]
    _M_fg, w_fg, w_bg, _counts = sample_weights(layer, n, OPTIONS)
    grad_S_fg = tl.where(inside, grad_f, 0) * (1 / w_fg)[:, None]
    grad_S_bg = tl.where(inside, grad_b, 0) * (1 / w_bg)[:, None]
    if OPTIONS.masked_background:
        grad_S_fg -= grad_S_bg
        grad_S_bg = tl.zeros_like(grad_S_bg)
    return grad_S_fg, grad_S_bg


@triton.jit
def write_slopes(
    slopes_ptr, layer, OPTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_COUNT: tl.constexpr,
):  # fmt: skip
    """Write the slopes (F1) of one layer, from its first channel on, BLOCK_N samples at a time."""
    shared = _shared_slopes(layer, OPTIONS, BLOCK_N, BLOCK_C, BLOCK_COUNT)
    channel = tl.arange(0, BLOCK_C)[None, :]
    for start in range(0, layer.N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        slope_fg, slope_bg = _sums_gradient(layer, n, shared, OPTIONS, BLOCK_C, BLOCK_COUNT)
        dtype: tl.constexpr = slopes_ptr.dtype.element_ty
        row_ptr = slopes_ptr + n[:, None] * layer.total_channels + channel
        inside = (n < layer.N)[:, None] & (channel < layer.channels)
        tl.store(row_ptr, slope_fg.to(dtype), mask=inside)
        tl.store(row_ptr + layer.N.to(tl.int64) * layer.total_channels, slope_bg.to(dtype), mask=inside)
