"""Stage taps: the features of any network's submodules, by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fdkernels.layer_losses import FusedTap, Place

__all__ = ["FeatureTaps"]

# What wrappers put before the names of the network that they hold.
_WRAPPER_PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")


class FeatureTaps:
    """Keep what named submodules of a network put out, for the loss.

    ::

        with fdk.FeatureTaps(model, ["enc1", "enc2", "bottleneck"]) as taps:
            logits = model(images)
            loss = segmentation_loss(logits, mask) + crit(taps.features, mask)

    The features are the outputs themselves, not copies, and part of the graph. The network is not changed:
    leaving the block (or `close()`) takes the hooks away. Networks in DistributedDataParallel or
    torch.compile are tapped by the names that they had before.

    With `fused=True` and `crit(taps, mask)` (the taps themselves, not their features; likewise
    `feature_discrepancy_loss(taps, mask)`) the numbers are the same, and backward saves two transfers of
    every map: where the gradient of the network arrives at a tapped output, one pass reads it and writes its
    sum with the gradient of the loss, as `fdkernels.tap` does. The first such call on a forward pass is
    served so; further ones, calls inside torch.compile, and those with a mask that asks for a gradient take
    the features as they are. The layer after a tapped one must not change its input in place
    (`nn.ReLU(inplace=True)`): torch refuses it. Under torch.utils.checkpoint use `use_reentrant=False`; what
    is recomputed in backward is not tapped anew.

    Args:
        model: any network.
        names: submodule names as `model.named_modules()` has them, in the order that `features` keeps.
        fused: write the gradient of the loss where that of the network arrives.

    Attributes:
        names: the names, as a tuple.

    Raises:
        ValueError: no names, a name twice, or one that the network does not have.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, fused: bool = False) -> None:
        if isinstance(names, str):
            raise TypeError(f"names must be a sequence of submodule names, got the string {names!r}")
        self.names = tuple(names)
        if not self.names:
            raise ValueError("names must hold at least one submodule name, got none")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names must differ from one another, got {list(self.names)}")
        modules = _find(model, self.names)
        self._outputs: list[_Tapped | None] = [None] * len(self.names)
        self._handles = [
            module.register_forward_hook(_Keep(self._outputs, index, name, fused))
            for index, (name, module) in enumerate(zip(self.names, modules, strict=True))
        ]

    @property
    def features(self) -> list[Tensor]:
        """The features of the last forward pass, in the order of `names`.

        Raises:
            RuntimeError: a submodule has not run since the taps were set or cleared; or what it put out
                was written over since, as by the in-place activation behind it.
        """
        missing = [name for name, output in zip(self.names, self._outputs, strict=True) if output is None]
        if missing:
            raise RuntimeError(f"features are there after a forward pass; not run yet: {missing}")
        for name, output in zip(self.names, self._outputs, strict=True):
            if output is not None and output.version not in (None, _version(output.features)):
                raise RuntimeError(
                    f"features of {name!r} were written over in place after they were put out; tap the "
                    "module that wrote (such as an in-place activation), or make it not work in place"
                )
        return [output.features for output in self._outputs if output is not None]

    def take_stand_ins(self) -> tuple[list[Tensor | None], list[Place | None]] | None:
        """What carries the gradient of a loss to the fused taps, once for a forward pass; None if it cannot.

        Raises:
            RuntimeError: features were computed without the gradients that others have.
        """
        outputs = [output for output in self._outputs if output is not None]
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        if all(output.stand_in is None for output in outputs):
            return None
        for index, (name, output) in enumerate(zip(self.names, outputs, strict=True)):
            if output.without_grad:
                raise RuntimeError(
                    f"the features of {name!r} were computed without gradients, those of other taps with; "
                    "under torch.utils.checkpoint use use_reentrant=False"
                )
            if output.stand_in is None and output.features.requires_grad:
                return None
            self._outputs[index] = output._replace(stand_in=None, place=None)
        return [output.stand_in for output in outputs], [output.place for output in outputs]

    def clear(self) -> None:
        """Let go of the kept features."""
        self._outputs[:] = [None] * len(self.names)

    def close(self) -> None:
        """Take the hooks away; the kept features stay readable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> FeatureTaps:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Tapped(NamedTuple):
    """The output of a tapped submodule, and under `fused` what belongs to it.

    Attributes:
        features: the output, as the rest of the network has it.
        stand_in, place: as `fdkernels.layer_losses.FusedTap` makes and takes them.
        version: how often it had been written to when the submodule put it out; None if unknown.
        without_grad: whether it was computed in a block without gradients.
    """

    features: Tensor
    stand_in: Tensor | None = None
    place: Place | None = None
    version: int | None = None
    without_grad: bool = False


class _Keep:
    """The hook of one tap."""

    def __init__(self, outputs: list[_Tapped | None], index: int, name: str, fused: bool) -> None:
        self.outputs = outputs
        self.index = index
        self.name = name
        self.fused = fused

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"a tapped submodule must put out one tensor, got {type(output).__name__} from {self.name!r}"
            )
        if not torch.compiler.is_compiling() and _in_backward():
            return None
        # In a compiled graph the compiler fuses, or not; there are no autograd nodes of ours.
        if not self.fused or not output.requires_grad or torch.compiler.is_compiling():
            without_grad = not torch.is_grad_enabled()
            self.outputs[self.index] = _Tapped(output, None, None, _version(output), without_grad)
            return None
        place = Place()
        features, stand_in = FusedTap.apply(output, place)
        self.outputs[self.index] = _Tapped(features, stand_in, place, _version(features))
        tapped: Tensor = features
        return tapped


def _version(output: Tensor) -> int | None:
    """How often the tensor was written to; None where torch does not count that."""
    if torch.compiler.is_compiling() or output.is_inference():
        return None
    return output._version  # noqa: SLF001 (public in the documentation of autograd, but for its name)


def _in_backward() -> bool:
    """Whether autograd is running: a submodule then computes what torch.utils.checkpoint did not keep."""
    running: int = torch._C._current_graph_task_id()  # noqa: SLF001 - torch's only name for it
    return running != -1


def _find(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    modules = dict(model.named_modules())
    for prefix in _WRAPPER_PREFIXES:
        if all(prefix + name in modules for name in names):
            return [modules[prefix + name] for name in names]
    unknown = next(name for name in names if name not in modules)
    similar = difflib.get_close_matches(unknown, modules, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(map(repr, similar))}?" if similar else ""
    raise ValueError(
        f"names must be submodules of {type(model).__name__}, got {unknown!r}, which it does not have{hint}"
    )
