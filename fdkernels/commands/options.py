"""What the commands share: options made of the fields of a run, and a refused field named as its option."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.fields import FieldError

# Where an option differs from its field: in type or default.
_TYPES: dict[str, Any] = {"output": Path, "data": Path | None, "novel_data": Path | None, "fold": str | None}
_DEFAULTS: dict[str, Any] = {"data": None, "dataset": "tnbc"}


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


def field_options(without: Collection[str] = ()) -> list[inspect.Parameter]:
    """Make an option of each field of `TrainingConfig`.

    Args:
        without: fields that are left out.
    """
    hints = get_type_hints(TrainingConfig)
    return [
        _option(field, hints[field.name])
        for field in dataclasses.fields(TrainingConfig)
        if field.name not in without
    ]


def _option(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """Make the option of a field: its name, type, default and help."""
    name, shown = field.name, field.metadata["shown"]
    kind = _TYPES.get(name, hint)
    default = _DEFAULTS.get(name, field.default)
    switch = name.replace("_", "-")
    names: list[str] = []
    if kind in (bool, bool | None):
        names.append(f"--{switch}" if default is False else f"--{switch}/--no-{switch}")
    info = typer.Option(*names, help=field.metadata["help"], show_default=True if shown is None else shown)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
        annotation=Annotated[kind, info],
    )


def as_field(name: str, value: Any) -> Any:
    """Convert the value of an option to that of its field."""
    if isinstance(value, Path):
        return str(value)
    return int(value) if name == "fold" and value is not None and value.isdecimal() else value


def was_given(context: typer.Context, name: str) -> bool:
    """Tell whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


__all__ = ["as_field", "field_options", "options_named", "was_given"]
