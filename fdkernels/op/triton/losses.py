"""The second launch of forward on backend `triton`: sums, losses and slopes from the partial sums.

A program adds the partial sums of one sample of one layer, in float64 and the order of the tiles. The last
program of a layer to finish computes the loss of the layer and its slopes from the finished sums; which
program that is does not change the result. `losses` takes finished sums, with one program a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdkernels.conventions import Options
from fdkernels.op.pyramid import Pyramid, Sums, Weights
from fdkernels.op.triton.launch import chunks, entry_of_layer, launch, per_layer_table, power_of_2
from fdkernels.op.triton.pairs import LayerSums, entry_of, pair_distance, total_distance
from fdkernels.op.triton.second_pass import add_partials
from fdkernels.op.triton.slopes import write_slopes
from fdkernels.op.triton.sums import sum_tiles

__all__ = ["losses", "sums"]

# A program must hold many partial sums in flight and yet a tile of float64 in registers.
_WARPS = 16
# Elements of a tile, all channels of some samples: 16 a thread for 8 warps.
_TILE = 4096
# Samples or pairs that a program counts at once.
_COUNT = 64

# Integers that say nothing about alignment: one compilation serves all their values.
_PLAIN = ["first_layer", "N", "L", "K", "total_channels"]


@triton.jit
def _write_loss(loss_ptr, layer, OPTIONS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write the loss of one layer, by (L1) to (L6)."""
    EXCHANGE: tl.constexpr = OPTIONS.exchange  # Triton 3.6 passes no field of a tuple on as a constant
    if OPTIONS.norm == "batch":
        distance, counts = total_distance(layer, "own", OPTIONS, BLOCK_N, BLOCK_C)
        entries = entry_of(distance, counts, OPTIONS)  # [1, BLOCK_C]
        if EXCHANGE != "none":
            distance, valid = total_distance(layer, EXCHANGE, OPTIONS, BLOCK_N, BLOCK_C)
            entries += entry_of(distance, valid, OPTIONS)
        total = tl.sum(tl.sum(entries, axis=1), axis=0)
        counted = tl.sum(tl.sum(counts.to(tl.int32), axis=1), axis=0)
    else:
        pooled = tl.zeros([BLOCK_N, 1], tl.float64)
        pairs = tl.zeros([BLOCK_N, 1], tl.int32)
        if EXCHANGE == "pooled":
            for start in range(0, layer.K, BLOCK_N):
                k = start + tl.arange(0, BLOCK_N).to(tl.int64)
                distance, valid = pair_distance(layer, k, "pooled", OPTIONS, BLOCK_C)
                pooled += entry_of(distance, valid, OPTIONS)
                pairs += valid.to(tl.int32)
        pooled_mean = tl.sum(pooled, axis=0) / tl.maximum(tl.sum(pairs, axis=0), 1)
        all_entries = tl.zeros([BLOCK_N, 1], tl.float64)
        all_counts = tl.zeros([BLOCK_N, 1], tl.int32)
        for start in range(0, layer.N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N).to(tl.int64)
            distance, counts = pair_distance(layer, n, "own", OPTIONS, BLOCK_C)
            entries = entry_of(distance, counts, OPTIONS)  # [BLOCK_N, 1]
            if EXCHANGE == "shuffle":
                distance, valid = pair_distance(layer, n, "shuffle", OPTIONS, BLOCK_C)
                entries += entry_of(distance, valid, OPTIONS)
            entries += tl.where(counts, pooled_mean[None, :], 0)
            all_entries += entries
            all_counts += counts.to(tl.int32)
        total = tl.sum(tl.sum(all_entries, axis=1), axis=0)
        counted = tl.sum(tl.sum(all_counts, axis=1), axis=0)
    if OPTIONS.reduction == "mean":
        total /= tl.maximum(counted, 1)
    tl.store(loss_ptr, total.to(loss_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=_PLAIN)
def losses_kernel(
    loss_ptr, slopes_ptr, partial_ptr, counters_ptr, sums_ptr, masses_ptr, pairing_ptr, first_layer,
    tables, N, L, K, total_channels, OPTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_COUNT: tl.constexpr, BLOCK_SHAPES: tl.constexpr,
):  # fmt: skip
    """Losses and slopes, (L1) to (F1): a program takes a sample of a layer, the last of a layer adds up."""
    layers: tl.constexpr = len(tables[0])
    program = tl.program_id(0) % layers
    n = (tl.program_id(0) // layers).to(tl.int64)
    index = first_layer + program
    C, tiles, partial_start, channel_start, block_shape, P = entry_of_layer(tables, program)
    sums_ptr += channel_start
    masses_ptr += index
    finished = N - 1
    if partial_ptr is not None:
        for i in tl.static_range(len(BLOCK_SHAPES)):
            if block_shape == i:
                for region in tl.static_range(2):
                    add_partials(
                        partial_ptr + partial_start, sums_ptr, masses_ptr, region * N + n, N, L,
                        total_channels, C.to(tl.int32), tiles.to(tl.int32),
                        BLOCK_SHAPES[i][0], BLOCK_SHAPES[i][1],
                    )  # fmt: skip
        tl.debug_barrier()  # the sums are written by all threads and published by one
        finished = tl.atomic_add(counters_ptr + index, 1, sem="acq_rel")
    if finished == N - 1:
        layer = LayerSums(sums_ptr, masses_ptr, pairing_ptr, N, L, K, total_channels, C, P)
        _write_loss(loss_ptr + index, layer, OPTIONS, BLOCK_N, BLOCK_C)
        if slopes_ptr is not None:
            write_slopes(slopes_ptr + channel_start, layer, OPTIONS, BLOCK_N, BLOCK_C, BLOCK_COUNT)


def sums(
    features: Sequence[Tensor],
    weights: Weights,
    pyramid: Pyramid,
    options: Options | None,
    pairing: Tensor | None,
    with_slopes: bool,
    adds_up: bool = False,
) -> Sums:
    """Sum layers [N, C_l, *S_l] by (R2) and make losses of the sums: a launch for the tiles, and one more."""
    partial, counters, sums, masses, second_pass = sum_tiles(features, weights, pyramid)
    _, N, L = masses.shape
    if options is None:
        second_pass.run(partial, sums, masses)
        return Sums(sums, masses, None, None)
    loss = sums.new_empty(L) if N else sums.new_zeros(L)
    slopes = torch.empty_like(sums) if with_slopes else None
    pairing, runtime, constants = _arguments(sums, masses, pyramid.channels, options, pairing)
    for layers, tables, blocks in second_pass.launches:
        launch(losses_kernel, N * len(layers),
            loss, slopes, partial, counters, sums, masses, pairing, layers[0],
            (*tables, per_layer_table(pyramid.pixels[i] for i in layers)), *runtime,
            BLOCK_SHAPES=blocks, num_warps=_WARPS, **constants,
        )  # fmt: skip
    return Sums(sums, masses, loss.sum() if adds_up else loss, slopes)


def losses(
    sums: Tensor, masses: Tensor, pyramid: Pyramid, options: Options, pairing: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Losses [L] and slopes (F1) [2, N, ΣC] of sums [2, N, ΣC] and masses [2, N, L], in one launch."""
    sums, masses = sums.contiguous(), masses.contiguous()
    _, N, L = masses.shape
    loss = sums.new_empty(L) if N else sums.new_zeros(L)
    slopes = torch.empty_like(sums)
    pairing, runtime, constants = _arguments(sums, masses, pyramid.channels, options, pairing)
    starts = [sum(pyramid.channels[:index]) for index in range(L)]
    for layers in chunks(range(L)):
        nothing = [0] * L
        columns = (pyramid.channels, nothing, nothing, starts, nothing, pyramid.pixels)
        launch(losses_kernel, len(layers) if N else 0,
            loss, slopes, None, None, sums, masses, pairing, layers[0],
            tuple(per_layer_table(column[i] for i in layers) for column in columns), *runtime,
            BLOCK_SHAPES=(), num_warps=_WARPS, **constants,
        )  # fmt: skip
    return loss, slopes


def _arguments(
    sums: Tensor, masses: Tensor, channels: Sequence[int], options: Options, pairing: Tensor | None
) -> tuple[Tensor | None, list[int], dict[str, Any]]:
    """The pairing, and what follows the tables of layers: N, L, K and ΣC at run time, and the constants."""
    _, N, L = masses.shape
    K = 0 if pairing is None else pairing.shape[0]
    block_c = power_of_2(max(channels))
    if pairing is None:
        options = options._replace(exchange="none")
    constants = {
        # A constant, since a float argument of a kernel has 32 bits.
        "OPTIONS": options,
        "BLOCK_N": min(power_of_2(max(N, K)), max(_TILE // block_c, 1)),
        "BLOCK_C": block_c,
        "BLOCK_COUNT": _COUNT,
    }
    return None if pairing is None else pairing.contiguous(), [N, L, K, sums.shape[2]], constants
