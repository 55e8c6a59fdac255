"""Puts `NormAct` in the place of normalisations and their activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fdkernels.norms.module import NormAct, activation_of, is_norm
from fdkernels.taps.names import find, is_chain

__all__ = ["fuse_norms", "unfuse_norms"]

# What a report on a whole network names, whether it can be fused or not.
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, NormAct)


def fuse_norms(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, str]:
    """Replace each normalisation with its activation in the network by one `NormAct`, in place.

    ::

        report = fdk.fuse_norms(model)
        # {"enc1.1": "fused: BatchNorm2d + ReLU", "head.norm": "left alone: ..."}

    A pair is fused where it stands in an `nn.Sequential` without a forward of its own, so that it is known
    what follows what: a BatchNorm or InstanceNorm with a ReLU or LeakyReLU behind or before it, or neither.
    Of a tapped block that ends in such a pair the loss's sums and gradient come from the passes of the
    normalisation. Code that reads what stands between the two modules finds it activated.

    Parameters and buffers are shared under their names: `state_dict()`, optimizers and checkpoints, earlier
    ones too, stay as they are. The activation's place is taken by an `nn.Identity`. Fuse before torch.compile
    and after `SyncBatchNorm.convert_sync_batchnorm`, which does not know `NormAct`. Neither do
    `torch.optim.swa_utils.update_bn` and exporters that look for a BatchNorm: call `unfuse_norms` before.

    Args:
        model: any network.
        names: to fuse in these places alone: each a block that is an `nn.Sequential`, in which all pairs are
            fused, or a normalisation or activation in one. None fuses the whole network.

    Returns:
        By name what it ends in and was fused, or why it was left alone; without names, by the path of each
        normalisation.

    Raises:
        ValueError: the network has no submodule of a name.
        TypeError: names is a string.
    """
    if isinstance(names, str):
        raise TypeError(f"names must be a sequence of submodule names, got the string {names!r}")
    if names is None:
        return _fuse_all(dict(model.named_modules(remove_duplicate=False)))
    modules, places = find(model, tuple(names))
    shared = _shared(_places_of(modules))
    return {name: _fuse(modules, place.path, shared) for name, place in zip(names, places, strict=True)}


def unfuse_norms(model: nn.Module) -> dict[str, str]:
    """Put torch's own normalisation and activation back in the place of each `NormAct`, in place.

    ::

        average = torch.optim.swa_utils.AveragedModel(model)
        fdk.unfuse_norms(average)
        torch.optim.swa_utils.update_bn(loader, average)

    For code that looks for a BatchNorm: `update_bn`, `SyncBatchNorm.convert_sync_batchnorm`, exporters.
    Parameters and buffers are shared under their names, as by `fuse_norms`, which may follow again. An
    activation takes the place of the `nn.Identity` beside it.

    Args:
        model: any network.

    Returns:
        By the path of each `NormAct` what took its place, or why it was left alone.
    """
    report = {}
    for path, parent in list(model.named_modules()):
        for name, child in list(parent._modules.items()):  # noqa: SLF001 -- named_children leaves out repeated ones
            if isinstance(child, NormAct):
                report[f"{path}.{name}" if path else name] = _unfuse(parent, name, child)
    return report


def _unfuse(parent: nn.Module, name: str, fused: NormAct) -> str:
    """Put the pair of a child back; say what was done."""
    if _has_hooks(fused):
        return "left alone: it has hooks, which would not run"
    norm, activation = fused.apart()
    activation_first = fused.formula.activation_first
    if activation is not None:
        place = _identity_beside(parent, name, activation_first)
        if place is None:
            kind = type(activation).__name__
            return f"left alone: no nn.Identity stands beside it in an nn.Sequential, to become its {kind}"
        setattr(parent, place, activation)
    setattr(parent, name, norm)
    return f"unfused: {_kinds_of(norm, activation, activation_first)}"


def _identity_beside(parent: nn.Module, name: str, before: bool) -> str | None:
    """The name of the nn.Identity that runs next before, or behind, a child of a chain."""
    if not is_chain(parent):
        return None
    names = [*parent._modules]  # noqa: SLF001
    place = names.index(name) + (-1 if before else 1)
    beside = 0 <= place < len(names) and isinstance(parent[place], nn.Identity)
    return names[place] if beside else None


def _fuse_all(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Fuse what stands in a chain; say what was done, by the path of each normalisation."""
    places = _places_of(modules)
    shared = _shared(places)
    report = {}
    for module, paths in places.items():
        if isinstance(module, _NORMS):
            in_chains = [path for path in paths if is_chain(modules.get(_parent_of(path)))]
            for path in in_chains or paths[:1]:
                report[path] = _fuse(modules, path, shared)
    return report


def _parent_of(path: str) -> str:
    return path.rpartition(".")[0]


def _places_of(modules: dict[str, nn.Module]) -> dict[nn.Module, list[str]]:
    """The paths of each module; one of those that lead to the same child of the same module."""
    places: dict[nn.Module, dict[tuple[nn.Module, str], str]] = {}
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        places.setdefault(module, {}).setdefault((modules[parent], name), path)
    return {module: list(paths.values()) for module, paths in places.items()}


