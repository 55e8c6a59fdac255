"""All argument validation but that of aspect, which `geometry` holds.

Shapes, dtypes, devices and names are always checked. Values (a 0/255 mask, an out-of-range pairing)
are checked where reading them does not synchronise a device: on the CPU, and everywhere under `debug()`.
A compiled graph contains no value checks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from types import TracebackType

import torch
from torch import Tensor

from fdkernels.transforms import has_values, in_transform, innermost, unwrap_dead

_FEATURE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGER_MASK_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)
_debug_depth = 0

# Of a mask [N, 1, *S0] and the value of ignored pixels: whether such masks have values in [0, 1] beside it.
MaskCheck = Callable[[Tensor, float | None], Callable[[Tensor], bool]]


def mask_tolerance(dtype: torch.dtype) -> float:
    """How far the values of a soft mask of that dtype may lie outside [0, 1], by rounding, and be taken.

    About a hundred roundings of float32, as an antialiased resize, a blur or a sum of softmax channels may
    add up; four above 1 in float16, and half of one in bfloat16, whose next number above 1 is 1.01. Powers of
    two, so that the bounds are exact in the dtypes in which kernels compare.
    """
    return 2.0**-8 if dtype in (torch.float16, torch.bfloat16) else 2.0**-16


class debug:
    """Check values on every device; each check synchronises: `with fdkernels.debug(): ...`."""

    def __enter__(self) -> debug:
        global _debug_depth
        _debug_depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _debug_depth
        _debug_depth -= 1


def is_debugging() -> bool:
    """Whether values are checked on every device."""
    return _debug_depth > 0


def values_are_readable(tensor: Tensor) -> bool:
    """Return whether values of `tensor` may be read: on the CPU or under `debug()`, never while compiling."""
    if torch.compiler.is_compiling() or not has_values(tensor):
        return False
    return tensor.device.type == "cpu" or is_debugging()


def one_of(argument: str, value: object, allowed: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of the `allowed` names."""
    if value not in allowed:
        names = ", ".join(repr(name) for name in allowed)
        raise ValueError(f"{argument} must be one of {names}, got {value!r}")


def non_negative(argument: str, value: float) -> None:
    """Raise TypeError unless `value` is a number, ValueError unless it is at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number, got {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"{argument} must be at least 0, got {value}")


def as_layers(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the features as a validated list with one tensor [N, C, *S] per layer.

    Raises:
        TypeError: `features` is neither a tensor nor a list or tuple of tensors, or a layer is not
            dense float32, float64, bfloat16 or float16.
        ValueError: there is no layer, a layer does not have 1 to 3 spatial dimensions, a channel and a pixel,
            or the layers differ in rank, batch size or device.
    """
    if isinstance(features, Tensor):
        layers = [features]
    elif isinstance(features, (list, tuple)):
        layers = list(features)
    else:
        raise TypeError(
            "features must be a tensor or a sequence of tensors, one for each layer, "
            f"got {type(features).__name__}"
        )
    if not layers:
        raise ValueError("features must contain at least one layer, got an empty sequence")
    for index, layer in enumerate(layers):
        _check_layer(layer, index, layers)
    layers = [unwrap_dead(layer) for layer in layers]
    first = layers[0]
    for index, layer in enumerate(layers[1:], start=1):
        if layer.dim() != first.dim():
            raise ValueError(
                f"all features must have the same number of dimensions, got {first.dim()} in "
                f"features[0] and {layer.dim()} in features[{index}]"
            )
        if layer.shape[0] != first.shape[0]:
            raise ValueError(
                f"all features must have the same batch size, got {first.shape[0]} in features[0] "
                f"and {layer.shape[0]} in features[{index}]"
            )
        if layer.device != first.device:
            raise ValueError(
                f"all features must be on one device, got {first.device} for features[0] and "
                f"{layer.device} for features[{index}]"
            )
    return layers


