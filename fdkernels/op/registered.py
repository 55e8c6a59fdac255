"""The functions over two regions as registered ops, and the way past them.

Each function here calls its kernels directly unless one of these has to see the call: an op takes as long as
a small layer's whole computation. `gradient` and `mask_gradient` are linear in each argument, so the ops have
their derivatives (R5), and second derivatives go through them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fdkernels.conventions import Options
from fdkernels.op import reference
from fdkernels.op.kernels import kernels_of
from fdkernels.op.pyramid import (
    Pyramid,
    Sums,
    Weights,
    accumulate_dtype,
    describe,
    pack,
    unpack,
    weight_dtype,
)
from fdkernels.transforms import PLAIN

__all__ = [
    "empty_gradients",
    "expand_factor",
    "gradient",
    "losses",
    "mask_gradient",
    "masks",
    "may_call_directly",
    "sums",
]

# `sizes` holds the spatial sizes one after the other, `pyramid` is packed, `options` are text. `upstream`
# holds the gradients that are added, `upstream_layers` the index of the layer of each.
_SCHEMAS = {
    "masks": "(Tensor mask, SymInt[] sizes, ScalarType dtype, str mask_resize, float? ignore_index, "
    "str backend) -> (Tensor[], Tensor[])",
    "sums": "(Tensor[] features, Tensor[] fg, Tensor[] bg, str? options, Tensor? pairing, bool with_slopes, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    "losses": "(Tensor sums, Tensor masses, SymInt[] pyramid, str options, Tensor? pairing, str backend) "
    "-> (Tensor, Tensor)",
    "gradient": "(Tensor grad_sums, Tensor? factor, Tensor[] fg, Tensor[] bg, Tensor[] upstream, "
    "int[] upstream_layers, SymInt[] pyramid, str backend) -> Tensor[]",
    "mask_gradient": "(Tensor grad_sums, Tensor[] fg, Tensor[] bg, Tensor[] features, str backend) "
    "-> (Tensor[], Tensor[])",
}
for _name, _schema in _SCHEMAS.items():
    # The kernels read any layout: Inductor need not copy features into the one that eager has.
    torch.library.define(f"fdkernels::{_name}", _schema, tags=torch.Tag.flexible_layout)


def may_call_directly(tensors: Iterable[Tensor | None]) -> bool:
    """Whether no compiler or dispatch mode sees tensors of any shape, all of which have plain memory.

    Where one has not, as a fake tensor or a lazily negated view, torch's dispatcher knows what to do.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    for tensor in tensors:  # a generator takes longer than its tests
        if tensor is not None and (type(tensor) not in PLAIN or tensor.is_neg()):
            return False
    return True


def masks(
    mask: Tensor,
    sizes: Sequence[torch.Size],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
    backend: str,
) -> Weights:
    """`Kernels.masks`."""
    if may_call_directly([mask]):
        return kernels_of(backend).masks(mask, sizes, dtype, mask_resize, ignore_index)
    flat = [extent for size in sizes for extent in size]
    return Weights(*torch.ops.fdkernels.masks(mask, flat, dtype, mask_resize, ignore_index, backend))


def sums(
    features: Sequence[Tensor],
    weights: Weights,
    pyramid: Pyramid,
    options: Options | None,
    pairing: Tensor | None,
    with_slopes: bool,
    backend: str,
    adds_up: bool = False,
) -> Sums:
    """`Kernels.sums`."""
    if may_call_directly((*features, weights.fg[0])):
        return kernels_of(backend).sums(features, weights, pyramid, options, pairing, with_slopes, adds_up)
    text = None if options is None else options.as_text()
    all_sums, masses, *rest = torch.ops.fdkernels.sums(
        features, *weights, text, pairing, with_slopes, backend
    )
    loss = None if options is None else rest[0].sum() if adds_up else rest[0]
    return Sums(all_sums, masses, loss, rest[1] if options is not None and with_slopes else None)


