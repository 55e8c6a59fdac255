"""Normalisation with its activation on backend `triton`, backward: (N3) to (N5).

Three launches: the sums (N4) of each tile, those of all tiles, and the gradient of the map. The last alone
where the statistics are given and no parameter needs a gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdkernels.op.norm_formula import Formula, NormInputs
from fdkernels.op.pyramid import Weights, accumulate_dtype
from fdkernels.op.triton.access import tile_of
from fdkernels.op.triton.launch import launch
from fdkernels.op.triton.norm_access import (
    MERGE,
    activate,
    activations,
    cut_map,
    load_map_weights,
    load_rows,
    merge_places,
    offset_of,
    sizes_of_map,
    split_mean,
    through,
)

__all__ = ["norm_backward"]


@triton.jit
def _load_slopes(slopes_ptr, n, channel, N, C):
    """g_fg and g_bg [BLOCK_C] of (R3) of sample n; 0 without slopes."""
    g_fg, g_bg = 0, 0
    if slopes_ptr is not None:
        place = slopes_ptr + n * C + channel
        g_fg = tl.load(place, mask=channel < C, other=0)
        g_bg = tl.load(place + N.to(tl.int64) * C, mask=channel < C, other=0)
    return g_fg, g_bg


@triton.jit
def _arriving(
    grad_ptr, fg_ptr, bg_ptr, g_fg, g_bg, n, P, pixel, inside, in_block,
    DTYPE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The gradient that arrives at y with that of the loss, [BLOCK_C, BLOCK_P]."""
    grad = tl.load(grad_ptr, mask=in_block, other=0).to(DTYPE)
    if fg_ptr is not None:
        w_fg, w_bg, valid = load_map_weights(fg_ptr, bg_ptr, n, P, pixel, inside, DTYPE, ALIGN)
        added = g_fg[:, None] * w_fg[None, :] + g_bg[:, None] * w_bg[None, :]
        grad += tl.where(valid[None, :], added, 0)
    return grad


