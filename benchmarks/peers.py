"""Everyone who computes the loss of a case, the floors below them, and the truth they are compared with.

Contenders take nothing and return the loss, a scalar: the op, and what a user would write instead. Each
computes the convention `"paper"`, averaged over samples and layers,

    L[n] = -log( Σ_c (f - b)² + ε ),  f = mean_p(y·F),  b = mean_p((1-y)·F)

with the terms of an exchange where the case has one, or `"released"`, as the authors wrote it,

    L[c] = -½·log( Σ_n (f - b)² + ε ),  f = mean_p(y·F),  b = mean_p(y·(1-F))
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import fdkernels
from benchmarks.cases import Case, Inputs, auto_backend

EPS = 1e-12
# Bounds on |loss - truth| / max(1, |truth|) and on ‖gradient - truth‖ / ‖truth‖. A float32 matrix product
# adds tens of thousands of pixels one by one; peers in bfloat16 round each product and sum to 8 bits.
OP_BOUNDS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-5, 4e-3)}
PEER_BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 6e-2)}
# Under `"released"` f and b can be close to one another, and their difference keeps few of the 8 bits.
RELEASED_BOUNDS = {**PEER_BOUNDS, torch.bfloat16: (2e-2, 0.2)}
SUMS_BOUND = 1e-6  # on ‖sums - truth‖ / ‖truth‖ of the kernels alone

_AREA = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d)
_MAX = (functional.adaptive_max_pool1d, functional.adaptive_max_pool2d, functional.adaptive_max_pool3d)
_FILL = 0.5  # not 0: memory that is already zero may be written faster
_BLOCK_ELEMENTS = 2**18

Contender = Callable[[], Tensor]


class PeerMask(NamedTuple):
    """The mask as it is fastest for the peers: converted to the features' dtype before the clock starts.

    Attributes:
        fg: [N, 1, *S0], the foreground among the valid pixels.
        valid: likewise 1 where a pixel counts, or None where all do.
    """

    fg: Tensor
    valid: Tensor | None


def contenders(case: Case, inputs: Inputs, compiled: bool = True) -> dict[str, Contender]:
    """Everyone who computes the loss of a case, by name.

    The op takes the mask as a data loader gives it; the peers get it in the features' dtype.

    Args:
        case, inputs: the case.
        compiled: whether `eager` under torch.compile is one of them; it compiles at its first call.

    Returns:
        `op`, further backends as `op (triton)`, `eager`, `compiled`, `bmm` except under `"released"`, and for
        several layers `single calls`.
    """
    layers, mask = inputs.layers, peer_mask(case, inputs.mask)
    arguments: tuple[Any, ...] = (layers, mask)
    write = plain_released
    if case.convention == "paper":
        write, arguments = plain, (layers, mask, inputs.pairing, case.exchange)
    named: dict[str, Contender] = {"op": lambda: op(case, inputs)}
    for backend in other_backends(case.device):
        named[f"op ({backend})"] = functools.partial(op, case, inputs, backend)
    named["eager"] = lambda: write(*arguments)
    if compiled:
        torch.compiler.reset()  # cases share code, and torch recompiles the same code only a few times
        function = torch.compile(write, fullgraph=True, dynamic=False)
        named["compiled"] = lambda: function(*arguments)
    if case.convention == "paper":
        named["bmm"] = lambda: two_column_bmm(*arguments)
    if len(layers) > 1:
        named["single calls"] = lambda: torch.stack([_call(case, inputs, layer) for layer in layers]).mean()
    return named


@functools.cache
def compile_reason(device: str) -> str | None:
    """Why torch.compile does not work here, or None."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # noqa: BLE001 - a missing compiler or Triton shows in many ways
        return f"torch.compile does not work here: {str(error).splitlines()[0]}"
    return None


def other_backends(device: str) -> list[str]:
    """The kernels for a GPU beside those that `"auto"` takes."""
    reasons = fdkernels.backends()
    names = ("cuda", "triton") if device == "cuda" else ()
    return [name for name in names if reasons[name] is None and name != auto_backend(device)]


def bounds(case: Case, name: str) -> tuple[float, float]:
    """The largest error of loss and gradient that a contender may have."""
    if name.startswith("op") or name == "single calls":
        return OP_BOUNDS[case.dtype]
    return (RELEASED_BOUNDS if case.convention == "released" else PEER_BOUNDS)[case.dtype]


def op(case: Case, inputs: Inputs, backend: str = "auto") -> Tensor:
    """The fused op, one call for all layers."""
    layers = inputs.layers
    return _call(case, inputs, layers[0] if len(layers) == 1 else layers, backend)


