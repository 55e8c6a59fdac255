"""Finds tensors in what a module returns, by paths such as `features.2`, and puts others in their place.

A module may return a tuple, list, mapping, named tuple or dataclass, or any object with attributes, and these
inside one another. A path joins keys, indices and attributes by dots.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

__all__ = ["pick", "replaced", "tensors_in"]

# So many tensors, or keys, an error names.
_MOST = 20


def pick(output: Any, keys: tuple[str, ...], name: str) -> Tensor:
    """Return the tensor, of any shape, to which the keys lead.

    Args:
        output: what the module returned.
        keys: the path, split at its dots; none for the output itself.
        name: of the tap, for the sentence.

    Raises:
        ValueError: the output, or a part of it, does not have one of the keys.
        TypeError: the keys lead to something else than a tensor.
    """
    here = output
    while keys:
        key, keys = _next_key(here, keys, name)
        here = _child(here, key)
    if isinstance(here, Tensor):
        return here
    below = name if name.rpartition(":")[1] else f"{name}:"
    within = [
        f"'{below}{'' if below.endswith(':') else '.'}{path}' {list(tensor.shape)}"
        for path, tensor in tensors_in(here)
    ]
    if not within:
        instead = "no tensor was found in it"
    else:
        more = f" and {len(within) - _MOST} more" if len(within) > _MOST else ""
        instead = f"name one of its tensors: {', '.join(within[:_MOST])}{more}"
    raise TypeError(
        f"a tapped submodule must return one tensor, got {type(here).__name__} from {name!r}; {instead}"
    )


def replaced(output: Any, keys: tuple[str, ...], tensor: Tensor) -> Any:
    """Copy a structure with the given tensor, of any shape, where `pick` found one.

    Returns:
        A structure of the same types that shares all other parts with `output`; None where a structure on
        the way is none of tuple, list, dict, named tuple and dataclass, so that it cannot be rebuilt.
    """
    if not keys:
        return tensor
    key, rest = _next_key(output, keys, "")
    part = replaced(_child(output, key), rest, tensor)
    return None if part is None else _with_child(output, key, part)


def tensors_in(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the path and the tensor, of any shape, of all tensors of a structure, in its order.

    What two paths share is listed under the first; an object may even refer to what holds it.
    """
    return _tensors_in(output, {})


def _tensors_in(output: Any, seen: dict[int, Any]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield "", output
        return
    if id(output) in seen:
        return
    seen[id(output)] = output  # alive, so that no other object gets its id
    for key in _keys_of(output):
        for path, tensor in _tensors_in(_child(output, key), seen):
            yield f"{_written(output, key)}.{path}" if path else _written(output, key), tensor


def _keys_of(structure: Any) -> list[Any]:
    """The keys of a mapping, the indices of a sequence, or the names of attributes."""
    if isinstance(structure, Mapping):
        return list(structure)
    if isinstance(structure, (tuple, list)):
        return list(range(len(structure)))
    if isinstance(structure, (nn.Module, type, types.ModuleType)):
        return []
    if fields := _dataclass_fields(structure):
        return [field for field in fields if hasattr(structure, field)]
    return [key for key in getattr(structure, "__dict__", ()) if not key.startswith("_")]


def _written(structure: Any, key: Any) -> str:
    """The key as a path names it."""
    fields = getattr(structure, "_fields", ()) if isinstance(structure, tuple) else ()
    return str(fields[key] if fields else key)


def _next_key(structure: Any, keys: tuple[str, ...], name: str) -> tuple[Any, tuple[str, ...]]:
    """Return the key of the structure that the path begins with, and the rest of the path."""
    first = keys[0]
    if isinstance(structure, Mapping):
        # A key may hold dots, as a submodule's name does, or be an integer.
        for count in range(len(keys), 0, -1):
            joined = ".".join(keys[:count])
            for key in structure:
                if key == joined or (count == 1 and str(key) == joined):
                    return key, keys[count:]
    elif isinstance(structure, (tuple, list)):
        fields = getattr(structure, "_fields", ())
        if first in fields:
            return fields.index(first), keys[1:]
        digits = first.removeprefix("-")
        if digits.isdecimal() and -len(structure) <= int(first) < len(structure):
            return int(first), keys[1:]
    elif not isinstance(structure, Tensor) and hasattr(structure, first):
        return first, keys[1:]
    raise ValueError(_describe_missing(structure, first, name))


def _describe_missing(structure: Any, key: str, name: str) -> str:
    if isinstance(structure, Tensor):
        has = "it is a tensor itself"
    else:
        known = [repr(_written(structure, known)) for known in _keys_of(structure)]
        more = f" and {len(known) - _MOST} more" if len(known) > _MOST else ""
        has = f"it has {', '.join(known[:_MOST])}{more}" if known else "it holds nothing"
    return (
        f"names must lead to a tensor, but {name!r} does not: the {type(structure).__name__} that the "
        f"submodule returns there has no {key!r}; {has}"
    )


def _child(structure: Any, key: Any) -> Any:
    return structure[key] if isinstance(structure, (Mapping, tuple, list)) else getattr(structure, key)


def _with_child(structure: Any, key: Any, child: Any) -> Any:
    """A copy of the structure with another child; None where its type does not say how to make one."""
    if isinstance(structure, tuple):
        fields = getattr(structure, "_fields", None)
        if fields is not None and hasattr(structure, "_replace"):
            return structure._replace(**{fields[key]: child})
        if type(structure) is not tuple:
            return None
        return tuple(child if index == key % len(structure) else own for index, own in enumerate(structure))
    if not isinstance(structure, (list, MutableMapping)) and key not in _dataclass_fields(structure):
        return None
    twin: Any = copy.copy(structure)
    if isinstance(structure, (list, MutableMapping)):
        twin[key] = child
    else:
        object.__setattr__(twin, key, child)  # as frozen ones allow it
    return twin


def _dataclass_fields(structure: Any) -> list[str]:
    if not dataclasses.is_dataclass(structure) or isinstance(structure, type):
        return []
    return [field.name for field in dataclasses.fields(structure)]