@triton.jit(do_not_specialize=["N", "C", "P", "tile_blocks", "groups"])
def norm_reduce_kernel(
    x_ptr, grad_y_ptr, partial_ptr, statistics_ptr, weight_ptr, bias_ptr, slopes_ptr, fg_ptr, bg_ptr,
    N, C, P, tile_blocks, groups,
    UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    ALIGN: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, SLOPE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Σ h and Σ h·(u - m) of each channel of a tile, to partial results [tiles, 2, N, C]."""
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    ALIGN_ROW: tl.constexpr = 1 if UNIT == "channels" else ALIGN  # of the weights of a sample
    C, P = sizes_of_map(C, P, UNIT, WIDE, ALIGN)
    n, channel_block, tile, first, end = tile_of(tl.program_id(0), C, P, tile_blocks, BLOCK_C, BLOCK_P)
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += n * C * P
    grad_y_ptr += n * C * P
    mean, scale, shift = load_rows(
        statistics_ptr, weight_ptr, bias_ptr, n % groups, groups, channel, C, dtype, EPS
    )
    g_fg, g_bg = _load_slopes(slopes_ptr, n, channel, N, C)
    total = tl.zeros([BLOCK_C, BLOCK_P], dtype)
    product = tl.zeros([BLOCK_C, BLOCK_P], dtype)
    for block in range(first, end):
        pixel = block * BLOCK_P + tl.arange(0, BLOCK_P).to(P.dtype)
        inside = pixel < P
        in_block = (channel < C)[:, None] & inside[None, :]
        offsets = offset_of(channel[:, None], pixel[None, :], C, P, UNIT)
        u = activate(tl.load(x_ptr + offsets, mask=in_block, other=0).to(dtype), BEFORE, SLOPE)
        grad = _arriving(
            grad_y_ptr + offsets, fg_ptr, bg_ptr, g_fg, g_bg, n, P, pixel, inside, in_block, dtype, ALIGN_ROW
        )
        centred = u - mean[:, None]
        h = through(tl.fma(centred, scale[:, None], shift[:, None]), grad, AFTER, SLOPE)
        total += h
        product += h * centred
    place = partial_ptr + (tile.to(tl.int64) * 2 * N + n) * C + channel
    tl.store(place, tl.sum(total, axis=1), mask=channel < C)
    tl.store(place + N.to(tl.int64) * C, tl.sum(product, axis=1), mask=channel < C)


@triton.jit(do_not_specialize=["N", "C", "P", "groups", "tiles"])
def norm_coefficients_kernel(
    partial_ptr, statistics_ptr, coefficients_ptr, grad_weight_ptr, grad_bias_ptr, N, C, P, groups, tiles,
    EPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_COLUMN: tl.constexpr,
):  # fmt: skip
    """B and A of (N4) of each group [groups, C], and with coefficients p and q [2, groups, C] of (N5).

    It is γ r·(h - p - (u - m)·q), with q = r·B/|G| and p = A/|G| - (μ - m)·q, since u - m is what the other
    kernels have, m being the mean in their dtype.
    """
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    program = tl.program_id(0)
    column_blocks = tl.cdiv(C, BLOCK_COLUMN)
    group = (program // column_blocks).to(tl.int64)
    channel = (program % column_blocks) * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)
    inside = channel < C
    samples = N // groups
    entries = tiles * samples
    half = N.to(tl.int64) * C
    total = tl.zeros([BLOCK_T, BLOCK_COLUMN], tl.float64)
    product = tl.zeros([BLOCK_T, BLOCK_COLUMN], tl.float64)
    for first in range(0, entries, BLOCK_T):
        entry = first + tl.arange(0, BLOCK_T)
        _tile, place = merge_places(entry, group, channel, N, C, samples)
        in_block = (entry < entries)[:, None] & inside[None, :]
        total += tl.load(partial_ptr + place, mask=in_block, other=0).to(tl.float64)
        product += tl.load(partial_ptr + half + place, mask=in_block, other=0).to(tl.float64)

    row = group * C + channel
    mean = tl.load(statistics_ptr + row, mask=inside, other=0)
    variance = tl.load(statistics_ptr + groups.to(tl.int64) * C + row, mask=inside, other=0)
    _m, rest = split_mean(mean, dtype)
    inverse = 1 / tl.sqrt(variance + EPS)
    A = tl.sum(total, axis=0)
    B = (tl.sum(product, axis=0) - rest * A) * inverse
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + row, B.to(grad_weight_ptr.dtype.element_ty), mask=inside)
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + row, A.to(grad_bias_ptr.dtype.element_ty), mask=inside)
    if coefficients_ptr is not None:
        count = P.to(tl.float64) * samples.to(tl.float64)
        q = inverse * B / count
        tl.store(coefficients_ptr + row, (A / count - rest * q).to(dtype), mask=inside)
        tl.store(coefficients_ptr + groups.to(tl.int64) * C + row, q.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["N", "C", "P", "tile_blocks", "groups"])
def norm_gradient_kernel(
    x_ptr, grad_y_ptr, grad_x_ptr, statistics_ptr, weight_ptr, bias_ptr, coefficients_ptr,
    slopes_ptr, fg_ptr, bg_ptr, N, C, P, tile_blocks, groups,
    UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    ALIGN: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, SLOPE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """The gradient (N5) of a tile; without coefficients that under given statistics."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    ALIGN_ROW: tl.constexpr = 1 if UNIT == "channels" else ALIGN  # of the weights of a sample
    C, P = sizes_of_map(C, P, UNIT, WIDE, ALIGN)
    n, channel_block, _tile, first, end = tile_of(tl.program_id(0), C, P, tile_blocks, BLOCK_C, BLOCK_P)
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += n * C * P
    grad_y_ptr += n * C * P
    grad_x_ptr += n * C * P
    mean, scale, shift = load_rows(
        statistics_ptr, weight_ptr, bias_ptr, n % groups, groups, channel, C, dtype, EPS
    )
    if coefficients_ptr is not None:
        row = coefficients_ptr + (n % groups) * C + channel
        p = tl.load(row, mask=channel < C, other=0)
        q = tl.load(row + groups.to(tl.int64) * C, mask=channel < C, other=0)
    g_fg, g_bg = _load_slopes(slopes_ptr, n, channel, N, C)
    for block in range(first, end):
        pixel = block * BLOCK_P + tl.arange(0, BLOCK_P).to(P.dtype)
        inside = pixel < P
        in_block = (channel < C)[:, None] & inside[None, :]
        offsets = offset_of(channel[:, None], pixel[None, :], C, P, UNIT)
        x = tl.load(x_ptr + offsets, mask=in_block, other=0).to(dtype)
        grad = _arriving(
            grad_y_ptr + offsets, fg_ptr, bg_ptr, g_fg, g_bg, n, P, pixel, inside, in_block, dtype, ALIGN_ROW
        )
        centred = activate(x, BEFORE, SLOPE) - mean[:, None]
        h = through(tl.fma(centred, scale[:, None], shift[:, None]), grad, AFTER, SLOPE)
        if coefficients_ptr is not None:
            h -= p[:, None] + centred * q[:, None]
        grad = through(x, scale[:, None] * h, BEFORE, SLOPE)
        tl.store(grad_x_ptr + offsets, grad.to(DTYPE), mask=in_block)


def norm_backward(
    inputs: NormInputs,
    formula: Formula,
    grad_y: Tensor,
    added: tuple[Tensor, Weights] | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients (N5) of x [N, C, *S] and (N4) of γ and β [C], None for what is not needed."""
    x, weight, bias, statistics, given = inputs
    assert statistics is not None
    dtype = accumulate_dtype([x])
    slopes, fg, bg, regions = None, None, None, None
    if added is not None:
        slopes, regions = added[0].to(dtype).contiguous(), added[1]
        fg, bg = regions.fg[0], regions.bg[0] if regions.bg else None
    cut = cut_map(x, formula, regions)
    N, C, P = cut.plan.shape
    constants = {"EPS": formula.eps, **activations(formula), **cut.constants}
    rows = statistics, weight, bias
    of_weight, of_bias = (
        parameter.new_empty((cut.groups, C), dtype=parameter.dtype if cut.groups == 1 else torch.float64)
        if parameter is not None and needed
        else None
        for parameter, needed in ((weight, needs[1]), (bias, needs[2]))
    )
    coefficients = x.new_empty((2, cut.groups, C), dtype=dtype) if needs[0] and not given else None
    if coefficients is not None or of_weight is not None or of_bias is not None:
        partial = x.new_empty((cut.plan.tiles, 2, N, C), dtype=dtype)
        launch(norm_reduce_kernel, cut.plan.programs,
            x, grad_y, partial, *rows, slopes, fg, bg, *cut.sizes, cut.groups, **constants,
        )  # fmt: skip
        launch(norm_coefficients_kernel, cut.merge_programs,
            partial, statistics, coefficients, of_weight, of_bias, N, C, P, cut.groups, cut.plan.tiles,
            EPS=formula.eps, **MERGE,
        )  # fmt: skip
    grad_x = torch.empty_like(x) if needs[0] else None
    if grad_x is not None:
        launch(norm_gradient_kernel, cut.plan.programs,
            x, grad_y, grad_x, *rows, coefficients, slopes, fg, bg, *cut.sizes, cut.groups, **constants,
        )  # fmt: skip
    return grad_x, _over_groups(of_weight, weight), _over_groups(of_bias, bias)


def _over_groups(grads: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """Add the gradients [groups, C] of a parameter [C]."""
    if grads is None or parameter is None:
        return None
    return grads[0] if grads.shape[0] == 1 else grads.sum(0).to(parameter.dtype)
