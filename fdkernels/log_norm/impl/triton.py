"""Backend `triton` of log_norm: one launch forward and one backward for all layers, in float64.

Forward has a program for each layer, backward one for each sample of each layer; it looks up the
pairs of its sample, so that no two programs write the same element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdkernels.log_norm.impl.triton_gradient import entry_slopes, sums_gradient
from fdkernels.log_norm.impl.triton_pairs import entry_of, pair_distance, total_distance
from fdkernels.log_norm.options import Options
from fdkernels.region_sums.impl.triton_layers import chunks, launch, pick, power_of_2, table

__all__ = ["arguments", "backward", "forward", "warps", "write_loss"]

# Elements of a tile, all channels of some samples: 16 a thread for 8 warps.
_TILE = 4096
# Samples or pairs that a program of backward counts at once.
COUNT = 64

# Integers that decide nothing about alignment: one compilation serves all their values.
_PLAIN = ["first_layer", "N", "L", "K", "total_channels"]


@triton.jit
def write_loss(
    loss_ptr, sums_ptr, masses_ptr, pairing_ptr, layer, channel_start,
    N, L, K, total_channels, channels, pixels,
    REGION_WEIGHT: tl.constexpr, MASKED_BACKGROUND: tl.constexpr, NORM: tl.constexpr,
    LOG_SCALE: tl.constexpr, EPS: tl.constexpr, EXCHANGE: tl.constexpr, REDUCTION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The loss of one layer, whose sums and masses begin at the pointers, by (L1) to (L6)."""
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
def log_norm_forward_kernel(
    loss_ptr, sums_ptr, masses_ptr, pairing_ptr, first_layer, tables, N, L, K, total_channels,
    REGION_WEIGHT: tl.constexpr, MASKED_BACKGROUND: tl.constexpr, NORM: tl.constexpr,
    LOG_SCALE: tl.constexpr, EPS: tl.constexpr, EXCHANGE: tl.constexpr, REDUCTION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    layer = first_layer + program
    channel_start, C, P = pick(tables, program)
    write_loss(
        loss_ptr, sums_ptr + channel_start, masses_ptr + layer, pairing_ptr, layer, channel_start,
        N, L, K, total_channels, C, P,
        REGION_WEIGHT, MASKED_BACKGROUND, NORM, LOG_SCALE, EPS, EXCHANGE, REDUCTION, BLOCK_N, BLOCK_C,
    )  # fmt: skip


@triton.jit(do_not_specialize=_PLAIN)
def log_norm_backward_kernel(
    grad_sums_ptr, grad_masses_ptr, grad_loss_ptr, sums_ptr, masses_ptr, pairing_ptr,
    first_layer, tables, N, L, K, total_channels,
    REGION_WEIGHT: tl.constexpr, MASKED_BACKGROUND: tl.constexpr, NORM: tl.constexpr,
    LOG_SCALE: tl.constexpr, EPS: tl.constexpr, EXCHANGE: tl.constexpr, REDUCTION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_COUNT: tl.constexpr,
):  # fmt: skip
    layers: tl.constexpr = len(tables[0])
    program = tl.program_id(0) % layers
    n = tl.zeros([1], tl.int64) + tl.program_id(0) // layers
    layer = first_layer + program
    channel_start, C, P = pick(tables, program)
    sums_ptr += channel_start
    masses_ptr += layer
    scale, grad_pair, own, crossed = entry_slopes(
        grad_loss_ptr, sums_ptr, masses_ptr, pairing_ptr, layer, channel_start, N, L, K, total_channels, C, P,
        REGION_WEIGHT, MASKED_BACKGROUND, NORM, LOG_SCALE, EPS, EXCHANGE, REDUCTION,
        BLOCK_N, BLOCK_C, BLOCK_COUNT,
    )  # fmt: skip
    grad_S_fg, grad_S_bg, grad_M_fg, grad_M_bg = sums_gradient(
        grad_loss_ptr, sums_ptr, masses_ptr, pairing_ptr, n, layer, scale, grad_pair, own, crossed,
        N, L, K, total_channels, C, P,
        REGION_WEIGHT, MASKED_BACKGROUND, NORM, LOG_SCALE, EPS, EXCHANGE, REDUCTION, BLOCK_C, BLOCK_COUNT,
    )  # fmt: skip
    dtype: tl.constexpr = grad_sums_ptr.dtype.element_ty
    channel = tl.arange(0, BLOCK_C)
    bg_offset = N.to(tl.int64)
    grad_sums_ptr += n[:, None] * total_channels + (channel_start + channel)[None, :]
    tl.store(grad_sums_ptr, grad_S_fg.to(dtype), mask=(channel < C)[None, :])
    tl.store(grad_sums_ptr + bg_offset * total_channels, grad_S_bg.to(dtype), mask=(channel < C)[None, :])
    grad_masses_ptr += n * L + layer
    tl.store(grad_masses_ptr, grad_M_fg.to(dtype))
    tl.store(grad_masses_ptr + bg_offset * L, grad_M_bg.to(dtype))


def arguments(
    sums: Tensor, pairing: Tensor | None, channels: Sequence[int], options: Options
) -> tuple[list[Any], dict[str, Any]]:
    """What the kernels take after the tables of layers, at run time (N, L, K, ΣC) and at compile time."""
    K = 0 if pairing is None else pairing.shape[0]
    block_c = power_of_2(max(channels))
    block_n = min(power_of_2(max(sums.shape[1], K)), max(_TILE // block_c, 1))
    constants = {
        "REGION_WEIGHT": options.region_weight,
        "MASKED_BACKGROUND": options.masked_background,
        "NORM": options.norm,
        # As constants, since a float argument of a kernel has 32 bits.
        "LOG_SCALE": float(options.log_scale),
        "EPS": float(options.eps),
        "EXCHANGE": options.exchange if pairing is not None else "none",
        "REDUCTION": options.reduction,
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
    }
    return [sums.shape[1], len(channels), K, sums.shape[2]], constants


def _tables(layers: Sequence[int], channels: Sequence[int], pixels: Sequence[int]) -> list[Any]:
    """The first layer of a launch, and tables of where its layers start, of C and of P."""
    starts = [sum(channels[:i]) for i in range(len(channels))]
    return [layers[0], tuple(table(of[i] for i in layers) for of in (starts, channels, pixels))]


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
    runtime, constants = arguments(sums, pairing, channels, options)
    inputs = [sums.contiguous(), masses.contiguous(), pairing if pairing is None else pairing.contiguous()]
    for layers in chunks(range(len(channels))):
        launch(
            log_norm_forward_kernel, len(layers),
            loss, *inputs, *_tables(layers, channels, pixels), *runtime,
            num_warps=warps(constants["BLOCK_N"] * constants["BLOCK_C"]), **constants,
        )  # fmt: skip
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
    runtime, constants = arguments(sums, pairing, channels, options)
    inputs = [sums.contiguous(), masses.contiguous(), pairing if pairing is None else pairing.contiguous()]
    rows = constants["BLOCK_N"] if options.norm == "batch" else 1
    for layers in chunks(range(len(channels))):
        launch(
            log_norm_backward_kernel, sums.shape[1] * len(layers),
            grad_sums, grad_masses, grad_loss.contiguous(), *inputs,
            *_tables(layers, channels, pixels), *runtime,
            BLOCK_COUNT=COUNT, num_warps=warps(rows * constants["BLOCK_C"]), **constants,
        )  # fmt: skip
    return grad_sums, grad_masses


def warps(elements: int) -> int:
    """Warps for a tile of so many elements of float64."""
    return min(max(elements // 256, 1), 8)