def options(case: Case, inputs: Inputs) -> dict[str, Any]:
    """The arguments of `fdkernels.feature_discrepancy_loss` and `fdkernels.tap` for a case."""
    return {
        "convention": case.convention,
        "exchange": case.exchange,
        "pairing": inputs.pairing,
        "ignore_index": case.ignore_index,
        "eps": EPS,
    }


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
        fg, bg = torch.bmm(features.flatten(2), columns).unbind(-1)  # [N, C]
        losses.append(_loss(fg / pixels, bg / pixels, pairing, exchange))
    return torch.stack(losses).mean()


def resize(mask: Tensor, size: torch.Size, how: str = "area") -> Tensor:
    """The mask [N, 1, *S0] at the size of a layer, [N, 1, *size]."""
    if mask.shape[2:] == size:
        return mask
    pool: Callable[..., Tensor] = (_MAX if how == "max" else _AREA)[len(size) - 1]
    return pool(mask, size)


def peer_mask(case: Case, mask: Tensor) -> PeerMask:
    """The mask of a case for its peers."""
    if case.ignore_index is None:
        return PeerMask(mask.to(case.dtype), None)
    valid = mask != case.ignore_index
    return PeerMask((mask * valid).to(case.dtype), valid.to(case.dtype))


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


class Floors:
    """Lower bounds on the time of a case: one read of the features, one write of a gradient."""

    def __init__(self, layers: Sequence[Tensor]) -> None:
        self.layers = [layer.detach() for layer in layers]

    @functools.cached_property
    def buffers(self) -> list[Tensor]:
        """Memory of the gradients' size that is already there."""
        return [torch.full_like(layer, torch.nan) for layer in self.layers]

    def forward(self) -> list[Tensor]:
        """One read: `features.sum()`."""
        return [layer.sum() for layer in self.layers]

    def backward(self) -> list[Tensor]:
        """One write into fresh memory."""
        return [torch.empty_like(layer).fill_(_FILL) for layer in self.layers]

    def forward_backward(self) -> list[Tensor]:
        """Both."""
        self.forward()
        return self.backward()

    def warm(self) -> None:
        """One write into memory that is already there."""
        for buffer in self.buffers:
            buffer.fill_(_FILL)


class Tapped:
    """Forward and backward where the network sends a gradient to the same features.

    `tap` reads that gradient once and writes the sum once; `separate` writes the gradient of the loss, and
    autograd reads both and writes their sum.
    """

    def __init__(self, case: Case, inputs: Inputs, truth: Truth) -> None:
        self.layers, self.mask, self.options = inputs.layers, inputs.mask, options(case, inputs)
        # As large as the gradient of the loss, so that a check of the sum sees both.
        self.upstream = [
            torch.empty_like(layer).uniform_(-1, 1).mul_(coefficients.abs().max().item())
            for layer, coefficients in zip(self.layers, truth.coefficients, strict=True)
        ]

    def tap(self) -> None:
        """The loss by `fdkernels.tap`."""
        clear_gradients(self.layers)
        tapped, loss = fdkernels.tap(self.layers, self.mask, **self.options)
        torch.autograd.backward([loss, *tapped], [torch.ones_like(loss), *self.upstream])

    def separate(self) -> None:
        """The loss by `fdkernels.feature_discrepancy_loss`."""
        clear_gradients(self.layers)
        used = [layer.view_as(layer) for layer in self.layers]
        loss = fdkernels.feature_discrepancy_loss(self.layers, self.mask, **self.options)
        torch.autograd.backward([loss, *used], [torch.ones_like(loss), *self.upstream])

    def floor(self) -> None:
        """One read of the features, one of the gradient that arrives, and one write."""
        clear_gradients(self.layers)
        for layer, upstream in zip(self.layers, self.upstream, strict=True):
            layer.detach().sum()
            layer.grad = upstream + _FILL


