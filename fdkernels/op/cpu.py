"""Backend `cpu`: the C++ kernels of csrc/cpu."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fdkernels import _C
from fdkernels.conventions import Options
from fdkernels.op import mask_packing, packing
from fdkernels.op.pyramid import Pyramid, Regions, Sums, Weights, describe

__all__ = [
    "gradient",
    "losses",
    "mask_check",
    "mask_gradient",
    "masks",
    "region_gradient",
    "region_sums",
    "region_weight_gradient",
    "sums",
]


def masks(
    mask: Tensor,
    sizes: Sequence[torch.Size],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
) -> Weights:
    """Resize a mask [N, 1, *S0] to the weights (M3) to (M5) [N, P] of each size."""
    mask = mask_packing.readable(mask, dtype)
    weights, words = mask_packing.empty_weights(mask, sizes, dtype, mask_resize, ignore_index)
    _C.cpu_masks(
        *mask_packing.arguments(mask, ignore_index),
        mask_packing.RESIZES[mask_resize],
        packing.DTYPES[dtype],
        words,
        torch.get_num_threads(),
    )
    return weights


def mask_check(like: Tensor, ignore_index: float | None) -> Callable[[Tensor], bool]:
    """Make the check of masks with the shape, strides and dtype of this one, [N, 1, *S0].

    It returns whether a mask holds values in [0, 1] (integers: 0 and 1) beside `ignore_index`.
    """
    arguments = mask_packing.arguments(mask_packing.readable(like, torch.float32), ignore_index)[1:]

    def is_valid(mask: Tensor) -> bool:
        mask = mask_packing.readable(mask, torch.float32)
        return _C.cpu_mask_is_valid(mask.data_ptr(), *arguments, torch.get_num_threads())

    return is_valid


def sums(
    features: Sequence[Tensor],
    weights: Weights,
    pyramid: Pyramid,
    options: Options | None,
    pairing: Tensor | None,
    with_slopes: bool,
    adds_up: bool = False,
) -> Sums:
    """Sum the layers [N, C_l, *S_l] of a pyramid by (R2), and make losses (L1) to (L6) of the sums."""
    out = packing.empty_sums(features, pyramid, options, with_slopes, adds_up)
    losses = packing.pointer(out.losses)
    pairing, pairing_pointer, num_pairs = packing.contiguous(pairing)
    # By position, in the order of the stub: keywords would take 2 % of a small call.
    _C.cpu_sums(
        packing.sums_words(features, weights, pyramid),
        out.sums.shape[1],
        packing.DTYPES[pyramid.dtype],
        out.sums.data_ptr(),
        out.masses.data_ptr(),
        None if options is None else packing.options_of(options),
        pairing_pointer,
        num_pairs,
        0 if adds_up else losses,
        losses if adds_up else 0,
        packing.pointer(out.slopes),
        torch.get_num_threads(),
    )
    return out


def losses(
    sums: Tensor, masses: Tensor, pyramid: Pyramid, options: Options, pairing: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Make losses [L] and slopes [2, N, ΣC], (L1) to (F1), of given sums [2, N, ΣC] and masses [2, N, L]."""
    sums, masses = sums.contiguous(), masses.contiguous()
    losses = torch.empty(len(pyramid.layers), dtype=sums.dtype, device=sums.device)
    slopes = torch.empty_like(sums)
    pairing, pairing_pointer, num_pairs = packing.contiguous(pairing)
    _C.cpu_losses(
        layers=packing.gradients_words(pyramid),
        batch=sums.shape[1],
        accumulate=packing.DTYPES[sums.dtype],
        sums=sums.data_ptr(),
        masses=masses.data_ptr(),
        options=packing.options_of(options),
        pairing=pairing_pointer,
        num_pairs=num_pairs,
        losses=losses.data_ptr(),
        slopes=slopes.data_ptr(),
    )
    return losses, slopes


def gradient(
    grad_sums: Tensor,
    factor: Tensor | None,
    weights: Weights,
    upstream: Sequence[Tensor | None],
    pyramid: Pyramid,
) -> list[Tensor]:
    """Write the gradient (R3) of each layer for g = grad_sums [2, N, ΣC] times its factor of [L].

    A factor expanded from one number is read as it is.
    """
    grad_sums, device = grad_sums.contiguous(), grad_sums.device
    grads = packing.empty_gradients(pyramid.layers, device)
    upstream = packing.same_dtype(upstream, pyramid.layers)
    _C.cpu_gradient(  # by position, as `sums`
        packing.gradient_words(grads, weights, upstream, pyramid),
        grad_sums.shape[1],
        packing.DTYPES[grad_sums.dtype],
        grad_sums.data_ptr(),
        packing.pointer(factor),
        0 if factor is None else factor.stride(0),
        torch.get_num_threads(),
    )
    return grads


def mask_gradient(grad_sums: Tensor, weights: Weights, features: Sequence[Tensor]) -> Weights:
    """Write the gradients (R4) of the weights, [N, P_l] in the dtype of `grad_sums` [2, N, ΣC]."""
    grad_sums = grad_sums.contiguous()
    grads = packing.empty_weight_gradients(weights, grad_sums.dtype)
    _C.cpu_mask_gradient(
        layers=packing.mask_gradient_words(features, weights, grads, describe(features)),
        batch=grad_sums.shape[1],
        accumulate=packing.DTYPES[grad_sums.dtype],
        grad_sums=grad_sums.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return grads


def region_sums(features: Sequence[Tensor], regions: Regions, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
    """Sum the layers [N, C_l, *S_l] over R regions by (C1) and (C2): [R, N, ΣC] or [2R, N, ΣC], [R, N, L]."""
    regions = packing.with_contiguous_pivots(regions)
    sums, masses = packing.empty_region_sums(regions, pyramid)
    _C.cpu_region_sums(
        packing.region_words(regions, pyramid, features=features),
        *packing.region_arguments(regions, pyramid.dtype),
        sums.data_ptr(),
        masses.data_ptr(),
        torch.get_num_threads(),
    )
    return sums, masses


def region_gradient(
    grad_sums: Tensor,
    regions: Regions,
    features: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    pyramid: Pyramid,
) -> list[Tensor]:
    """Write the gradient (C3) of each layer for grad_sums [R, N, ΣC] or [2R, N, ΣC], plus upstream."""
    grad_sums, regions = grad_sums.contiguous(), packing.with_contiguous_pivots(regions)
    grads = packing.empty_gradients(pyramid.layers, grad_sums.device)
    upstream = packing.same_dtype(upstream, pyramid.layers)
    _C.cpu_region_gradient(
        packing.region_words(regions, pyramid, features=features, gradient=grads, upstream=upstream),
        *packing.region_arguments(regions, grad_sums.dtype),
        grad_sums.data_ptr(),
        torch.get_num_threads(),
    )
    return grads


def region_weight_gradient(grad_sums: Tensor, regions: Regions, features: Sequence[Tensor]) -> list[Tensor]:
    """Write the gradients (C4) of the weights, [N, R, P_l] in the dtype of `grad_sums` [R or 2R, N, ΣC]."""
    grad_sums, regions = grad_sums.contiguous(), packing.with_contiguous_pivots(regions)
    grads = [torch.empty_like(weight, dtype=grad_sums.dtype) for weight in regions.weights]
    _C.cpu_region_weight_gradient(
        packing.region_words(regions, describe(features), features=features, grad_weights=grads),
        *packing.region_arguments(regions, grad_sums.dtype),
        grad_sums.data_ptr(),
        torch.get_num_threads(),
    )
    return grads