def losses(
    sums: Tensor, masses: Tensor, pyramid: Pyramid, options: Options, pairing: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """`Kernels.losses`."""
    if may_call_directly([sums]):
        return kernels_of(backend).losses(sums, masses, pyramid, options, pairing)
    loss, slopes = torch.ops.fdkernels.losses(
        sums, masses, pack(pyramid), options.as_text(), pairing, backend
    )
    return loss, slopes


def gradient(
    grad_sums: Tensor,
    factor: Tensor | None,
    weights: Weights,
    upstream: Sequence[Tensor | None],
    pyramid: Pyramid,
    backend: str,
) -> list[Tensor]:
    """`Kernels.gradient`; differentiable where gradients are enabled."""
    if torch.compiler.is_compiling():
        # It fuses with what computed the upstream gradient and what takes this one: no map moves for it.
        return reference.gradient_expression(grad_sums, factor, weights, upstream, pyramid)
    if not torch.is_grad_enabled() and may_call_directly([grad_sums, factor, *upstream]):
        return kernels_of(backend).gradient(grad_sums, factor, weights, upstream, pyramid)
    present = [(layer, grad) for layer, grad in enumerate(upstream) if grad is not None]
    layers, added = [layer for layer, _ in present], [grad for _, grad in present]
    grads: list[Tensor] = torch.ops.fdkernels.gradient(
        grad_sums, factor, *weights, added, layers, pack(pyramid), backend
    )
    return grads


def mask_gradient(grad_sums: Tensor, weights: Weights, features: Sequence[Tensor], backend: str) -> Weights:
    """`Kernels.mask_gradient`; differentiable where gradients are enabled."""
    if not torch.is_grad_enabled() and may_call_directly([grad_sums, *features]):
        return kernels_of(backend).mask_gradient(grad_sums, weights, features)
    return Weights(*torch.ops.fdkernels.mask_gradient(grad_sums, *weights, features, backend))


def expand_factor(factor: Tensor, pyramid: Pyramid) -> Tensor:
    """The number [L] of each layer for each of its channels, [ΣC]."""
    return torch.cat([one.expand(C) for one, C in zip(factor.unbind(), pyramid.channels, strict=True)])


def _contiguous(fg: list[Tensor], bg: list[Tensor]) -> Weights:
    # `masks` writes them so; in second derivatives cotangents with any strides take their place.
    return Weights([weight.contiguous() for weight in fg], [weight.contiguous() for weight in bg])


def _sizes(mask: Tensor, flat: list[int]) -> list[torch.Size]:
    rank = mask.dim() - 2
    return [torch.Size(flat[start : start + rank]) for start in range(0, len(flat), rank)]


@torch.library.impl("fdkernels::masks", "CompositeExplicitAutograd")
def _masks(
    mask: Tensor,
    sizes: list[int],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
    backend: str,
) -> tuple[list[Tensor], list[Tensor]]:
    fg, bg = kernels_of(backend).masks(mask, _sizes(mask, sizes), dtype, mask_resize, ignore_index)
    return list(fg), list(bg)


@torch.library.register_fake("fdkernels::masks")
def _masks_fake(
    mask: Tensor,
    sizes: list[int],
    dtype: torch.dtype,
    mask_resize: str,
    ignore_index: float | None,
    backend: str,
) -> tuple[list[Tensor], list[Tensor]]:
    fg = []
    for size in _sizes(mask, sizes):
        stored = weight_dtype(mask.dtype, size == mask.shape[2:], dtype, mask_resize)
        fg.append(mask.new_empty((mask.shape[0], size.numel()), dtype=stored))
    return fg, [] if ignore_index is None else [torch.empty_like(weight) for weight in fg]


@torch.library.impl("fdkernels::sums", "CompositeExplicitAutograd")
def _sums(
    features: list[Tensor],
    fg: list[Tensor],
    bg: list[Tensor],
    options: str | None,
    pairing: Tensor | None,
    with_slopes: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = None if options is None else Options.from_text(options)
    pyramid = describe(features)
    out = kernels_of(backend).sums(features, _contiguous(fg, bg), pyramid, chosen, pairing, with_slopes)
    # An op has no optional outputs.
    loss = out.sums.new_empty(0) if out.losses is None else out.losses
    return out.sums, out.masses, loss, out.sums.new_empty(0) if out.slopes is None else out.slopes


@torch.library.register_fake("fdkernels::sums")
def _sums_fake(
    features: list[Tensor],
    fg: list[Tensor],
    bg: list[Tensor],
    options: str | None,
    pairing: Tensor | None,
    with_slopes: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, num_layers = features[0].shape[0], len(features)
    channels = sum([layer.shape[1] for layer in features])
    all_sums = features[0].new_empty((2, batch, channels), dtype=accumulate_dtype(features))
    loss = all_sums.new_empty(0 if options is None else num_layers)
    slopes = torch.empty_like(all_sums) if with_slopes and options is not None else all_sums.new_empty(0)
    return all_sums, all_sums.new_empty((2, batch, num_layers)), loss, slopes


@torch.library.impl("fdkernels::losses", "CompositeExplicitAutograd")
def _losses(
    sums: Tensor, masses: Tensor, pyramid: list[int], options: str, pairing: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return kernels_of(backend).losses(sums, masses, unpack(pyramid), Options.from_text(options), pairing)


@torch.library.register_fake("fdkernels::losses")
def _losses_fake(
    sums: Tensor, masses: Tensor, pyramid: list[int], options: str, pairing: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return sums.new_empty(masses.shape[-1]), sums.new_empty(sums.shape)


@torch.library.impl("fdkernels::gradient", "CompositeExplicitAutograd")
def _gradient(
    grad_sums: Tensor,
    factor: Tensor | None,
    fg: list[Tensor],
    bg: list[Tensor],
    upstream: list[Tensor],
    upstream_layers: list[int],
    pyramid: list[int],
    backend: str,
) -> list[Tensor]:
    added: list[Tensor | None] = [None] * len(fg) if upstream else []
    for layer, grad in zip(upstream_layers, upstream, strict=True):
        added[layer] = grad
    return kernels_of(backend).gradient(grad_sums, factor, _contiguous(fg, bg), added, unpack(pyramid))


@torch.library.register_fake("fdkernels::gradient")
def _gradient_fake(
    grad_sums: Tensor,
    factor: Tensor | None,
    fg: list[Tensor],
    bg: list[Tensor],
    upstream: list[Tensor],
    upstream_layers: list[int],
    pyramid: list[int],
    backend: str,
) -> list[Tensor]:
    return empty_gradients(grad_sums, pyramid)


def empty_gradients(grad_sums: Tensor, pyramid: Sequence[int]) -> list[Tensor]:
    """The gradients [N, C_l, *S_l] of a packed pyramid, unwritten."""
    return [
        torch.empty_strided(shape, stride, dtype=dtype, device=grad_sums.device)
        for shape, stride, dtype in unpack(pyramid).layers
    ]


@torch.library.impl("fdkernels::mask_gradient", "CompositeExplicitAutograd")
def _mask_gradient(
    grad_sums: Tensor, fg: list[Tensor], bg: list[Tensor], features: list[Tensor], backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    grad_fg, grad_bg = kernels_of(backend).mask_gradient(grad_sums, _contiguous(fg, bg), features)
    return list(grad_fg), list(grad_bg)


@torch.library.register_fake("fdkernels::mask_gradient")
def _mask_gradient_fake(
    grad_sums: Tensor, fg: list[Tensor], bg: list[Tensor], features: list[Tensor], backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    grads = [grad_sums.new_empty(weight.shape) for weight in fg]
    return grads, [torch.empty_like(grad) for grad in grads] if bg else []