class Truth:
    """The loss and its gradient in float64, by the closed form and without the package.

    Region sums by matrix products sample by sample, the loss from them, and the gradient of a pixel from the
    two coefficients of its channel, (R2) and (R3) of the derivation.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.layers = inputs.layers
        self.weights: list[Tensor] = []  # [N, P, 2] of each layer
        self.sums: list[Tensor] = []  # S_fg, S_bg, [N, C, 2] of each layer
        self.coefficients: list[Tensor] = []  # g_fg, g_bg, [N, C, 2] of each layer
        losses = []
        for features in self.layers:
            weights = _true_weights(case, inputs.mask, features.shape[2:])  # [N, P, 2]
            products = [f.double().flatten(1) @ w for f, w in zip(features.detach(), weights, strict=True)]
            sums = torch.stack(products).requires_grad_()  # [N, C, 2]
            masses = weights.sum(1)  # [N, 2]
            if case.convention == "released":
                loss = _true_released(sums, masses, weights.shape[1])
            else:
                loss = _true_paper(sums, masses, case.exchange, inputs.pairing)
            (coefficients,) = torch.autograd.grad(loss / len(self.layers), sums)
            self.weights.append(weights)
            self.sums.append(sums.detach())
            self.coefficients.append(coefficients)
            losses.append(loss.item())
        self.loss = sum(losses) / len(losses)

    @property
    def grad_sums(self) -> Tensor:
        """The gradient of the sums of all layers, [2, N, ΣC]."""
        return torch.cat(self.coefficients, dim=1).permute(2, 0, 1)

    def errors(self, contender: Contender) -> tuple[float, float]:
        """Run a contender forward and backward and compare.

        Returns:
            |loss - truth| / max(1, |truth|), and the largest of the layers' ‖gradient - truth‖ / ‖truth‖. NaN
            where the contender gave NaN, infinite where it gave no gradient.
        """
        clear_gradients(self.layers)
        loss = contender()
        loss.backward()
        loss_error = abs(loss.item() - self.loss) / max(1.0, abs(self.loss))
        gradient_error = self.gradient_error([layer.grad for layer in self.layers])
        clear_gradients(self.layers)
        return loss_error, gradient_error

    def gradient_error(
        self, grads: Sequence[Tensor | None], upstream: Sequence[Tensor] | None = None
    ) -> float:
        """The largest of the layers' ‖gradient - truth‖ / ‖truth‖, where `upstream` is added to the truth."""
        added = upstream if upstream is not None else [None] * len(grads)
        errors = [self._error(*layer) for layer in zip(range(len(grads)), grads, added, strict=True)]
        # max() may drop NaN.
        return torch.tensor(errors, dtype=torch.float64).max().item()

    def sums_error(self, sums: Tensor) -> float:
        """‖sums - truth‖ / ‖truth‖ of region sums, [2, N, ΣC]."""
        expected = torch.cat(self.sums, dim=1).permute(2, 0, 1)
        return ((sums - expected).norm() / expected.norm()).item()

    def _error(self, index: int, got: Tensor | None, upstream: Tensor | None) -> float:
        if got is None:
            return float("inf")
        error = norm = 0.0
        weights = self.weights[index].mT  # [N, 2, P]
        # By so many channels that a block stays in the cache.
        block = max(1, _BLOCK_ELEMENTS // weights.shape[-1])
        for n, grad in enumerate(got.flatten(2)):  # [C, P]
            for start in range(0, grad.shape[0], block):
                channels = slice(start, start + block)
                expected = self.coefficients[index][n, channels] @ weights[n]  # [block, P]
                if upstream is not None:
                    expected += upstream[n, channels].flatten(1)
                norm += torch.linalg.vector_norm(expected).item() ** 2
                error += torch.linalg.vector_norm(expected.sub_(grad[channels])).item() ** 2
        return (error / norm) ** 0.5


def clear_gradients(layers: Iterable[Tensor]) -> None:
    """Forget the gradients, so that the next backward writes fresh ones."""
    for layer in layers:
        layer.grad = None


def _true_weights(case: Case, mask: Tensor, size: torch.Size) -> Tensor:
    """v·y and v·(1-y) at the layer's size, [N, P, 2]."""
    how = "max" if case.convention == "released" else "area"
    valid = torch.ones_like(mask, dtype=torch.float64)
    if case.ignore_index is not None:
        valid = (mask != case.ignore_index).double()
    fg = resize(valid * mask.double(), size, how)  # [N, 1, *size]
    bg = 1 - fg if how == "max" else resize(valid * (1 - mask.double()), size, how)
    return torch.stack([fg.flatten(1), bg.flatten(1)], dim=-1)


def _true_paper(sums: Tensor, masses: Tensor, exchange: str, pairing: Tensor | None) -> Tensor:
    means = sums / masses.sum(-1)[:, None, None]  # [N, C, 2]
    f, b = means.unbind(-1)
    total = _minus_log(f - b).mean()
    if exchange == "shuffle":
        total = total + _minus_log(f[pairing] - b).mean()
    if exchange == "pooled":
        pairs = [torch.cat([f[i] - b[j], f[j] - b[i]]) for i, j in pairing.tolist()]
        total = total + _minus_log(torch.stack(pairs)).mean()
    return total


def _true_released(sums: Tensor, masses: Tensor, pixels: int) -> Tensor:
    f = sums[..., 0] / pixels  # [N, C]
    b = masses[:, :1] / pixels - f
    return _minus_log((f - b).mT).mean() / 2


def _minus_log(differences: Tensor) -> Tensor:
    return -differences.square().sum(1).add(EPS).log()
