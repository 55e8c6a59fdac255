"""Backend `triton` of log_norm: one launch forward and one backward for all layers, in float64.

Forward has a program for each layer, backward one for each sample of each layer; it looks up the
pairs of its sample, so that no two programs write the same element.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdkernels.log_norm.impl.triton_pairs import (
    distance_gradient,
    distance_of,
    entry_of,
    load_gradient,
    pair_distance,
    pair_of,
    region_features,
    sample_weights,
    slope_of,
    total_distance,
)
from fdkernels.log_norm.options import Options

__all__ = ["backward", "forward"]

# Elements of a tile in forward: 16 a thread for 8 warps.
_TILE = 4096
# Samples or pairs that a program of backward counts at once.
_COUNT = 64

# Integers that decide nothing about alignment: one compilation serves all their values.
_PLAIN = ["N", "L", "K", "total_channels"]


@triton.jit(do_not_specialize=_PLAIN)
def log_norm_forward_kernel(
    loss_ptr, sums_ptr, masses_ptr, pairing_ptr, layers_ptr, N, L, K, total_channels,
    REGION_WEIGHT: tl.constexpr, MASKED_BACKGROUND: tl.constexpr, NORM: tl.constexpr,
    LOG_SCALE: tl.constexpr, EPS: tl.constexpr, EXCHANGE: tl.constexpr, REDUCTION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0)
    channel_start = tl.load(layers_ptr + layer * 3)
    channels = tl.load(layers_ptr + layer * 3 + 1)
    pixels = tl.load(layers_ptr + layer * 3 + 2)
    sums_ptr += channel_start
    masses_ptr += layer
    dtype: tl.constexpr = loss_ptr.dtype.element_ty

    if NORM == "batch":
        distance, counts = total_distance(
            sums_ptr, masses_ptr, pairing_ptr, N, L, K, total_channels, channels, pixels,
            "own", REGION_WEIGHT, MASKED_BACKGROUND, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        entries = entry_of(distance, counts, EPS, LOG_SCALE)  # [1, BLOCK_C]
        if EXCHANGE != "none":
            distance, met = total_distance(
                sums_ptr, masses_ptr, pairing_ptr, N, L, K, total_channels, channels, pixels,
                EXCHANGE, REGION_WEIGHT, MASKED_BACKGROUND, BLOCK_N, BLOCK_C,
            )  # fmt: skip
            entries += entry_of(distance, met, EPS, LOG_SCALE)
        total = tl.sum(tl.sum(entries, axis=1), axis=0)
        counted = tl.sum(tl.sum(counts.to(tl.int32), axis=1), axis=0)
        if REDUCTION == "none":
            channel = tl.arange(0, BLOCK_C)[None, :]
            tl.store(loss_ptr + channel_start + channel, entries.to(dtype), mask=channel < channels)
    else:
        pooled = tl.zeros([BLOCK_N, 1], tl.float64)
        pairs = tl.zeros([BLOCK_N, 1], tl.int32)
        if EXCHANGE == "pooled":
            for start in range(0, K, BLOCK_N):
                k = start + tl.arange(0, BLOCK_N).to(tl.int64)
                distance, met = pair_distance(
                    sums_ptr, masses_ptr, pairing_ptr, k, N, L, K, total_channels, channels, pixels,
                    EXCHANGE, REGION_WEIGHT, MASKED_BACKGROUND, NORM, EPS, BLOCK_C,
                )  # fmt: skip
                pooled += entry_of(distance, met, EPS, LOG_SCALE)
                pairs += met.to(tl.int32)
        pooled_mean = tl.sum(pooled, axis=0) / tl.maximum(tl.sum(pairs, axis=0), 1)
        all_entries = tl.zeros([BLOCK_N, 1], tl.float64)
        all_counts = tl.zeros([BLOCK_N, 1], tl.int32)
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N).to(tl.int64)
            distance, counts = pair_distance(
                sums_ptr, masses_ptr, pairing_ptr, n, N, L, K, total_channels, channels, pixels,
                "own", REGION_WEIGHT, MASKED_BACKGROUND, NORM, EPS, BLOCK_C,
            )  # fmt: skip
            entries = entry_of(distance, counts, EPS, LOG_SCALE)  # [BLOCK_N, 1]
            if EXCHANGE == "shuffle":
                distance, met = pair_distance(
                    sums_ptr, masses_ptr, pairing_ptr, n, N, L, K, total_channels, channels, pixels,
                    EXCHANGE, REGION_WEIGHT, MASKED_BACKGROUND, NORM, EPS, BLOCK_C,
                )  # fmt: skip
                entries += entry_of(distance, met, EPS, LOG_SCALE)
            entries += tl.where(counts, pooled_mean[None, :], 0)
            all_entries += entries
            all_counts += counts.to(tl.int32)
            if REDUCTION == "none":
                rows = loss_ptr + n[:, None] * L + layer
                tl.store(rows, entries.to(dtype), mask=n[:, None] < N)
        total = tl.sum(tl.sum(all_entries, axis=1), axis=0)
        counted = tl.sum(tl.sum(all_counts, axis=1), axis=0)

    if REDUCTION == "mean":
        total /= tl.maximum(counted, 1)
    if REDUCTION != "none":
        tl.store(loss_ptr + layer, total.to(dtype))


@triton.jit(do_not_specialize=_PLAIN)
def log_norm_backward_kernel(  # noqa: PLR0912
    grad_sums_ptr, grad_masses_ptr, grad_loss_ptr, sums_ptr, masses_ptr, pairing_ptr, layers_ptr,
    N, L, K, total_channels,
    REGION_WEIGHT: tl.constexpr, MASKED_BACKGROUND: tl.constexpr, NORM: tl.constexpr,
    LOG_SCALE: tl.constexpr, EPS: tl.constexpr, EXCHANGE: tl.constexpr, REDUCTION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_COUNT: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0) % L
    n = (tl.program_id(0) // L).to(tl.int64)
    channel_start = tl.load(layers_ptr + layer * 3)
    channels = tl.load(layers_ptr + layer * 3 + 1)
    pixels = tl.load(layers_ptr + layer * 3 + 2)
    sums_ptr += channel_start
    masses_ptr += layer
    channel = tl.arange(0, BLOCK_C)[None, :]
    sample = tl.zeros([1], tl.int64) + n
    f, b, counts = region_features(
        sums_ptr, masses_ptr, sample, N, L, total_channels, channels, pixels,
        REGION_WEIGHT, MASKED_BACKGROUND, BLOCK_C,
    )  # fmt: skip

    # The own term: q of (L3) or (L6), [1, 1] or [1, BLOCK_C].
    if NORM == "batch":
        if REDUCTION == "none":
            grad_loss_ptr += channel_start
            grad_entry = tl.load(grad_loss_ptr + channel, mask=channel < channels, other=0)
            grad_entry = grad_entry.to(tl.float64)
        else:
            grad_entry = tl.load(grad_loss_ptr + layer).to(tl.float64)
            if REDUCTION == "mean":
                grad_entry /= channels
        distance, met = total_distance(
            sums_ptr, masses_ptr, pairing_ptr, N, L, K, total_channels, channels, pixels,
            "own", REGION_WEIGHT, MASKED_BACKGROUND, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        own_slope = slope_of(grad_entry, distance, met, EPS, LOG_SCALE)
        if EXCHANGE != "none":
            distance, met = total_distance(
                sums_ptr, masses_ptr, pairing_ptr, N, L, K, total_channels, channels, pixels,
                EXCHANGE, REGION_WEIGHT, MASKED_BACKGROUND, BLOCK_N, BLOCK_C,
            )  # fmt: skip
            slope = slope_of(grad_entry, distance, met, EPS, LOG_SCALE)
    else:
        sample_count = tl.zeros([BLOCK_COUNT], tl.int32)
        sample_grad = tl.zeros([BLOCK_COUNT], tl.float64)
        for start in range(0, N, BLOCK_COUNT):
            m = start + tl.arange(0, BLOCK_COUNT).to(tl.int64)
            _M_fg, _w_fg, _w_bg, m_counts = sample_weights(masses_ptr, m, N, L, pixels, REGION_WEIGHT)
            sample_count += m_counts.to(tl.int32)
            sample_grad += load_gradient(grad_loss_ptr, m, m_counts, layer, L, REDUCTION)
        scale = tl.full((), 1, tl.float64)
        if REDUCTION == "mean":
            scale /= tl.maximum(tl.sum(sample_count, axis=0), 1)
        pairs = tl.zeros([BLOCK_COUNT], tl.int32)
        if EXCHANGE == "pooled":
            for start in range(0, K, BLOCK_COUNT):
                k = start + tl.arange(0, BLOCK_COUNT).to(tl.int64)
                i, j = pair_of(pairing_ptr, k, N, K, EXCHANGE)
                _M_fg, _w_fg, _w_bg, i_counts = sample_weights(masses_ptr, i, N, L, pixels, REGION_WEIGHT)
                _M_fg, _w_fg, _w_bg, j_counts = sample_weights(masses_ptr, j, N, L, pixels, REGION_WEIGHT)
                pairs += (i_counts & j_counts).to(tl.int32)
        grad_pair = scale * tl.sum(sample_grad, axis=0) / tl.maximum(tl.sum(pairs, axis=0), 1)
        grad_entry = scale * load_gradient(grad_loss_ptr, sample, counts, layer, L, REDUCTION)
        distance = distance_of(f, b, EPS, NORM)
        own_slope = slope_of(grad_entry[:, None], distance, counts[:, None], EPS, LOG_SCALE)
    grad_f, grad_b = distance_gradient(f, b, own_slope, EPS, NORM)

    if EXCHANGE != "none":
        for k in range(K if EXCHANGE == "pooled" else N):
            i, j = pair_of(pairing_ptr, k, N, K, EXCHANGE)
            if (i == n) | (j == n):
                i_sample = tl.zeros([1], tl.int64) + i
                j_sample = tl.zeros([1], tl.int64) + j
                f_i, b_i, i_counts = region_features(
                    sums_ptr, masses_ptr, i_sample, N, L, total_channels, channels, pixels,
                    REGION_WEIGHT, MASKED_BACKGROUND, BLOCK_C,
                )  # fmt: skip
                f_j, b_j, j_counts = region_features(
                    sums_ptr, masses_ptr, j_sample, N, L, total_channels, channels, pixels,
                    REGION_WEIGHT, MASKED_BACKGROUND, BLOCK_C,
                )  # fmt: skip
                both_count = (i_counts & j_counts)[:, None]
                if NORM == "batch":
                    q = tl.where(both_count, slope, 0)
                else:
                    pair_distance_k = distance_of(f_i, b_j, EPS, NORM)
                    if EXCHANGE == "pooled":
                        pair_distance_k += distance_of(f_j, b_i, EPS, NORM)
                        grad_k = tl.zeros([1, 1], tl.float64) + grad_pair
                    else:
                        grad_k = scale * load_gradient(grad_loss_ptr, j_sample, j_counts, layer, L, REDUCTION)
                        grad_k = grad_k[:, None]
                    q = slope_of(grad_k, pair_distance_k, both_count, EPS, LOG_SCALE)
                grad_f_i, grad_b_j = distance_gradient(f_i, b_j, q, EPS, NORM)
                grad_f += tl.where(i == n, grad_f_i, 0)
                grad_b += tl.where(j == n, grad_b_j, 0)
                if EXCHANGE == "pooled":
                    grad_f_j, grad_b_i = distance_gradient(f_j, b_i, q, EPS, NORM)
                    grad_f += tl.where(j == n, grad_f_j, 0)
                    grad_b += tl.where(i == n, grad_b_i, 0)

    # Back through the weights, (L7).
    inside = counts[:, None] & (channel < channels)
    _M_fg, w_fg, w_bg, _counts = sample_weights(masses_ptr, sample, N, L, pixels, REGION_WEIGHT)
    grad_S_fg = tl.where(inside, grad_f, 0) * (1 / w_fg)[:, None]  # [1, BLOCK_C]
    grad_S_bg = tl.where(inside, grad_b, 0) * (1 / w_bg)[:, None]
    grad_M_fg = tl.zeros([1], tl.float64)
    grad_M_bg = tl.zeros([1], tl.float64)
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
    dtype: tl.constexpr = grad_sums_ptr.dtype.element_ty
    grad_sums_ptr += n * total_channels + channel_start + channel
    bg_offset = N.to(tl.int64)
    tl.store(grad_sums_ptr, grad_S_fg.to(dtype), mask=channel < channels)
    grad_sums_ptr += bg_offset * total_channels
    tl.store(grad_sums_ptr, grad_S_bg.to(dtype), mask=channel < channels)
    grad_masses_ptr += sample * L + layer
    tl.store(grad_masses_ptr, grad_M_fg.to(dtype))
    tl.store(grad_masses_ptr + bg_offset * L, grad_M_bg.to(dtype))


@functools.cache
def _layers(channels: tuple[int, ...], pixels: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each layer starts, its C and its P, [L, 3] int64; copied to the device once."""
    starts = [sum(channels[:i]) for i in range(len(channels))]
    rows = list(zip(starts, channels, pixels, strict=True))
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _arguments(
    sums: Tensor,
    masses: Tensor,
    pairing: Tensor | None,
    channels: Sequence[int],
    pixels: Sequence[int],
    options: Options,
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments that both kernels take, at run time and at compile time."""
    used_pixels = pixels if options.region_weight == "pixels" else [0] * len(pixels)
    layers = _layers(tuple(channels), tuple(used_pixels), sums.device)
    exchange = options.exchange if pairing is not None else "none"
    K = 0 if pairing is None else pairing.shape[0]
    block_c = triton.next_power_of_2(max(*channels, 1))
    block_n = min(triton.next_power_of_2(max(sums.shape[1], K, 1)), max(_TILE // block_c, 1))
    runtime = [
        sums.contiguous(),
        masses.contiguous(),
        pairing if pairing is None else pairing.contiguous(),
        layers,
        sums.shape[1],
        len(channels),
        K,
        sums.shape[2],
    ]
    constants = {
        "REGION_WEIGHT": options.region_weight,
        "MASKED_BACKGROUND": options.masked_background,
        "NORM": options.norm,
        # As constants, since a float argument of a kernel has 32 bits.
        "LOG_SCALE": float(options.log_scale),
        "EPS": float(options.eps),
        "EXCHANGE": exchange,
        "REDUCTION": options.reduction,
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
        "enable_fp_fusion": True,
    }
    return runtime, constants


def forward(
    sums: Tensor,
    masses: Tensor,
    pairing: Tensor | None,
    channels: Sequence[int],
    pixels: Sequence[int],
    options: Options,
) -> Tensor:
    """Losses [L], or [N, L] ([ΣC] over the batch) without reduction, by (L1) to (L6)."""
    shape: tuple[int, ...] = (len(channels),)
    if options.reduction == "none":
        batch = options.norm == "batch"
        shape = (sums.shape[2],) if batch else (sums.shape[1], len(channels))
    loss = sums.new_empty(shape)
    runtime, constants = _arguments(sums, masses, pairing, channels, pixels, options)
    num_warps = _warps(constants["BLOCK_N"] * constants["BLOCK_C"])
    with torch.cuda.device_of(sums):
        log_norm_forward_kernel[(len(channels),)](loss, *runtime, num_warps=num_warps, **constants)
    return loss


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
    grad_sums = torch.empty_like(sums, memory_format=torch.contiguous_format)
    grad_masses = torch.empty_like(masses, memory_format=torch.contiguous_format)
    programs = sums.shape[1] * len(channels)
    if programs > 0:
        runtime, constants = _arguments(sums, masses, pairing, channels, pixels, options)
        rows = constants["BLOCK_N"] if options.norm == "batch" else 1
        num_warps = _warps(rows * constants["BLOCK_C"])
        with torch.cuda.device_of(sums):
            log_norm_backward_kernel[(programs,)](
                grad_sums, grad_masses, grad_loss.contiguous(), *runtime,
                BLOCK_COUNT=_COUNT, num_warps=num_warps, **constants,
            )  # fmt: skip
    return grad_sums, grad_masses


def _warps(elements: int) -> int:
    return min(max(elements // 256, 1), 8)
