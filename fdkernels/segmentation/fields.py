"""Fields of a dataclass that say what they may hold: the help of an option and the check of its value."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

# A value is shown up to this length: a file may hold anything.
_LONGEST_SHOWN = 60


class FieldError(ValueError):
    """A value that its field cannot hold.

    Attributes:
        field: its name.
        says: the sentence without it: "must be an integer from 1 to 4096, got 0".
    """

    def __init__(self, field: str, says: str) -> None:
        super().__init__(f"{field} {says}")
        self.field = field
        self.says = says


@dataclass(frozen=True)
class Limits:
    """What a field may hold besides None, beyond its type.

    Attributes:
        at_least, at_most: bounds of a number, both inclusive; they are given together.
        above: a lower bound of a number, exclusive; it takes the place of `at_least`.
        multiple_of: of which a number must be a multiple.
        choices: all values there are.
        pattern: a regular expression that a text must match whole.
        meaning: what such a text is, "a name of letters and digits".
    """

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    multiple_of: int | None = None
    choices: tuple[Any, ...] = ()
    pattern: str | None = None
    meaning: str = ""

    def allow(self, value: Any) -> bool:
        """Whether a value of the right type is within the limits; NaN is within no bound."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.multiple_of is None or value % self.multiple_of == 0)
            and (not self.choices or value in self.choices)
            and (self.pattern is None or re.fullmatch(self.pattern, value) is not None)
        )

    def sentence(self, kind: type) -> str:
        """Say what the field may hold: "an integer from 1 to 4096"."""
        if self.choices:
            return one_of(str(choice) for choice in self.choices)
        if self.meaning:
            return self.meaning
        noun = {int: "an integer", float: "a number", bool: "True or False", str: "a text"}[kind]
        if self.multiple_of is not None:
            noun = f"a multiple of {self.multiple_of}"
        if self.above is not None:
            return f"{noun} above {self.above} and at most {self.at_most}"
        return noun if self.at_least is None else f"{noun} from {self.at_least} to {self.at_most}"

    def nearest(self, value: Any) -> str:
        """Say which multiples are next to a number, where that is what it lacks: "; try 240 or 256"."""
        step = self.multiple_of
        if step is None or isinstance(value, bool) or not isinstance(value, int) or value % step == 0:
            return ""
        near = [one for one in (value // step * step, (value // step + 1) * step) if self.allow(one)]
        return f"; try {one_of(map(str, near))}" if near else ""


def one_of(names: Iterable[str]) -> str:
    """List names in a sentence: "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def option(text: str, default: Any = dataclasses.MISSING, *, shown: str | None = None, **limits: Any) -> Any:
    """Declare a field with its meaning, which is also the help of its option on the command line.

    Args:
        text: the meaning, one clause.
        default: of the field; without one it must be given.
        shown: what the help shows in place of the default None.
        limits: of `Limits`.
    """
    return dataclasses.field(
        default=default, metadata={"help": text, "shown": shown, "limits": Limits(**limits)}
    )


def check_fields(instance: Any) -> None:
    """Check every field of a dataclass made of `option`s against its type and its limits.

    Raises:
        FieldError: names the first field whose value is not allowed.
    """
    for field in dataclasses.fields(instance):
        check_field(type(instance), field.name, getattr(instance, field.name))


def check_field(owner: type, name: str, value: Any) -> None:
    """Check one value against the type and the limits of a field.

    Raises:
        FieldError: the value is not allowed.
    """
    limits: Limits = owner.__dataclass_fields__[name].metadata["limits"]  # type: ignore[attr-defined]
    kinds = _kinds(owner)[name]
    # An integer is as good as a number with a fraction; True is an int to Python, but not here.
    fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
    fits = fits and (bool in kinds or not isinstance(value, bool))
    if (value is None and type(None) in kinds) or (fits and limits.allow(value)):
        return
    expected = limits.sentence(kinds[0])
    raise FieldError(name, f"must be {expected}, got {_shown(value)}{limits.nearest(value)}")


@cache
def _kinds(owner: type) -> dict[str, tuple[type, ...]]:
    """Take the types of each field, without the bar between them, from the hints of a dataclass."""
    hints = get_type_hints(owner)
    return {
        name: get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        for name, hint in hints.items()
    }


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 1] + "…"


__all__ = ["FieldError", "Limits", "check_field", "check_fields", "one_of", "option"]
