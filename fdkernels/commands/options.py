"""What the commands share: a refused field is named as the option that sets it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fdkernels.segmentation.fields import FieldError


@contextmanager
def options_named() -> Iterator[None]:
    """Name the option, such as --size, where the command or block refuses the value of a field.

    Raises:
        ValueError: in place of a `FieldError`.
    """
    try:
        yield
    except FieldError as error:
        raise ValueError(f"--{error.field.replace('_', '-')} {error.says}") from error


__all__ = ["options_named"]