def _check_layer(layer: object, index: int, layers: Sequence[object]) -> None:
    def name() -> str:
        return "features" if len(layers) == 1 else f"features[{index}]"

    if not isinstance(layer, Tensor):
        raise TypeError(f"{name()} must be a tensor, got {type(layer).__name__}")
    if not _is_dense(layer):
        raise TypeError(f"{name()} must be a dense tensor, got {_layout_of(layer)}")
    if layer.dtype not in _FEATURE_DTYPES:
        raise TypeError(f"{name()} must be float32, float64, bfloat16 or float16, got {short(layer.dtype)}")
    if not 3 <= layer.dim() <= 5:
        raise ValueError(
            f"{name()} must have shape [N, C, *S] with 1 to 3 spatial dimensions, got {list(layer.shape)}"
        )
    if not layer.numel() and 0 in layer.shape[1:]:  # a batch without samples has a loss of 0
        raise ValueError(
            f"{name()} must have at least one channel and one pixel, got shape {list(layer.shape)}"
        )


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and (torch.compiler.is_compiling() or not tensor.is_nested)


def _layout_of(tensor: Tensor) -> str:
    return "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"


def check_mask(
    mask: object,
    layers: Sequence[Tensor],
    ignore_index: float | None,
    check: MaskCheck | None = None,
) -> Tensor:
    """Validate the mask and return it as [N, 1, *S0], in the dtype it came in.

    Args:
        mask: [N, 1, *S0] or [N, *S0], bool, integer or floating point, values in [0, 1] to within
            `mask_tolerance`.
        layers: the features, as `as_layers` returns them.
        ignore_index: value of the pixels to leave out, or None.
        check: makes a faster check of the values; where that returns False, torch decides.

    Raises:
        TypeError: the type or dtype of `mask` or the type of `ignore_index` is wrong.
        ValueError: shape, device or (where readable) values of `mask` are wrong, or the dtype of the
            mask cannot represent `ignore_index`.
    """
    checked = check_mask_tensor(mask, layers)
    if checked.dim() == layers[0].dim() - 1:
        checked = checked.unsqueeze(1)
    elif checked.shape[1] != 1:
        raise ValueError(
            f"mask must have 1 channel, [N, 1, *S], got {checked.shape[1]} channels in "
            f"{list(checked.shape)}; "
            "one channel a class takes mode='multiclass', or 'multilabel' where classes overlap"
        )
    if ignore_index is not None:
        check_ignore_index(ignore_index, checked.dtype)
    check_plane_values(checked, ignore_index, check)
    return checked


def check_plane_values(mask: Tensor, ignore_index: float | None, check: MaskCheck | None) -> None:
    """Raise ValueError unless the values of a mask [N, 1, *S0] lie in [0, 1], where they are readable."""
    if mask.dtype == torch.bool or not mask.numel() or not values_are_readable(mask):
        return
    if in_transform():
        check_mask_values(innermost(mask).detach(), ignore_index, None)
    else:
        check_mask_values(mask.detach() if mask.requires_grad else mask, ignore_index, check)


def mask_as_tensor(mask: object) -> Tensor:
    """Return a mask of any shape that is a tensor.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if not _is_dense(mask):
        raise TypeError(f"mask must be a dense tensor, got {_layout_of(mask)}")
    return unwrap_dead(mask)


def check_mask_tensor(mask: object, layers: Sequence[Tensor]) -> Tensor:
    """Validate type, dtype, rank, batch size, pixels and device of a mask [N, *S0] or [N, K, *S0].

    Raises:
        TypeError, ValueError: as for `check_mask`.
    """
    mask = mask_as_tensor(mask)
    if mask.dtype not in _INTEGER_MASK_DTYPES and not mask.dtype.is_floating_point:
        raise TypeError(f"mask must be bool, integer or floating point, got {short(mask.dtype)}")
    features = layers[0]
    rank = features.dim()
    if mask.dim() not in (rank - 1, rank):
        raise ValueError(
            f"mask must have shape [N, 1, *S] or [N, *S] with {rank - 2} spatial dimension(s) like the "
            f"features {list(features.shape)}, got {list(mask.shape)}"
        )
    if mask.shape[0] != features.shape[0]:
        raise ValueError(
            f"mask must have the batch size of the features, {features.shape[0]}, "
            f"got {mask.shape[0]} in {list(mask.shape)}"
        )
    if 0 in mask.shape[1:]:
        raise ValueError(f"mask must have at least one pixel, got shape {list(mask.shape)}")
    if mask.device != features.device:
        raise ValueError(f"mask must be on the device of the features, {features.device}, got {mask.device}")
    return mask


def check_ignore_index(ignore_index: object, dtype: torch.dtype) -> None:
    """Raise TypeError or ValueError unless a mask of that dtype can hold the value."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, float)):
        raise TypeError(f"ignore_index must be a number or None, got {type(ignore_index).__name__}")
    if not math.isfinite(ignore_index):
        raise ValueError(f"ignore_index must be a finite number, got {ignore_index}")
    if dtype == torch.bool:
        low, high = 0, 1
    elif not dtype.is_floating_point:
        low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    else:
        return
    # torch wraps a scalar into the mask's dtype before comparing: uint8 255 == -1 would be true.
    if ignore_index != int(ignore_index) or not low <= ignore_index <= high:
        raise ValueError(
            f"ignore_index must be representable in the mask's dtype, {low} to {high} for {short(dtype)}, "
            f"got {ignore_index}"
        )


