"""Count what runs: the functions of a backend, registered ops, and launches of Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from fdkernels.op import kernels


@contextmanager
def recorded_launches() -> Iterator[list[str]]:
    """The names of the Triton kernels that are launched inside, in their order."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__
    names: list[str] = []

    def record(self: Any, *arguments: Any, **constants: Any) -> Any:
        names.append(self.fn.__name__)
        return launch(self, *arguments, **constants)

    GridExecutor.__call__ = record
    try:
        yield names
    finally:
        GridExecutor.__call__ = launch


class _Recorder:
    """A backend that notes which of its functions are called, with which arguments, and what they return."""

    def __init__(self, backend: kernels.Kernels) -> None:
        self.backend = backend
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.backend, name)

        def record(*arguments: Any) -> Any:
            result = function(*arguments)
            self.calls.append((name, arguments, result))
            return result

        return record

    @property
    def names(self) -> list[str]:
        """The functions that were called, in their order."""
        return [name for name, _, _ in self.calls]

    def take(self) -> list[str]:
        """The names of the calls since the last of this."""
        names = self.names
        self.calls.clear()
        return names


@contextmanager
def recorded_calls(name: str) -> Iterator[_Recorder]:
    """The calls of the functions of a backend inside; a call of another backend fails."""
    recorder = _Recorder(kernels.kernels_of(name))
    before = dict(kernels._kernels)
    kernels._kernels.update({**dict.fromkeys(kernels._IMPORTS), name: recorder})
    try:
        yield recorder
    finally:
        kernels._kernels.clear()
        kernels._kernels.update(before)


class RecordedOps(TorchDispatchMode):
    """The registered ops of the package that run inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fdkernels":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
