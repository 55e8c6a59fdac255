"""Calls of the emulated kernels. Whatever they write was NaN before and has NaN around it, which stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cuda_emulation.build import Emulation
from cuda_emulation.pyramids import Inputs, Outside, unwritten
from fdkernels.conventions import Options
from fdkernels.op.norm_formula import Formula, NormInputs, Running
from fdkernels.op.pyramid import Layer, Pyramid, Regions, Sums, Weights, describe

HERE = {"device": 0, "stream": 0}


def run_sums(
    emulated: Emulation,
    inputs: Inputs,
    options: Options | None = None,
    pairing: Tensor | None = None,
    with_slopes: bool = True,
) -> Sums:
    """Sums and masses and, with options, losses and slopes."""
    packing, dtype = emulated.packing, inputs.accumulate
    pyramid = describe(inputs.features)
    sums, slopes = (unwritten((2, inputs.batch, pyramid.total_channels), dtype) for _ in range(2))
    masses = unwritten((2, inputs.batch, len(inputs.features)), dtype)
    losses = unwritten((len(inputs.features),), dtype)
    with_slopes = with_slopes and options is not None
    pairing, pairing_pointer, num_pairs = packing.contiguous(pairing)
    workspace: list[Outside] = []
    emulated.module.cuda_sums(
        layers=packing.sums_words(inputs.features, inputs.weights, pyramid),
        batch=inputs.batch,
        accumulate=packing.DTYPES[dtype],
        sums=sums.tensor.data_ptr(),
        masses=masses.tensor.data_ptr(),
        options=packing.options_of(options) if options else None,
        pairing=pairing_pointer,
        num_pairs=num_pairs,
        losses=losses.tensor.data_ptr(),
        slopes=slopes.tensor.data_ptr() if with_slopes else 0,
        allocate=_allocate_in(workspace),
        **HERE,
    )
    for output in (sums, masses, losses, slopes, *workspace):
        output.assert_untouched()
    assert options or losses.tensor.isnan().all()
    assert with_slopes or slopes.tensor.isnan().all()
    return Sums(sums.tensor, masses.tensor, losses.tensor, slopes.tensor)


def run_losses(
    emulated: Emulation,
    sums: Tensor,
    masses: Tensor,
    pyramid: Pyramid,
    options: Options,
    pairing: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Losses and slopes of given sums."""
    packing = emulated.packing
    losses, slopes = unwritten((len(pyramid.layers),), sums.dtype), unwritten(sums.shape, sums.dtype)
    pairing, pairing_pointer, num_pairs = packing.contiguous(pairing)
    workspace: list[Outside] = []
    emulated.module.cuda_losses(
        layers=packing.gradients_words(pyramid),
        batch=sums.shape[1],
        accumulate=packing.DTYPES[sums.dtype],
        sums=sums.data_ptr(),
        masses=masses.data_ptr(),
        options=packing.options_of(options),
        pairing=pairing_pointer,
        num_pairs=num_pairs,
        losses=losses.tensor.data_ptr(),
        slopes=slopes.tensor.data_ptr(),
        allocate=_allocate_in(workspace),
        **HERE,
    )
    for output in (losses, slopes, *workspace):
        output.assert_untouched()
    return losses.tensor, slopes.tensor


def run_gradient(
    emulated: Emulation,
    grad_sums: Tensor,
    factor: Tensor | None,
    inputs: Inputs,
    upstream: Sequence[Tensor | None] = (),
    layouts: Sequence[str] = (),
) -> list[Tensor]:
    """The gradients of the features, in these layouts; contiguous without any."""
    packing = emulated.packing
    outputs = [
        unwritten(layer.shape, layer.dtype, layout)
        for layer, layout in zip(
            inputs.features, layouts or ["contiguous"] * len(inputs.features), strict=True
        )
    ]
    grads = [output.tensor for output in outputs]
    emulated.module.cuda_gradient(
        layers=packing.gradient_words(grads, inputs.weights, upstream, _as_they_are(grads)),
        batch=inputs.batch,
        accumulate=packing.DTYPES[grad_sums.dtype],
        grad_sums=grad_sums.data_ptr(),
        factor=0 if factor is None else factor.data_ptr(),
        factor_stride=0 if factor is None else factor.stride(0),
        **HERE,
    )
    for output in outputs:
        output.assert_untouched()
    return grads


def _as_they_are(grads: Sequence[Tensor]) -> Pyramid:
    """The pyramid of gradients with any strides, which the op itself would never allocate."""
    pyramid = describe(grads)
    layers = tuple(Layer(tuple(grad.shape), grad.stride(), grad.dtype) for grad in grads)
    return replace(pyramid, layers=layers)


def run_mask_gradient(emulated: Emulation, grad_sums: Tensor, inputs: Inputs) -> Weights:
    """The gradients of the weights."""
    packing = emulated.packing
    fg, bg = ([unwritten(w.shape, grad_sums.dtype) for w in kind] for kind in inputs.weights)
    grads = Weights([output.tensor for output in fg], [output.tensor for output in bg])
    pyramid = describe(inputs.features)
    emulated.module.cuda_mask_gradient(
        layers=packing.mask_gradient_words(inputs.features, inputs.weights, grads, pyramid),
        batch=inputs.batch,
        accumulate=packing.DTYPES[grad_sums.dtype],
        grad_sums=grad_sums.data_ptr(),
        **HERE,
    )
    for output in (*fg, *bg):
        output.assert_untouched()
    return grads


