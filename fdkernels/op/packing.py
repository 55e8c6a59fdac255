"""Packs pointers, sizes and strides into the integers that fdkernels._C takes.

Every code and every offset is read from `_C`, so that it stands once, in csrc/op.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fdkernels import _C
from fdkernels.conventions import EXCHANGES, KERNEL_NORMS, MASK_RESIZES, REDUCTIONS, REGION_WEIGHTS, Options
from fdkernels.op.norm_formula import ACTIVATIONS
from fdkernels.op.pyramid import Layer, Pyramid, Regions, Sums, Weights

__all__ = [
    "DTYPES",
    "WORD_OF_DTYPE",
    "allocate_in",
    "contiguous",
    "empty_gradients",
    "empty_region_sums",
    "empty_sums",
    "empty_weight_gradients",
    "features_words",
    "gradient_words",
    "gradients_words",
    "mask_gradient_words",
    "norm_words",
    "options_of",
    "pointer",
    "put_extents",
    "region_arguments",
    "region_words",
    "same_dtype",
    "sums_words",
    "with_contiguous_pivots",
]


def _check_names() -> None:
    for enum, names in (
        ("RegionWeight", REGION_WEIGHTS),
        ("Norm", KERNEL_NORMS),
        ("Exchange", EXCHANGES),
        ("Reduction", [name for name in REDUCTIONS if name != "none"]),
        ("MaskResize", MASK_RESIZES),
        ("Activation", ACTIVATIONS),
    ):
        compiled = getattr(getattr(_C, enum, None), "__members__", {})
        if set(compiled) != set(names):
            found = ", ".join(compiled) or "no names"
            raise _of_another_version(f"{enum} has {found}, expected {', '.join(names)}")
    for fields in ("layer_fields", "region_layer_fields", "mask_size_fields"):
        if not hasattr(_C, fields):
            raise _of_another_version(f"it lacks {fields}")


def _of_another_version(how: str) -> ImportError:
    return ImportError(
        "the compiled module fdkernels._C is of another version than the Python files beside it "
        f"({how}); reinstall fdkernels"
    )


_check_names()

# Codes by torch's dtypes and by the names of fdkernels/conventions.py.
DTYPES = {getattr(torch, name): code for name, code in _C.DType.__members__.items()}
WORD_OF_DTYPE = {dtype: int(code) for dtype, code in DTYPES.items()}

# Offsets of the words of a `Layer` and of a `RegionLayer`, and their number.
_LAYER, _LAYER_WORDS = _C.layer_fields, _C.layer_words
_FEATURES, _FG, _BG, _MASK_DTYPE = (_LAYER[field] for field in ("features", "fg", "bg", "mask_dtype"))
_GRAD_FG, _GRAD_BG, _UPSTREAM = (_LAYER[field] for field in ("grad_fg", "grad_bg", "upstream"))
_REGION, _REGION_WORDS = _C.region_layer_fields, _C.region_layer_words


@lru_cache(maxsize=64)
def options_of(options: Options) -> _C.Options:
    """Translate options whose reduction is `"mean"` or `"sum"`."""
    return _C.Options(
        region_weight=_C.RegionWeight.__members__[options.region_weight],
        masked_background=options.masked_background,
        norm=_C.Norm.__members__[options.norm],
        log_scale=options.log_scale,
        eps=options.eps,
        exchange=_C.Exchange.__members__[options.exchange],
        reduction=_C.Reduction.__members__[options.reduction],
    )


@lru_cache(maxsize=64)
def features_words(pyramid: Pyramid) -> list[int]:
    """A `Layer` of csrc/op.h for each layer, concatenated, with 0 for what a call fills in; copy it first."""
    return _layer_words(
        [
            (layer.shape, stride, layer.dtype)
            for layer, stride in zip(pyramid.layers, pyramid.strides, strict=True)
        ]
    )


@lru_cache(maxsize=64)
def gradients_words(pyramid: Pyramid) -> list[int]:
    """The same with the strides of the gradients."""
    return _layer_words(pyramid.layers)


def _layer_words(layers: Sequence[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]) -> list[int]:
    words = [0] * (_LAYER_WORDS * len(layers))
    for index, (shape, stride, dtype) in enumerate(layers):
        start = index * _LAYER_WORDS
        words[start + _LAYER["dtype"]] = WORD_OF_DTYPE[dtype]
        words[start + _LAYER["channels"]] = shape[1]
        put_extents(words, start + _LAYER["size"], shape[2:], missing=1)
        _put_strides(words, start, "", stride)
    return words


def put_extents(words: list[int], start: int, values: Sequence[int], missing: int) -> None:
    """Write d0, d1, d2; missing dimensions come first."""
    words[start : start + 3] = [missing] * (3 - len(values)) + list(values)


def _put_strides(words: list[int], start: int, prefix: str, stride: Sequence[int]) -> None:
    words[start + _LAYER[f"{prefix}stride_n"]] = stride[0]
    words[start + _LAYER[f"{prefix}stride_c"]] = stride[1]
    put_extents(words, start + _LAYER[f"{prefix}stride"], stride[2:], missing=0)


def sums_words(features: Sequence[Tensor], weights: Weights, pyramid: Pyramid) -> list[int]:
    """Pack layers that are read, [N, C_l, *S_l], with their weights [N, P_l]."""
    return _with_pointers(features_words(pyramid), features, weights)


def _with_pointers(words: list[int], features: Sequence[Tensor], weights: Weights) -> list[int]:
    words = words.copy()
    words[_FEATURES::_LAYER_WORDS] = [layer.data_ptr() for layer in features]
    words[_FG::_LAYER_WORDS] = [weight.data_ptr() for weight in weights.fg]
    if weights.bg:
        words[_BG::_LAYER_WORDS] = [weight.data_ptr() for weight in weights.bg]
    words[_MASK_DTYPE::_LAYER_WORDS] = [WORD_OF_DTYPE[weight.dtype] for weight in weights.fg]
    return words


def gradient_words(
    grads: Sequence[Tensor], weights: Weights, upstream: Sequence[Tensor | None], pyramid: Pyramid
) -> list[int]:
    """Pack gradients that are written, [N, C_l, *S_l], and the upstream ones, of the same dtypes."""
    words = _with_pointers(gradients_words(pyramid), grads, weights)
    for index, added in enumerate(upstream):
        if added is not None:
            start = index * _LAYER_WORDS
            words[start + _UPSTREAM] = added.data_ptr()
            _put_strides(words, start, "upstream_", added.stride())
    return words


def norm_words(empty: list[int], x: Tensor, grad: Tensor | None, weights: Weights | None) -> list[int]:
    """Pack the input [N, C, *S] of a normalisation, the gradient that arrives, and weights [N, P].

    `empty` are the `features_words` of the input.
    """
    words = empty.copy() if weights is None else _with_pointers(empty, [x], weights)
    words[_FEATURES] = x.data_ptr()
    if grad is not None:
        words[_UPSTREAM] = grad.data_ptr()
    return words


def mask_gradient_words(
    features: Sequence[Tensor], weights: Weights, grads: Weights, pyramid: Pyramid
) -> list[int]:
    """Pack layers that are read, [N, C_l, *S_l], and gradients of weights that are written, [N, P_l]."""
    words = sums_words(features, weights, pyramid)
    words[_GRAD_FG::_LAYER_WORDS] = [grad.data_ptr() for grad in grads.fg]
    if grads.bg:
        words[_GRAD_BG::_LAYER_WORDS] = [grad.data_ptr() for grad in grads.bg]
    return words


@lru_cache(maxsize=64)
def _region_layer_words(pyramid: Pyramid) -> list[int]:
    """A `RegionLayer` of csrc/op.h for each layer, concatenated, with 0 for what a call fills in."""
    words = [0] * (_REGION_WORDS * len(pyramid.layers))
    for index, (shape, _, dtype) in enumerate(pyramid.layers):
        start = index * _REGION_WORDS
        words[start + _REGION["dtype"]] = WORD_OF_DTYPE[dtype]
        words[start + _REGION["channels"]] = shape[1]
        put_extents(words, start + _REGION["size"], shape[2:], missing=1)
    return words


def region_words(
    regions: Regions,
    pyramid: Pyramid,
    *,
    features: Sequence[Tensor] = (),
    gradient: Sequence[Tensor] = (),
    upstream: Sequence[Tensor | None] = (),
    grad_weights: Sequence[Tensor] = (),
) -> list[int]:
    """Pack layers [N, C_l, *S_l] with the weights [N, R, P_l] of their regions.

    Args:
        features: read, or empty.
        gradient: written, or empty; and `upstream`, of the same dtypes, is added to it.
        grad_weights: written, [N, R, P_l], or empty.
    """
    words = _region_layer_words(pyramid).copy()
    words[_REGION["weights"] :: _REGION_WORDS] = [weight.data_ptr() for weight in regions.weights]
    words[_REGION["weight_dtype"] :: _REGION_WORDS] = [
        WORD_OF_DTYPE[weight.dtype] for weight in regions.weights
    ]
    if grad_weights:
        words[_REGION["grad_weights"] :: _REGION_WORDS] = [grad.data_ptr() for grad in grad_weights]
    for field, maps in (("features", features), ("gradient", gradient), ("upstream", upstream)):
        for index, values in enumerate(maps):
            if values is not None:
                start, stride = index * _REGION_WORDS + _REGION[field], values.stride()
                words[start : start + 3] = values.data_ptr(), stride[0], stride[1]
                put_extents(words, start + 3, stride[2:], missing=0)
    return words


def with_contiguous_pivots(regions: Regions) -> Regions:
    """The regions with their pivots [R, N, ΣC] as kernels read them; they must outlive the call."""
    return regions if regions.pivots is None else regions._replace(pivots=regions.pivots.contiguous())


def region_arguments(regions: Regions, dtype: torch.dtype) -> tuple[int, int, bool, int, _C.DType]:
    """The arguments from `batch` to `accumulate` of the stub; the pivots are contiguous and of `dtype`."""
    batch, num_regions, _ = regions.weights[0].shape
    return batch, num_regions, regions.selects, pointer(regions.pivots), DTYPES[dtype]


def empty_region_sums(regions: Regions, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
    """Allocate the sums [R, N, ΣC], with pivots [2R, N, ΣC], and the masses [R, N, L] of a call."""
    weights = regions.weights[0]
    batch, num_regions, device = weights.shape[0], regions.num_regions, weights.device
    rows = num_regions if regions.pivots is None else 2 * num_regions
    sums = torch.empty((rows, batch, pyramid.total_channels), dtype=pyramid.dtype, device=device)
    return sums, torch.empty((num_regions, batch, len(regions.weights)), dtype=pyramid.dtype, device=device)


def empty_sums(
    features: Sequence[Tensor],
    pyramid: Pyramid,
    options: Options | None,
    with_slopes: bool,
    adds_up: bool = False,
) -> Sums:
    """Allocate sums, slopes [2, N, ΣC], masses [2, N, L] and losses [L] or [], as `Sums` has them."""
    batch, num_layers, dtype, device = features[0].shape[0], len(features), pyramid.dtype, features[0].device
    sums = torch.empty((2, batch, pyramid.total_channels), dtype=dtype, device=device)
    masses = torch.empty((2, batch, num_layers), dtype=dtype, device=device)
    if options is None:
        return Sums(sums, masses, None, None)
    losses = torch.empty(() if adds_up else num_layers, dtype=dtype, device=device)
    return Sums(sums, masses, losses, torch.empty_like(sums) if with_slopes else None)


def pointer(tensor: Tensor | None) -> int:
    """The address of a tensor of any shape, or 0."""
    return 0 if tensor is None else tensor.data_ptr()


def empty_gradients(layers: Sequence[Layer], device: torch.device) -> list[Tensor]:
    """Allocate the gradients [N, C_l, *S_l] of layers."""
    return [torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in layers]


def empty_weight_gradients(weights: Weights, dtype: torch.dtype) -> Weights:
    """Allocate gradients [N, P_l] of weights."""
    fg, bg = ([torch.empty_like(weight, dtype=dtype) for weight in kind] for kind in (weights.fg, weights.bg))
    return Weights(fg, bg)


def same_dtype(upstream: Sequence[Tensor | None], layers: Sequence[Layer]) -> list[Tensor | None]:
    """Cast each upstream gradient [N, C_l, *S_l] to its layer's dtype, as the kernels require."""
    return [
        None if added is None else added.to(layer.dtype)
        for added, layer in zip(upstream, layers, strict=False)
    ]


def contiguous(pairing: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Return the pairing [N] or [K, 2] as kernels read it, its address and the number of its pairs.

    The tensor must outlive the call.
    """
    if pairing is None:
        return None, 0, 0
    pairing = pairing.contiguous()
    return pairing, pairing.data_ptr(), pairing.shape[0]


def allocate_in(workspace: list[Tensor], device: torch.device) -> Callable[[int], int]:
    """Return a function that allocates bytes [B], appends them to `workspace` and returns their address.

    The memory may be freed after the launches: whatever gets it next runs behind them on the stream.
    """

    def allocate(size: int) -> int:
        workspace.append(torch.empty(size, dtype=torch.uint8, device=device))
        return workspace[-1].data_ptr()

    return allocate
