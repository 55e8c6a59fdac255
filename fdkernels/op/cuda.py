"""Backend `cuda`: the CUDA C++ kernels of csrc/cuda, on the current stream of the tensors' device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdkernels import _C
from fdkernels.conventions import Options
from fdkernels.op import mask_packing, packing
from fdkernels.op.pyramid import Pyramid, Regions, Sums, Weights, describe
from fdkernels.op.stream import current_stream

__all__ = [
    "gradient",
    "losses",
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
    """Resize a mask [N, 1, *S0] to the weights (M3) to (M5) [N, P] of each size, in one launch."""
    mask = mask_packing.readable(mask, dtype)
    device = mask.device
    weights, words = mask_packing.empty_weights(mask, sizes, dtype, mask_resize, ignore_index)
    _C.cuda_masks(
        *mask_packing.arguments(mask, ignore_index),
        mask_packing.RESIZES[mask_resize],
        packing.DTYPES[dtype],
        words,
        device.index,
        current_stream(device),
    )
    return weights


def sums(
    features: Sequence[Tensor],
    weights: Weights,
    pyramid: Pyramid,
    options: Options | None,
    pairing: Tensor | None,
    with_slopes: bool,
    adds_up: bool = False,
) -> Sums:
    """Sum the layers [N, C_l, *S_l] by (R2) and make losses (L1) to (L6) of the sums, in two launches.

    To add up the losses takes one more.
    """
    out = packing.empty_sums(features, pyramid, options, with_slopes)
    pairing, pairing_pointer, num_pairs = packing.contiguous(pairing)
    device = features[0].device
    workspace: list[Tensor] = []
    # By position, in the order of the stub: keywords would take 2 % of a small call.
    _C.cuda_sums(
        packing.sums_words(features, weights, pyramid),
        out.sums.shape[1],
        packing.DTYPES[pyramid.dtype],
        out.sums.data_ptr(),
        out.masses.data_ptr(),
        None if options is None else packing.options_of(options),
        pairing_pointer,
        num_pairs,
        packing.pointer(out.losses),
        packing.pointer(out.slopes),
        packing.allocate_in(workspace, device),
        device.index,
        current_stream(device),
    )
    return out._replace(losses=out.losses.sum()) if adds_up and out.losses is not None else out


def losses(
    sums: Tensor, masses: Tensor, pyramid: Pyramid, options: Options, pairing: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Make losses [L] and slopes [2, N, ΣC], (L1) to (F1), of given sums [2, N, ΣC] and masses [2, N, L].

    One launch.
    """
    sums, masses, device = sums.contiguous(), masses.contiguous(), sums.device
    losses = torch.empty(len(pyramid.layers), dtype=sums.dtype, device=device)
    slopes = torch.empty_like(sums)
    pairing, pairing_pointer, num_pairs = packing.contiguous(pairing)
    workspace: list[Tensor] = []
    _C.cuda_losses(
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
        allocate=packing.allocate_in(workspace, device),
        device=device.index,
        stream=current_stream(device),
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

    One launch. A factor expanded from one number is read as it is.
    """
    grad_sums, device = grad_sums.contiguous(), grad_sums.device
    grads = packing.empty_gradients(pyramid.layers, device)
    upstream = packing.same_dtype(upstream, pyramid.layers)
    _C.cuda_gradient(  # by position, as `sums`
        packing.gradient_words(grads, weights, upstream, pyramid),
        grad_sums.shape[1],
        packing.DTYPES[grad_sums.dtype],
        grad_sums.data_ptr(),
        packing.pointer(factor),
        0 if factor is None else factor.stride(0),
        device.index,
        current_stream(device),
    )
    return grads


def mask_gradient(grad_sums: Tensor, weights: Weights, features: Sequence[Tensor]) -> Weights:
    """Write the gradients (R4) of the weights, [N, P_l] in the dtype of `grad_sums` [2, N, ΣC].

    One launch.
    """
    grad_sums, device = grad_sums.contiguous(), grad_sums.device
    grads = packing.empty_weight_gradients(weights, grad_sums.dtype)
    _C.cuda_mask_gradient(
        layers=packing.mask_gradient_words(features, weights, grads, describe(features)),
        batch=grad_sums.shape[1],
        accumulate=packing.DTYPES[grad_sums.dtype],
        grad_sums=grad_sums.data_ptr(),
        device=device.index,
        stream=current_stream(device),
    )
    return grads


def region_sums(features: Sequence[Tensor], regions: Regions, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
    """Sum layers [N, C_l, *S_l] by (C1) and (C2) to [R, N, ΣC] or [2R, N, ΣC], and masses [R, N, L].

    Two launches; the features are read once for every 32 regions.
    """
    regions = packing.with_contiguous_pivots(regions)
    sums, masses = packing.empty_region_sums(regions, pyramid)
    device = features[0].device
    workspace: list[Tensor] = []
    _C.cuda_region_sums(  # by position, as `sums`
        packing.region_words(regions, pyramid, features=features),
        *packing.region_arguments(regions, pyramid.dtype),
        sums.data_ptr(),
        masses.data_ptr(),
        packing.allocate_in(workspace, device),
        device.index,
        current_stream(device),
    )
    return sums, masses


def region_gradient(
    grad_sums: Tensor,
    regions: Regions,
    features: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    pyramid: Pyramid,
) -> list[Tensor]:
    """Write the gradient (C3) of each layer for grad_sums [R, N, ΣC] or [2R, N, ΣC], plus upstream.

    One launch, which reads the features under moments alone.
    """
    regions = packing.with_contiguous_pivots(regions)
    grad_sums, device = grad_sums.contiguous(), grad_sums.device
    grads = packing.empty_gradients(pyramid.layers, device)
    upstream = packing.same_dtype(upstream, pyramid.layers)
    read = () if regions.pivots is None else features
    _C.cuda_region_gradient(
        packing.region_words(regions, pyramid, features=read, gradient=grads, upstream=upstream),
        *packing.region_arguments(regions, grad_sums.dtype),
        grad_sums.data_ptr(),
        device.index,
        current_stream(device),
    )
    return grads


def region_weight_gradient(grad_sums: Tensor, regions: Regions, features: Sequence[Tensor]) -> list[Tensor]:
    """Write the gradients (C4) of the weights, [N, R, P_l] in the dtype of `grad_sums`.

    One launch.
    """
    regions = packing.with_contiguous_pivots(regions)
    grad_sums, device = grad_sums.contiguous(), grad_sums.device
    grads = [torch.empty_like(weight, dtype=grad_sums.dtype) for weight in regions.weights]
    _C.cuda_region_weight_gradient(
        packing.region_words(regions, describe(features), features=features, grad_weights=grads),
        *packing.region_arguments(regions, grad_sums.dtype),
        grad_sums.data_ptr(),
        device.index,
        current_stream(device),
    )
    return grads
