"""Count what Triton's interpreter is asked to launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def recorded_launches() -> Iterator[list[str]]:
    """The names of the kernels that are launched inside, in their order."""
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