def run_region_sums(
    emulated: Emulation, features: Sequence[Tensor], regions: Regions
) -> tuple[Tensor, Tensor]:
    """Sums, with pivots also moments, and masses."""
    packing, pyramid = emulated.packing, describe(features)
    batch, R = regions.weights[0].shape[:2]
    rows = R if regions.pivots is None else 2 * R
    sums = unwritten((rows, batch, pyramid.total_channels), pyramid.dtype)
    masses = unwritten((R, batch, len(features)), pyramid.dtype)
    workspace: list[Outside] = []
    emulated.module.cuda_region_sums(
        layers=packing.region_words(regions, pyramid, features=features),
        **_of_regions(emulated, regions, pyramid),
        sums=sums.tensor.data_ptr(),
        masses=masses.tensor.data_ptr(),
        allocate=_allocate_in(workspace),
        **HERE,
    )
    for output in (sums, masses, *workspace):
        output.assert_untouched()
    return sums.tensor, masses.tensor


def run_region_gradient(
    emulated: Emulation,
    grad_sums: Tensor,
    features: Sequence[Tensor],
    regions: Regions,
    upstream: Sequence[Tensor | None],
    layout: str,
) -> list[Tensor]:
    """The gradients of the features, in this layout; features are given where the regions have pivots."""
    packing, pyramid = emulated.packing, describe(features)
    outputs = [unwritten(layer.shape, layer.dtype, layout) for layer in features]
    grads = [output.tensor for output in outputs]
    emulated.module.cuda_region_gradient(
        layers=packing.region_words(
            regions,
            pyramid,
            features=() if regions.pivots is None else features,
            gradient=grads,
            upstream=upstream,
        ),
        **_of_regions(emulated, regions, pyramid),
        grad_sums=grad_sums.data_ptr(),
        **HERE,
    )
    for output in outputs:
        output.assert_untouched()
    return grads


def run_region_weight_gradient(
    emulated: Emulation, grad_sums: Tensor, features: Sequence[Tensor], regions: Regions
) -> list[Tensor]:
    """The gradients of the weights."""
    packing, pyramid = emulated.packing, describe(features)
    outputs = [unwritten(w.shape, grad_sums.dtype) for w in regions.weights]
    grads = [output.tensor for output in outputs]
    emulated.module.cuda_region_weight_gradient(
        layers=packing.region_words(regions, pyramid, features=features, grad_weights=grads),
        **_of_regions(emulated, regions, pyramid),
        grad_sums=grad_sums.data_ptr(),
        **HERE,
    )
    for output in outputs:
        output.assert_untouched()
    return grads


def _of_regions(emulated: Emulation, regions: Regions, pyramid: Pyramid) -> dict[str, object]:
    return {
        "batch": regions.weights[0].shape[0],
        "num_regions": regions.num_regions,
        "selects": regions.selects,
        "pivots": emulated.packing.pointer(regions.pivots),
        "accumulate": emulated.packing.DTYPES[pyramid.dtype],
    }


def run_norm_forward(
    emulated: Emulation,
    inputs: NormInputs,
    formula: Formula,
    regions: Weights | None = None,
    running: Running | None = None,
    layout: str = "contiguous",
) -> tuple[Tensor, Tensor, Tensor]:
    """Output in the layout of x, statistics, and region sums, which are NaN without weights."""
    x, given = inputs.x, inputs.statistics
    groups = x.shape[:2] if formula.instance else x.shape[1:2]
    outputs = [
        unwritten(x.shape, x.dtype, layout),
        unwritten((2, *groups), torch.float64),
        unwritten((2, *x.shape[:2]), describe([x]).dtype),
    ]
    y, statistics, sums = (output.tensor for output in outputs)
    if given is not None:
        statistics.copy_(given[:, None] if formula.instance else given)
    workspace: list[Outside] = []
    norm_packing = emulated.norms.norm_packing
    emulated.module.cuda_norm_forward(
        *norm_packing.arguments(inputs, formula, None, regions, running),
        statistics.data_ptr(),
        *norm_packing.running_arguments(running),
        y.data_ptr(),
        0 if regions is None else sums.data_ptr(),
        _allocate_in(workspace),
        **HERE,
    )
    for output in (*outputs, *workspace):
        output.assert_untouched()
    return y, statistics, sums


def run_norm_backward(
    emulated: Emulation,
    inputs: NormInputs,
    formula: Formula,
    grad_y: Tensor,
    added: tuple[Tensor, Weights] | None = None,
    layout: str = "contiguous",
) -> list[Tensor]:
    """The gradients of x in its layout, and of γ and β where there are any."""
    outputs = [unwritten(inputs.x.shape, inputs.x.dtype, layout)]
    outputs += [unwritten(of.shape, of.dtype) for of in inputs[1:3] if of is not None]
    grads = [output.tensor for output in outputs]
    grad_weight, grad_bias = grads[1:] if len(grads) == 3 else [None, None]
    slopes, regions = (None, None) if added is None else added
    assert inputs.statistics is not None
    workspace: list[Outside] = []
    emulated.module.cuda_norm_backward(
        *emulated.norms.norm_packing.arguments(inputs, formula, grad_y, regions, None),
        inputs.statistics.data_ptr(),
        grads[0].data_ptr(),
        emulated.packing.pointer(slopes),
        emulated.packing.pointer(grad_weight),
        emulated.packing.pointer(grad_bias),
        _allocate_in(workspace),
        **HERE,
    )
    for output in (*outputs, *workspace):
        output.assert_untouched()
    return grads


def _allocate_in(workspace: list[Outside]) -> Callable[[int], int]:
    def allocate(size: int) -> int:
        assert size % 4 == 0
        workspace.append(unwritten((size // 4,), torch.float32))
        return workspace[-1].tensor.data_ptr()

    return allocate
