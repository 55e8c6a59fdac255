"""The op, and what a user would write instead: functions of layers and mask to the loss, a scalar.

Each computes the convention `"paper"`, averaged over samples and layers:

    L[n] = -log( Σ_c (f - b)² + ε ),  f = mean_p(y·F),  b = mean_p((1-y)·F)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

import fdkernels
from benchmarks.cases import Case, Inputs

EPS = 1e-12
# Bounds on |loss - truth| / max(1, |truth|) and on ‖gradient - truth‖ / ‖truth‖. A float32 matrix product
# adds tens of thousands of pixels one after the other; peers that compute in bfloat16 round each product and
# sum to 8 bits.
OP_BOUNDS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-5, 4e-3)}
PEER_BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 2e-2)}


def op(layers: Sequence[Tensor], mask: Tensor, backend: str = "auto") -> Tensor:
    """The fused op, one call for all layers."""
    features = layers[0] if len(layers) == 1 else layers
    return fdkernels.feature_discrepancy_loss(features, mask, eps=EPS, backend=backend)


def single_calls(layers: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The fused op, one call for each layer."""
    losses = [fdkernels.feature_discrepancy_loss(layer, mask, eps=EPS) for layer in layers]
    return torch.stack(losses).mean()


def plain(layers: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The loss the way anyone would write it: two masked copies of the features, and their means."""
    losses = []
    for features in layers:
        resized = resize(mask, features)
        fg = (features * resized).flatten(2).mean(-1)  # [N, C]
        bg = (features * (1 - resized)).flatten(2).mean(-1)  # [N, C]
        losses.append(_loss(fg, bg))
    return torch.stack(losses).mean()


def two_column_bmm(layers: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The loss by one matrix product: [N, C, P] times the two columns mask and 1 - mask, [N, P, 2]."""
    losses = []
    for features in layers:
        resized = resize(mask, features).flatten(1)  # [N, P]
        columns = torch.stack([resized, 1 - resized], dim=-1)  # [N, P, 2]
        means = torch.bmm(features.flatten(2), columns) / resized.shape[1]  # [N, C, 2]
        losses.append(_loss(means[..., 0], means[..., 1]))
    return torch.stack(losses).mean()


def resize(mask: Tensor, features: Tensor) -> Tensor:
    """The mask at the size of a layer, [N, 1, H, W]."""
    if mask.shape[2:] == features.shape[2:]:
        return mask
    return functional.adaptive_avg_pool2d(mask, features.shape[2:])


def contenders(case: Case, inputs: Inputs, compiled: bool = True) -> dict[str, Callable[[], Tensor]]:
    """Everyone who computes the loss of a case, by name.

    The op takes the float32 mask as a data loader gives it; the peers get it in the features' dtype,
    converted beforehand, which is the fastest for them.

    Args:
        case: the case.
        inputs: its tensors.
        compiled: whether `plain` under torch.compile is one of them; it compiles at its first call.

    Returns:
        `op`, further backends as `op (triton)`, `eager`, `compiled`, `bmm`, and for several layers `single
        calls`.
    """
    layers, mask = inputs
    own_mask = mask.to(case.dtype)
    named: dict[str, Callable[[], Tensor]] = {"op": lambda: op(layers, mask)}
    for backend in other_backends(case.device):
        named[f"op ({backend})"] = lambda backend=backend: op(layers, mask, backend)
    named["eager"] = lambda: plain(layers, own_mask)
    if compiled:
        torch.compiler.reset()  # cases share code, and torch recompiles the same code only a few times
        function = torch.compile(plain, fullgraph=True, dynamic=False)
        named["compiled"] = lambda: function(layers, own_mask)
    named["bmm"] = lambda: two_column_bmm(layers, own_mask)
    if len(layers) > 1:
        named["single calls"] = lambda: single_calls(layers, mask)
    return named


def is_op(name: str) -> bool:
    """Whether a contender is the fused op, in whatever form."""
    return name.startswith("op") or name == "single calls"


def other_backends(device: str) -> list[str]:
    """Kernels of this package for the device, beside those that `"auto"` takes."""
    if device != "cuda":
        return []
    auto = fdkernels.backend.auto_backend(device)
    reasons = fdkernels.backends()
    return [name for name in ("cuda", "triton") if reasons[name] is None and name != auto]


def _loss(fg: Tensor, bg: Tensor) -> Tensor:
    return -(fg - bg).float().square().sum(1).add(EPS).log().mean()
