"""The op, and what a user would write instead: functions of layers and mask to the loss, a scalar.

Each computes the convention `"paper"`, averaged over samples and layers,

    L[n] = -log( Σ_c (f - b)² + ε ),  f = mean_p(y·F),  b = mean_p((1-y)·F)

with the terms of an exchange where the case has one, or the convention `"released"`, as the authors wrote it,

    L[c] = -½·log( Σ_n (f - b)² + ε ),  f = mean_p(y·F),  b = mean_p(y·(1-F))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import fdkernels
from benchmarks.cases import Case, Inputs

EPS = 1e-12
# Bounds on |loss - truth| / max(1, |truth|) and on ‖gradient - truth‖ / ‖truth‖. A float32 matrix product
# adds tens of thousands of pixels one after the other; peers that compute in bfloat16 round each product and
# sum to 8 bits, which shows in the difference f - b.
OP_BOUNDS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-5, 4e-3)}
PEER_BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 6e-2)}
# Under `"released"` f and b can be close to one another, and their difference keeps few of the 8 bits.
RELEASED_BOUNDS = {**PEER_BOUNDS, torch.bfloat16: (2e-2, 0.2)}

_AREA = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d)
_MAX = (functional.adaptive_max_pool1d, functional.adaptive_max_pool2d, functional.adaptive_max_pool3d)


class PeerMask(NamedTuple):
    """The mask as it is fastest for the peers: converted to the features' dtype before the clock starts.

    Attributes:
        fg: [N, 1, *S0], the foreground among the valid pixels.
        valid: likewise 1 where a pixel counts, or None where all do.
    """

    fg: Tensor
    valid: Tensor | None


def op(case: Case, inputs: Inputs, backend: str = "auto") -> Tensor:
    """The fused op, one call for all layers."""
    layers = inputs.layers
    return _call(case, inputs, layers[0] if len(layers) == 1 else layers, backend)


def single_calls(case: Case, inputs: Inputs) -> Tensor:
    """The fused op, one call for each layer."""
    return torch.stack([_call(case, inputs, layer) for layer in inputs.layers]).mean()


def plain(
    layers: Sequence[Tensor], mask: PeerMask, pairing: Tensor | None = None, exchange: str = "none"
) -> Tensor:
    """The loss the way anyone would write it: two masked copies of the features, and their means."""
    losses = []
    for features in layers:
        fg_weight, bg_weight, pixels = _weights(mask, features)
        fg = (features * fg_weight).flatten(2).sum(-1) / pixels  # [N, C]
        bg = (features * bg_weight).flatten(2).sum(-1) / pixels  # [N, C]
        losses.append(_loss(fg, bg, pairing, exchange))
    return torch.stack(losses).mean()


def plain_released(layers: Sequence[Tensor], mask: PeerMask) -> Tensor:
    """The loss as the authors of the paper wrote it: y·F and y·(1-F), a loss for each channel."""
    losses = []
    for features in layers:
        resized = resize(mask.fg, features.shape[2:], "max")
        fg = (features * resized).flatten(2).mean(-1)  # [N, C]
        bg = ((1 - features) * resized).flatten(2).mean(-1)  # [N, C]
        losses.append(-0.5 * (fg - bg).float().square().sum(0).add(EPS).log().mean())
    return torch.stack(losses).mean()


def two_column_bmm(
    layers: Sequence[Tensor], mask: PeerMask, pairing: Tensor | None = None, exchange: str = "none"
) -> Tensor:
    """The loss by one matrix product: [N, C, P] times the columns of the two weights, [N, P, 2]."""
    losses = []
    for features in layers:
        fg_weight, bg_weight, pixels = _weights(mask, features)
        columns = torch.stack([fg_weight.flatten(1), bg_weight.flatten(1)], dim=-1)  # [N, P, 2]
        means = torch.bmm(features.flatten(2), columns) / _last(pixels)  # [N, C, 2]
        losses.append(_loss(means[..., 0], means[..., 1], pairing, exchange))
    return torch.stack(losses).mean()


def resize(mask: Tensor, size: torch.Size, how: str = "area") -> Tensor:
    """The mask [N, 1, *S0] at the size of a layer, [N, 1, *size]."""
    if mask.shape[2:] == size:
        return mask
    pool: Callable[..., Tensor] = (_MAX if how == "max" else _AREA)[len(size) - 1]
    return pool(mask, size)


def contenders(case: Case, inputs: Inputs, compiled: bool = True) -> dict[str, Callable[[], Tensor]]:
    """Everyone who computes the loss of a case, by name.

    The op takes the mask as a data loader gives it; the peers get it in the features' dtype, converted
    beforehand, which is the fastest for them.

    Args:
        case: the case.
        inputs: its tensors.
        compiled: whether `plain` under torch.compile is one of them; it compiles at its first call.

    Returns:
        `op`, further backends as `op (triton)`, `eager`, `compiled`, `bmm` except under `"released"`, and
        for several layers `single calls`.
    """
    layers = inputs.layers
    own_mask = peer_mask(case, inputs.mask)
    arguments = (layers, own_mask)
    if case.convention == "paper":
        arguments += (inputs.pairing, case.exchange)
    write = plain_released if case.convention == "released" else plain
    named: dict[str, Callable[[], Tensor]] = {"op": lambda: op(case, inputs)}
    for backend in other_backends(case.device):
        named[f"op ({backend})"] = lambda backend=backend: op(case, inputs, backend)
    named["eager"] = lambda: write(*arguments)
    if compiled:
        torch.compiler.reset()  # cases share code, and torch recompiles the same code only a few times
        function = torch.compile(write, fullgraph=True, dynamic=False)
        named["compiled"] = lambda: function(*arguments)
    if case.convention == "paper":
        named["bmm"] = lambda: two_column_bmm(*arguments)
    if len(layers) > 1:
        named["single calls"] = lambda: single_calls(case, inputs)
    return named


def peer_mask(case: Case, mask: Tensor) -> PeerMask:
    """The mask of a case for its peers."""
    if case.ignore_index is None:
        return PeerMask(mask.to(case.dtype), None)
    valid = mask != case.ignore_index
    return PeerMask((mask * valid).to(case.dtype), valid.to(case.dtype))


def is_op(name: str) -> bool:
    """Whether a contender is the fused op, in whatever form."""
    return name.startswith("op") or name in ("single calls", "tap")


def bounds(case: Case, name: str) -> tuple[float, float]:
    """How far loss and gradient of a contender may be from the truth."""
    if is_op(name):
        return OP_BOUNDS[case.dtype]
    return (RELEASED_BOUNDS if case.convention == "released" else PEER_BOUNDS)[case.dtype]


def other_backends(device: str) -> list[str]:
    """Kernels of this package for the device, beside those that `"auto"` takes."""
    if device != "cuda":
        return []
    auto = fdkernels.backend.auto_backend(device)
    reasons = fdkernels.backends()
    return [name for name in ("cuda", "triton") if reasons[name] is None and name != auto]


def options(case: Case, inputs: Inputs) -> dict[str, object]:
    """The arguments of `fdkernels.feature_discrepancy_loss` and `fdkernels.tap` for a case."""
    return {
        "convention": case.convention,
        "exchange": case.exchange,
        "pairing": inputs.pairing,
        "ignore_index": case.ignore_index,
        "eps": EPS,
    }


def _call(case: Case, inputs: Inputs, features: Tensor | Sequence[Tensor], backend: str = "auto") -> Tensor:
    return fdkernels.feature_discrepancy_loss(features, inputs.mask, **options(case, inputs), backend=backend)


def _weights(mask: PeerMask, features: Tensor) -> tuple[Tensor, Tensor, Tensor | int]:
    """Weights [N, 1, *S] of the two regions at the layer's size, and the valid pixels, [N, 1]."""
    size = features.shape[2:]
    fg = resize(mask.fg, size)
    if mask.valid is None:
        return fg, 1 - fg, size.numel()
    valid = resize(mask.valid, size)
    # In float32, as bfloat16 cannot count.
    return fg, valid - fg, valid.flatten(1).sum(1, keepdim=True, dtype=torch.float32)


def _last(pixels: Tensor | int) -> Tensor | int:
    return pixels if isinstance(pixels, int) else pixels.unsqueeze(-1)


def _loss(fg: Tensor, bg: Tensor, pairing: Tensor | None, exchange: str) -> Tensor:
    entries = _entries(_distance(fg, bg))  # [N]
    if exchange == "shuffle":
        entries = entries + _entries(_distance(fg[pairing], bg))
    if exchange == "pooled":
        i, j = pairing.unbind(1)
        entries = entries + _entries(_distance(fg[i], bg[j]) + _distance(fg[j], bg[i])).mean()
    return entries.mean()


def _distance(fg: Tensor, bg: Tensor) -> Tensor:
    return (fg - bg).float().square().sum(1)


def _entries(distance: Tensor) -> Tensor:
    return -distance.add(EPS).log()