def _shared(places: dict[nn.Module, list[str]]) -> set[nn.Module]:
    """The modules with buffers that stand in several places: moved to a device they would share no more."""
    return {
        module
        for module, paths in places.items()
        if len(paths) > 1 and next(module.buffers(recurse=False), None) is not None
    }


def _kinds_of(norm: nn.Module, activation: nn.Module | None, activation_first: bool) -> str:
    """A normalisation and its activation, if any, by their classes, in their order."""
    pair = [norm] if activation is None else [activation, norm] if activation_first else [norm, activation]
    return " + ".join(type(module).__name__ for module in pair)


class _Pair(NamedTuple):
    """Where a normalisation and its activation stand in their nn.Sequential.

    Attributes:
        parent: the nn.Sequential.
        norm: the place of the normalisation.
        activation: that of the activation, or None.
        activation_first: whether it comes before the normalisation.
    """

    parent: nn.Sequential
    norm: int
    activation: int | None
    activation_first: bool

    @property
    def kinds(self) -> str:
        """Both by their classes, in their order."""
        activation = None if self.activation is None else self.parent[self.activation]
        return _kinds_of(self.parent[self.norm], activation, self.activation_first)

    def fuse(self) -> None:
        """Replace both."""
        activation = None if self.activation is None else self.parent[self.activation]
        self.parent[self.norm] = NormAct(self.parent[self.norm], activation, self.activation_first)
        if self.activation is not None:
            self.parent[self.activation] = nn.Identity()


def _fuse(modules: dict[str, nn.Module], path: str, shared: set[nn.Module]) -> str:
    """Fuse a block; say what was done."""
    block = modules[path]
    kind = type(block).__name__
    if is_chain(block):
        found = _pair_at_end(block, shared)
    elif isinstance(block, nn.Sequential):
        found = f"{kind} has a forward of its own, so what it ends in is not known"
    elif is_norm(block) or activation_of(block) is not None:
        parent = modules.get(_parent_of(path))
        if is_chain(parent):
            found = _pair_at(parent, [*parent].index(block), shared)
        elif isinstance(parent, nn.Sequential):
            found = f"{type(parent).__name__} has a forward of its own, so what follows {kind} is not known"
        else:
            found = f"{kind} stands in no nn.Sequential, so what stands beside it is not known"
    elif isinstance(block, NormAct):
        found = "it is fused already"
    elif isinstance(block, _NORMS):
        found = f"{kind} is no BatchNorm or InstanceNorm of 1 to 3 dimensions"
    else:
        found = f"{kind} is no nn.Sequential, so what it ends in is not known"
    if isinstance(found, str):
        return f"left alone: {found}"
    kinds = found.kinds
    if is_chain(block):
        _fuse_inside(block, shared)
    else:
        found.fuse()
    return f"fused: {kinds}"


def _fuse_inside(block: nn.Sequential, shared: set[nn.Module]) -> None:
    """Fuse all pairs of a block, the last first: an activation between two norms belongs to the first."""
    for at in reversed(range(len(block))):
        child = block[at]
        if is_chain(child):
            _fuse_inside(child, shared)
        elif is_norm(child) or _is_activation(child):
            found = _pair_at(block, at, shared)
            if isinstance(found, _Pair):
                found.fuse()


def _pair_at_end(block: nn.Sequential, shared: set[nn.Module]) -> _Pair | str:
    """The pair that ends a block, or what ends it instead."""
    places = [at for at, child in enumerate(block) if not isinstance(child, nn.Identity)]
    if not places:
        return "it holds no module"
    last = block[places[-1]]
    if is_chain(last):
        return _pair_at_end(last, shared)
    return "it is fused already" if isinstance(last, NormAct) else _pair_at(block, places[-1], shared)


def _pair_at(parent: nn.Sequential, at: int, shared: set[nn.Module]) -> _Pair | str:
    """The pair of the normalisation or activation at a place, or why there is none."""
    last = parent[at]
    beside = [place for place, child in enumerate(parent) if not isinstance(child, nn.Identity)]
    where = beside.index(at)
    before = beside[where - 1] if where > 0 else None
    if is_norm(last):
        after = beside[where + 1] if where + 1 < len(beside) else None
        if after is not None and _is_activation(parent[after]):
            found = _Pair(parent, at, after, activation_first=False)
        else:
            # Behind another normalisation the activation is that one's.
            further = beside[where - 2] if where > 1 else None
            own = before is not None and _is_activation(parent[before])
            own = own and (further is None or not is_norm(parent[further]))
            found = _Pair(parent, at, before if own else None, activation_first=own)
    elif not _is_activation(last):
        return f"it ends in {type(last).__name__}"
    elif before is None or not is_norm(parent[before]):
        what = "nothing" if before is None else type(parent[before]).__name__
        return f"{type(last).__name__} follows {what}, no BatchNorm or InstanceNorm"
    else:
        found = _Pair(parent, before, at, activation_first=False)
    for place in (found.norm, found.activation):
        if place is not None and _has_hooks(parent[place]):
            return f"{type(parent[place]).__name__} has hooks, which would not run"
    if parent[found.norm] in shared:
        return f"{type(parent[found.norm]).__name__} stands in several places, which share its buffers"
    return found


def _is_activation(module: nn.Module) -> bool:
    return isinstance(module, (nn.ReLU, nn.LeakyReLU)) and activation_of(module) is not None


def _has_hooks(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)
