"""Backend `triton` of layer_losses: two launches forward and one backward for all layers of a pyramid.

The first launch sums tiles (region_sums). The second has a program for each sample of each layer: it adds the
partial sums of its sample, in float64 and the order of the tiles, and the last program of a layer to finish
computes the loss of the layer and its slopes from the finished sums (log_norm). Which program that is decides
nothing about the result. Backward is that of region_sums, with slopes that it scales as it loads them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdkernels.log_norm.impl import triton as log_norm
from fdkernels.log_norm.impl.triton import write_loss
from fdkernels.log_norm.impl.triton_gradient import entry_slopes, sums_gradient
from fdkernels.log_norm.options import Options
from fdkernels.region_sums.geometry import Geometry
from fdkernels.region_sums.impl.triton import sum_tiles, write_gradients
from fdkernels.region_sums.impl.triton_layers import launch, pick, table
from fdkernels.region_sums.impl.triton_partials import add_partials

__all__ = ["backward", "forward"]

# A program must hold many partial sums in flight and yet a tile of float64 in registers.
_WARPS = 16

# Integers that decide nothing about alignment: one compilation serves all their values.
_PLAIN = ["first_layer", "N", "L", "K", "total_channels"]


@triton.jit
def _write_slopes(
    slopes_ptr, sums_ptr, masses_ptr, pairing_ptr, layer, N, L, K, total_channels, channels, pixels,
    REGION_WEIGHT: tl.constexpr, MASKED_BACKGROUND: tl.constexpr, NORM: tl.constexpr,
    LOG_SCALE: tl.constexpr, EPS: tl.constexpr, EXCHANGE: tl.constexpr, REDUCTION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_COUNT: tl.constexpr,
):  # fmt: skip
    """The slopes (F1) of one layer, which begin at the pointer, BLOCK_N samples at a time."""
    scale, grad_pair, own, crossed = entry_slopes(
        None, sums_ptr, masses_ptr, pairing_ptr, layer, 0, N, L, K, total_channels, channels, pixels,
        REGION_WEIGHT, MASKED_BACKGROUND, NORM, LOG_SCALE, EPS, EXCHANGE, REDUCTION,
        BLOCK_N, BLOCK_C, BLOCK_COUNT,
    )  # fmt: skip
    channel = tl.arange(0, BLOCK_C)[None, :]
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        slope_fg, slope_bg, _mass_fg, _mass_bg = sums_gradient(
            None, sums_ptr, masses_ptr, pairing_ptr, n, layer, scale, grad_pair, own, crossed,
            N, L, K, total_channels, channels, pixels,
            REGION_WEIGHT, MASKED_BACKGROUND, NORM, LOG_SCALE, EPS, EXCHANGE, REDUCTION,
            BLOCK_C, BLOCK_COUNT,
        )  # fmt: skip
        dtype: tl.constexpr = slopes_ptr.dtype.element_ty
        row_ptr = slopes_ptr + n[:, None] * total_channels + channel
        inside = (n < N)[:, None] & (channel < channels)
        tl.store(row_ptr, slope_fg.to(dtype), mask=inside)
        tl.store(row_ptr + N.to(tl.int64) * total_channels, slope_bg.to(dtype), mask=inside)


@triton.jit(do_not_specialize=_PLAIN)
def layer_losses_forward_kernel(
    loss_ptr, slopes_ptr, partial_ptr, counters_ptr, sums_ptr, masses_ptr, pairing_ptr, first_layer,
    tables, N, L, K, total_channels,
    REGION_WEIGHT: tl.constexpr, MASKED_BACKGROUND: tl.constexpr, NORM: tl.constexpr,
    LOG_SCALE: tl.constexpr, EPS: tl.constexpr, EXCHANGE: tl.constexpr, REDUCTION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_COUNT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    layers: tl.constexpr = len(tables[0])
    program = tl.program_id(0) % layers
    n = (tl.program_id(0) // layers).to(tl.int64)
    layer = first_layer + program
    C, tiles, partial_start, channel_start, kind, P = pick(tables, program)
    partial_ptr += partial_start
    sums_ptr += channel_start
    masses_ptr += layer
    for i in tl.static_range(len(BLOCKS)):
        if kind == i:
            for region in tl.static_range(2):
                add_partials(
                    partial_ptr, sums_ptr, masses_ptr, region * N + n, N, L, total_channels,
                    C.to(tl.int32), tiles.to(tl.int32), BLOCKS[i][0], BLOCKS[i][1],
                )  # fmt: skip
    tl.debug_barrier()  # the sums are written by all threads and published by one
    before = tl.atomic_add(counters_ptr + layer, 1, sem="acq_rel")
    if before == N - 1:
        write_loss(
            loss_ptr, sums_ptr, masses_ptr, pairing_ptr, layer, channel_start, N, L, K, total_channels, C, P,
            REGION_WEIGHT, MASKED_BACKGROUND, NORM, LOG_SCALE, EPS, EXCHANGE, REDUCTION, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        if slopes_ptr is not None:
            _write_slopes(
                slopes_ptr + channel_start, sums_ptr, masses_ptr, pairing_ptr, layer,
                N, L, K, total_channels, C, P,
                REGION_WEIGHT, MASKED_BACKGROUND, NORM, LOG_SCALE, EPS, EXCHANGE, REDUCTION,
                BLOCK_N, BLOCK_C, BLOCK_COUNT,
            )  # fmt: skip


def forward(
    features: Sequence[Tensor],
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    pairing: Tensor | None,
    options: Options,
    with_slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [L], sums, masses, and the slopes (F1) [2, N, ΣC] (empty where not asked for)."""
    partial, counters, sums, masses, second_pass = sum_tiles(features, fg, bg)
    _, N, L = masses.shape
    slopes = torch.empty_like(sums) if with_slopes else sums.new_empty(0)
    loss = sums.new_empty(L) if N else sums.new_zeros(L)
    channels = [layer.shape[1] for layer in features]
    runtime, constants = log_norm.arguments(sums, pairing, channels, options)
    for layers, tables, blocks in second_pass.launches:
        launch(
            layer_losses_forward_kernel, N * len(layers),
            loss, slopes if with_slopes else None, partial, counters, sums, masses,
            pairing if pairing is None else pairing.contiguous(), layers[0],
            (*tables, table(features[i].shape[2:].numel() for i in layers)), *runtime,
            BLOCK_COUNT=log_norm.COUNT, BLOCKS=blocks, num_warps=_WARPS, **constants,
        )  # fmt: skip
    return loss, sums, masses, slopes


def backward(
    grad_loss: Tensor,
    slopes: Tensor,
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    geometry: Sequence[Geometry],
) -> list[Tensor]:
    """The gradients of the features (F2): grad_loss [L] times the slopes, through (R3)."""
    return write_gradients(slopes, grad_loss, fg, bg, upstream, geometry)
