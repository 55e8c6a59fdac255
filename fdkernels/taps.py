"""Records the features of any network's submodules, by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fdkernels.op.autograd import Tap, TapSlot

__all__ = ["FeatureTaps"]

# Prefixes that wrappers add to submodule names.
_WRAPPER_PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")


class FeatureTaps:
    """Record the outputs of named submodules for the loss.

    ::

        with fdk.FeatureTaps(model, ["enc1", "enc2", "bottleneck"]) as taps:
            logits = model(images)
            loss = segmentation_loss(logits, mask) + crit(taps.features, mask)

    The features are the outputs themselves, not copies, and part of the graph. The network is not changed:
    leaving the block (or `close()`) removes the hooks. Use the network's own submodule names, also for one
    wrapped by DistributedDataParallel or torch.compile.

    With `fused=True` pass the taps themselves, `crit(taps, mask)` or `feature_discrepancy_loss(taps,
    mask)`, not their features. The numbers are the same, and backward saves two transfers of each map: one
    pass reads the upstream gradient of a tapped output and writes its sum with the loss's gradient, as
    `fdkernels.tap` does. This serves the first such call of a forward pass; later calls, calls inside
    torch.compile, and calls with a mask that requires a gradient use the features instead. The layer after
    a tapped one must not modify its input in place (`nn.ReLU(inplace=True)`): torch refuses it. Under
    torch.utils.checkpoint set `use_reentrant=False`; modules that are recomputed in backward are not
    recorded again.

    Args:
        model: any network.
        names: submodule names as in `model.named_modules()`; `features` keeps their order.
        fused: add the upstream gradient in the backward pass of the loss.

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
        """The features of the last forward pass, [N, C, *S] each, in the order of `names`.

        Raises:
            RuntimeError: a submodule has not run since the taps were set or cleared, or its output has been
                modified in place since, as by the in-place activation that follows it.
        """
        missing = [name for name, output in zip(self.names, self._outputs, strict=True) if output is None]
        if missing:
            raise RuntimeError(f"run the network before reading features; not run yet: {missing}")
        for name, output in zip(self.names, self._outputs, strict=True):
            if output is not None and output.version not in (None, _version(output.features)):
                raise RuntimeError(
                    f"the output of {name!r} was modified in place after it was recorded; tap the module "
                    "that modified it (such as an in-place activation), or set inplace=False"
                )
        return [output.features for output in self._outputs if output is not None]

    def take_placeholders(self) -> tuple[Any, ...] | None:
        """The slots and the placeholders of the fused taps as `FromTaps` takes them, once a forward pass.

        Returns:
            A list of slots, followed by the placeholders [2, N, C_l]; None where the loss takes the features
            themselves.

        Raises:
            RuntimeError: some features were computed without gradients, others with.
        """
        outputs = [output for output in self._outputs if output is not None]
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        if all(output.placeholder is None for output in outputs):
            return None
        for index, (name, output) in enumerate(zip(self.names, outputs, strict=True)):
            if output.without_grad:
                raise RuntimeError(
                    f"the features of {name!r} were computed without gradients, those of other taps with; "
                    "under torch.utils.checkpoint set use_reentrant=False"
                )
            if output.placeholder is None and output.features.requires_grad:
                return None
            self._outputs[index] = output._replace(placeholder=None, slot=None)
        return [output.slot for output in outputs], *(output.placeholder for output in outputs)

    def clear(self) -> None:
        """Drop the recorded features."""
        self._outputs[:] = [None] * len(self.names)

    def close(self) -> None:
        """Remove the hooks; the recorded features stay readable."""
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
        placeholder, slot: as `fdkernels.op.autograd.Tap` returns and takes them.
        version: how often it had been modified in place when it was recorded; None if unknown.
        without_grad: whether it was computed in a block without gradients.
    """

    features: Tensor
    placeholder: Tensor | None = None
    slot: TapSlot | None = None
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
                f"a tapped submodule must return one tensor, got {type(output).__name__} from {self.name!r}"
            )
        if not torch.compiler.is_compiling() and _in_backward():
            return None
        # In a compiled graph the compiler fuses, or not; there are no autograd nodes of ours.
        if not self.fused or not output.requires_grad or torch.compiler.is_compiling():
            without_grad = not torch.is_grad_enabled()
            self.outputs[self.index] = _Tapped(output, None, None, _version(output), without_grad)
            return None
        slot = TapSlot()
        features, placeholder = Tap.apply(output, slot)
        self.outputs[self.index] = _Tapped(features, placeholder, slot, _version(features))
        tapped: Tensor = features
        return tapped


def _version(output: Tensor) -> int | None:
    """How often the tensor was modified in place; None where torch does not count that."""
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
