"""`NormAct`: BatchNorm or InstanceNorm with ReLU, LeakyReLU or nothing, in one pass."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase

from fdkernels.backend import resolve, selected
from fdkernels.op.kernels import norm_kernels_of
from fdkernels.op.norm_act import NormCall, can_fuse, norm_act
from fdkernels.op.norm_formula import Formula, Running
from fdkernels.op.registered import may_call_directly
from fdkernels.taps.early import EarlyMask
from fdkernels.transforms import in_transform

__all__ = ["NormAct", "activation_of", "is_norm"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_KINDS: dict[type[nn.Module], tuple[bool, int]] = {
    kind: (instance, dimensions)
    for instance, kinds in ((False, _BATCH_NORMS), (True, _INSTANCE_NORMS))
    for dimensions, kind in enumerate(kinds, 3)
}
# What parameters and running statistics may be for the kernels.
_KEPT = (torch.float32, torch.float64)
# On a GPU torch's own operations take as long for maps of so many elements, and less of the host's time.
_FEW_ON_GPU = 2**22
# Kinds of inputs whose backend a module remembers; few modules see more.
_MOST_KINDS = 32


def is_norm(module: nn.Module | None) -> TypeGuard[_NormBase]:
    """Whether `NormAct` can take the place of a normalisation: of its very class, since others do more."""
    return type(module) in _KINDS


def activation_of(module: nn.Module | None) -> tuple[str, float] | None:
    """Name and slope of an activation that `NormAct` knows, `("none", 0)` for None; None for any other."""
    if module is None:
        return "none", 0.0
    if type(module) is nn.ReLU:
        return "relu", 0.0
    # A slope below 0 would turn a gradient of 0 into one of either sign; torch allows it, and so do others.
    if type(module) is nn.LeakyReLU and module.negative_slope >= 0:
        return "leaky_relu", float(module.negative_slope)
    return None


class _Kept(NamedTuple):
    """What a normalisation keeps, each [C], read once a call, as each is looked up.

    Attributes:
        weight, bias: γ and β, or None.
        running: running mean and variance, or None.
    """

    weight: Tensor | None
    bias: Tensor | None
    running: tuple[Tensor, Tensor] | None

    def is_readable(self, x: Tensor) -> bool:
        """Whether the kernels read all of it where it lies, for an input [N, C, *S]."""
        dtype = None
        for tensor in (self.weight, self.bias, *(self.running or ())):
            if tensor is None:
                continue
            if tensor.dtype not in _KEPT or tensor.dtype != (dtype or tensor.dtype):
                return False
            if tensor.device != x.device or not tensor.is_contiguous():
                return False
            dtype = tensor.dtype
        return True


# Shape, strides, dtype and device of an input; whether it is its own statistics; what "auto" means.
_Kind = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device, bool, str]


class NormAct(nn.Module):
    """A normalisation and its activation as one module, with the parameters and buffers of the normalisation.

    With μ and σ² the mean and the biased variance of the batch, or of each sample under InstanceNorm, and a
    the activation, it computes what the two modules compute, to rounding::

        y = a((x - μ) / sqrt(σ² + ε)·γ + β)             with activation_first=False
        y = (a(x) - μ) / sqrt(σ² + ε)·γ + β             with activation_first=True, μ and σ² of a(x)

    On backends `"cpu"`, `"triton"` and `"cuda"` forward reads the input twice and writes the output; backward
    reads input and gradient twice and writes the gradient; no map but the input is kept. Where its output is
    tapped by `FeatureTaps(..., fused=True)` the same backward adds the gradient of the loss, and inside
    `taps.mask(mask)` the region sums come from the pass that writes the output. On other backends, under
    torch.compile and inside torch.func's transforms it runs torch's own operations.

    Args:
        norm: a BatchNorm or InstanceNorm of 1 to 3 dimensions, whose parameters and buffers are shared, so
            that names, checkpoints and optimizers stay as they are. Its hooks do not go with it.
        activation: `nn.ReLU`, `nn.LeakyReLU` or None.
        activation_first: whether the activation comes before the normalisation.

    Shape:
        [N, C, *S] to [N, C, *S], for BatchNorm1d also [N, C].

    Raises:
        TypeError: another kind of normalisation or activation.
    """

    _version = 2  # that of torch's batch norm, whose state dicts it reads

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self, norm: nn.Module, activation: nn.Module | None = None, activation_first: bool = False
    ) -> None:
        super().__init__()
        if not is_norm(norm):
            raise TypeError(
                f"norm must be a BatchNorm or an InstanceNorm of 1 to 3 dimensions, got {type(norm).__name__}"
            )
        known = activation_of(activation)
        if known is None:
            raise TypeError(
                "activation must be an nn.ReLU, an nn.LeakyReLU whose slope is not negative, or None, got "
                f"{activation}"
            )
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.num_features = norm.num_features
        self.momentum = norm.momentum
        self.track_running_stats = norm.track_running_stats
        instance, self.dimensions = _KINDS[type(norm)]
        self.formula = Formula(instance, norm.eps, *known, activation_first)
        self.training = norm.training
        self._early: EarlyMask | None = None
        self._backends: dict[_Kind, str] = {}

    def apart(self) -> tuple[nn.Module, nn.Module | None]:
        """Make torch's own normalisation, which shares parameters and buffers, and its activation, if any."""
        options: dict[str, Any] = {"eps": self.eps, "momentum": self.momentum, "device": "meta"}
        options |= {"affine": self.weight is not None, "track_running_stats": self.track_running_stats}
        kinds = _INSTANCE_NORMS if self.formula.instance else _BATCH_NORMS
        norm = kinds[self.dimensions - 3](self.num_features, **options)
        for name in ("weight", "bias"):
            norm.register_parameter(name, getattr(self, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            norm.register_buffer(name, getattr(self, name))
        norm.train(self.training)
        if self.formula.activation == "none":
            return norm, None
        slope, is_relu = self.formula.slope, self.formula.activation == "relu"
        return norm, (nn.ReLU() if is_relu else nn.LeakyReLU(slope)).train(self.training)

    def take_mask(self, early: EarlyMask | None) -> None:
        """Let calls compute region sums under this mask, as `taps.mask` says; None ends that."""
        self.__dict__["_early"] = early  # nn.Module would look for a parameter of that name

    @property
    def eps(self) -> float:
        """ε, added to the variance."""
        return self.formula.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate [N, C, *S].

        Raises:
            ValueError: another number of dimensions or of channels, or a single value a channel in training.
        """
        if torch.compiler.is_compiling() or in_transform() or not may_call_directly((x,)):
            self._check(x)
            return self._plain(x)
        kept = self._kept()
        uses_input = self._uses_input(kept.running is not None)
        backend = self._backend(x, uses_input)
        kernels = norm_kernels_of(backend)
        if kernels is None or not kept.is_readable(x):
            return self._plain(x)
        given = None if uses_input or kept.running is None else torch.stack(kept.running).double()
        running = None
        if self.training:
            factor = self._count()
            if uses_input and self.track_running_stats and kept.running is not None:
                running = Running(*kept.running, factor)
        early = self._early
        weights_of = None if early is None else partial(early.weights_of, backend=backend)
        call = NormCall(kernels, self.formula, given, running, weights_of)
        return norm_act(call, x, kept.weight, kept.bias)

    def _kept(self) -> _Kept:
        # By attribute each would be looked up in Python; a parametrization puts its own in their place.
        parameters, buffers = self._parameters, self._buffers
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        mean, variance = buffers["running_mean"], buffers["running_var"]
        return _Kept(weight, bias, None if mean is None or variance is None else (mean, variance))

    def _backend(self, x: Tensor, uses_input: bool) -> str:
        """The backend for [N, C, *S], which is checked where none of its kind was seen before."""
        kind = x.shape, x.stride(), x.dtype, x.device, uses_input, selected()
        backend = self._backends.get(kind)
        if backend is None:
            self._check(x)
            if len(self._backends) == _MOST_KINDS:
                self._backends.clear()
            backend = self._backends[kind] = self._choose_backend(x, uses_input)
        return backend

    def _choose_backend(self, x: Tensor, uses_input: bool) -> str:
        """The reference where kernels do not take [N, C, *S], or torch would refuse it."""
        if not can_fuse(x):
            return "reference"
        if uses_input and x.numel() == x.shape[1] * (x.shape[0] if self.formula.instance else 1):
            return "reference"  # a single value, which torch refuses
        if x.device.type == "cuda" and x.numel() <= _FEW_ON_GPU and selected() == "auto":
            return "reference"
        return resolve("auto", x.device)

    def _uses_input(self, has_running: bool) -> bool:
        """Whether the statistics are those of the input."""
        return not has_running or (self.training and (not self.formula.instance or self.track_running_stats))

    def _check(self, x: Tensor) -> None:
        ranks = (2, 3) if self.dimensions == 3 else (self.dimensions,)
        unbatched = self.formula.instance and x.dim() == self.dimensions - 1
        if x.dim() not in ranks and not unbatched:
            raise ValueError(
                f"x must have {' or '.join(map(str, ranks))} dimensions, got shape {list(x.shape)}"
            )
        channels = x.shape[0] if unbatched else x.shape[1]
        if channels != self.num_features:
            raise ValueError(f"x must have {self.num_features} channels, got shape {list(x.shape)}")

    def _plain(self, x: Tensor) -> Tensor:
        """Run torch's own operations on [N, C, *S]."""
        value = self.formula.activate(x) if self.formula.activation_first else x
        use_input = self._uses_input(self.running_mean is not None)
        if self.formula.instance:
            momentum = 0.0 if self.momentum is None else self.momentum
            unbatched = value.dim() == self.dimensions - 1
            value = functional.instance_norm(
                value.unsqueeze(0) if unbatched else value,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                use_input,
                momentum,
                self.eps,
            )
            value = value.squeeze(0) if unbatched else value
        else:
            factor = self._count()
            updates = not self.training or self.track_running_stats
            value = functional.batch_norm(
                value,
                self.running_mean if updates else None,
                self.running_var if updates else None,
                self.weight,
                self.bias,
                use_input,
                factor,
                self.eps,
            )
        return value if self.formula.activation_first else self.formula.activate(value)

    def _count(self) -> float:
        """Count a batch where running statistics are updated; how much of the new ones they take."""
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and not self.formula.instance:
            tracked = self.num_batches_tracked
            if tracked is not None:
                tracked.add_(1)
                if self.momentum is None:
                    factor = 1.0 / float(tracked)
        return factor

    def extra_repr(self) -> str:
        """The settings that `print` shows."""
        kind = "InstanceNorm" if self.formula.instance else "BatchNorm"
        parts = [
            f"{kind}{self.dimensions - 2}d",
            str(self.num_features),
            f"eps={self.eps}",
            f"momentum={self.momentum}",
        ]
        if self.formula.activation != "none":
            order = ", activation_first=True" if self.formula.activation_first else ""
            slope = f", slope={self.formula.slope}" if self.formula.activation == "leaky_relu" else ""
            parts.append(f"activation={self.formula.activation}{slope}{order}")
        return ", ".join(parts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_early": None, "_backends": {}}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        """Read state dicts from before torch counted batches, too, as its batch norm does."""
        version = local_metadata.get("version")
        key = prefix + "num_batches_tracked"
        if (
            (version is None or version < 2)
            and self.num_batches_tracked is not None
            and key not in state_dict
        ):
            state_dict[key] = torch.zeros((), dtype=torch.long)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)
