"""Stage taps: the features of any network's submodules, by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

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

    Args:
        model: any network.
        names: submodule names as `model.named_modules()` has them, in the order that `features` keeps.

    Attributes:
        names: the names, as a tuple.

    Raises:
        ValueError: no names, a name twice, or one that the network does not have.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        if isinstance(names, str):
            raise TypeError(f"names must be a sequence of submodule names, got the string {names!r}")
        self.names = tuple(names)
        if not self.names:
            raise ValueError("names must hold at least one submodule name, got none")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names must differ from one another, got {list(self.names)}")
        modules = _find(model, self.names)
        self._outputs: list[Tensor | None] = [None] * len(self.names)
        self._versions: list[int | None] = [None] * len(self.names)
        self._handles = [
            module.register_forward_hook(_Keep(self._outputs, self._versions, index, name))
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
        for name, output, version in zip(self.names, self._outputs, self._versions, strict=True):
            if output is not None and version not in (None, _version(output)):
                raise RuntimeError(
                    f"features of {name!r} were written over in place after they were put out; tap the "
                    "module that wrote (such as an in-place activation), or make it not work in place"
                )
        return [output for output in self._outputs if output is not None]

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


class _Keep:
    """The hook of one tap."""

    def __init__(
        self, outputs: list[Tensor | None], versions: list[int | None], index: int, name: str
    ) -> None:
        self.outputs = outputs
        self.versions = versions
        self.index = index
        self.name = name

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"a tapped submodule must put out one tensor, got {type(output).__name__} from {self.name!r}"
            )
        self.outputs[self.index] = output
        self.versions[self.index] = _version(output)


def _version(output: Tensor) -> int | None:
    """How often the tensor was written to; None where torch does not count that."""
    if torch.compiler.is_compiling() or output.is_inference():
        return None
    return output._version  # noqa: SLF001 (public in the documentation of autograd, but for its name)


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