def check_mask_values(
    mask: Tensor,
    ignore_index: float | None,
    check: MaskCheck | None,
    left_out: float | None = None,
) -> None:
    """Raise ValueError unless the values of a mask, of any shape, lie in [0, 1].

    Args:
        mask: the values.
        ignore_index, check: as for `check_mask`.
        left_out: the value that the caller has left out already, for the sentence.
    """
    if check is not None and check(mask, ignore_index)(mask):
        return
    if ignore_index is not None:
        mask = mask.masked_fill(mask == ignore_index, 0)
    low, high = (bound.item() for bound in mask.aminmax())
    tolerance = mask_tolerance(mask.dtype)
    if low >= -tolerance and high <= 1 + tolerance:
        return
    if low != low or high != high:
        raise ValueError("mask must have values in [0, 1], got NaN")
    wanted = "values in [0, 1]" if mask.dtype.is_floating_point else "the values 0 and 1"
    hint = ""
    if high == 255:
        hint = "; divide a 0/255 mask by 255"
    elif low >= 0 and math.isfinite(high) and high == int(high):
        hint = "; class indices take mode='multiclass' and num_classes"
    ignored = ignore_index if left_out is None else left_out
    but = "" if ignored is None else f" beside ignore_index={ignored}"
    raise ValueError(f"mask must have {wanted}{but}, got values from {low} to {high}{hint}")


def warn_if_detached(layers: Sequence[Tensor]) -> bool:
    """Warn if a training pass gets a layer [N, C_l, *S_l] whose loss cannot train the network.

    Nothing is said where no gradients are wanted at all, under torch.no_grad.

    Returns:
        Whether it warned, so that the caller says it once.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or in_transform():
        return False
    detached = [index for index, layer in enumerate(layers) if not layer.requires_grad]
    if not detached:
        return False
    named = ", ".join(f"features[{index}]" for index in detached)
    does, its = ("does", "its") if len(detached) == 1 else ("do", "their")
    hint = "" if len(detached) == len(layers) else " (a frozen part of the network gives such features, too)"
    warnings.warn(
        f"{named} {does} not require a gradient, so {its} loss cannot train the network; were they detached, "
        f"or made under no_grad?{hint}",
        stacklevel=3,
    )
    return True


def check_layer_weights(layer_weights: object, layers: Sequence[Tensor]) -> Tensor | None:
    """Validate the layer weights and return them as a floating-point tensor [L], or None if None was given.

    Raises:
        TypeError: the weights are neither a floating-point tensor nor a list of numbers.
        ValueError: there is not exactly one weight per layer, or they are not on the features' device.
    """
    if layer_weights is None:
        return None
    if isinstance(layer_weights, (list, tuple)):
        for weight in layer_weights:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise TypeError(
                    "layer_weights must be a tensor [L] or a list of numbers, "
                    f"got a list with {type(weight).__name__}"
                )
        layer_weights = torch.tensor(layer_weights, dtype=torch.float32, device=layers[0].device)
    if not isinstance(layer_weights, Tensor):
        raise TypeError(
            f"layer_weights must be a tensor [L] or a list of numbers, got {type(layer_weights).__name__}"
        )
    if not layer_weights.dtype.is_floating_point:
        raise TypeError(f"layer_weights must be floating point, got {short(layer_weights.dtype)}")
    if layer_weights.shape != (len(layers),):
        raise ValueError(
            f"layer_weights must have shape [{len(layers)}], one weight for each layer, "
            f"got {list(layer_weights.shape)}"
        )
    if layer_weights.device != layers[0].device:
        raise ValueError(
            f"layer_weights must be on the device of the features, {layers[0].device}, "
            f"got {layer_weights.device}"
        )
    return layer_weights


def short(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")
