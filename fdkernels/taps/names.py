"""Finds what names stand for by the network's own names, and the in-place modules beside it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeGuard

from torch import nn

# What torch.compile, FSDP and checkpoint_wrapper put between a module and its name.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def own_name(path: str) -> str:
    """Leave out of a path what wrappers add, also the `module.` of DataParallel and its kin in front."""
    parts = [part for part in path.split(".") if part not in _WRAPPERS]
    while parts[:1] == ["module"]:
        del parts[0]
    return ".".join(parts)


class Place(NamedTuple):
    """Where a tapped tensor is.

    Attributes:
        name: as the user gave it, such as `"encoder.out:1"`.
        path: of the submodule, as `named_modules` has it.
        keys: that lead to the tensor in what the submodule returns; none for the output itself.
    """

    name: str
    path: str
    keys: tuple[str, ...]


def find(model: nn.Module, names: Sequence[str]) -> tuple[dict[str, nn.Module], list[Place]]:
    """Return all modules of the network by path, and the place of each name.

    Raises:
        ValueError: the network does not have a submodule of one of the names, or a name ends with its colon.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    parts = [_split(name, modules) for name in names]
    if all(submodule in modules for submodule, _ in parts):
        return modules, [Place(name, *each) for name, each in zip(names, parts, strict=True)]
    paths: dict[str, str] = {}
    for path in modules:
        paths.setdefault(own_name(path), path)  # the wrapper comes before what it wraps
    for name, (submodule, _) in zip(names, parts, strict=True):
        if own_name(submodule) not in paths:
            raise ValueError(
                f"names must be submodules of {type(model).__name__}, got {name!r}, which it does not have"
                + _did_you_mean(submodule, paths, modules)
            )
    return modules, [
        Place(name, paths[own_name(submodule)], keys)
        for name, (submodule, keys) in zip(names, parts, strict=True)
    ]


def _split(name: str, modules: Mapping[str, nn.Module]) -> tuple[str, tuple[str, ...]]:
    """The submodule of a name, and the keys behind its colon."""
    if name in modules:
        return name, ()
    submodule, colon, keys = name.partition(":")
    if colon and not keys:
        raise ValueError(
            f"names must name a tensor behind the colon, or have none: {name!r} ends with it, "
            f"take {submodule!r} or, say, '{submodule}:0'"
        )
    return submodule, tuple(keys.split(".")) if keys else ()


def _did_you_mean(unknown: str, paths: Mapping[str, str], modules: Mapping[str, nn.Module]) -> str:
    similar: list[str] = []
    for name in difflib.get_close_matches(unknown, paths, n=3, cutoff=0.5):
        # What has an in-place activation behind it cannot be tapped, the activation can.
        similar += [name, *map(own_name, in_place_beside(modules, paths[name])[:1])]
    return f"; did you mean {', '.join(map(repr, dict.fromkeys(similar)))}?" if similar else ""


def is_chain(module: nn.Module | None) -> TypeGuard[nn.Sequential]:
    """Whether it calls its children one after the other, and nothing else: no forward of its own."""
    if not isinstance(module, nn.Sequential) or "forward" in vars(module):
        return False
    return type(module).forward is nn.Sequential.forward


def last_of(module: nn.Module) -> nn.Module:
    """The module whose output is that of a chain, followed into its last; any other is its own."""
    while is_chain(module):
        children = [child for child in module if not isinstance(child, nn.Identity)]
        if not children:
            break
        module = children[-1]
    return module


def in_place_beside(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """Return the paths of the siblings that work in place, those first that most likely follow."""
    parent = path.rpartition(".")[0]
    siblings = _children(modules, parent)
    place = siblings.index(path)
    found = []
    for sibling in [*siblings[place + 1 :], *siblings[:place]]:
        first = sibling
        while isinstance(modules[first], nn.Sequential) and len(modules[first]):  # type: ignore[arg-type]
            first = _children(modules, first)[0]
        if getattr(modules[first], "inplace", False):
            found.append(first)
    # bn2 goes with act2 where both bn1 and bn2 come before both act1 and act2.
    return sorted(found, key=lambda name: _last_digits(name) != _last_digits(path))


def in_place_around(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """Return the siblings of the module and of what holds it that work in place, the nearest first."""
    found = []
    while path:
        found += in_place_beside(modules, path)
        path = path.rpartition(".")[0]
    return found


def _children(modules: Mapping[str, nn.Module], parent: str) -> list[str]:
    return [path for path in modules if path and path.rpartition(".")[0] == parent]


def _last_digits(name: str) -> str:
    return name[len(name.rstrip("0123456789")) :]
