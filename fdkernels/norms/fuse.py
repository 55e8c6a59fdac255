"""Puts `NormAct` in the place of normalisations and their activations in named blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from fdkernels.norms.module import NormAct, activation_of, is_norm
from fdkernels.taps.names import find

__all__ = ["fuse_norms"]


def fuse_norms(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Replace each normalisation with its activation in the named blocks by one `NormAct`, in place.

    ::

        report = fdk.fuse_norms(model, model.tap_names)
        # {"enc1": "fused: BatchNorm2d + ReLU", "dec4": "left alone: ..."}

    A block is fused if it ends in a normalisation with its activation, so that its taps get the loss's sums
    and gradient from the passes of the normalisation; the pairs before that one are fused as well.

    Parameters and buffers are shared under their names: `state_dict()`, optimizers and checkpoints, earlier
    ones too, stay as they are. The activation's place is taken by an `nn.Identity`. Fuse before torch.compile
    and after `SyncBatchNorm.convert_sync_batchnorm`, which does not know `NormAct`; neither does
    `torch.optim.swa_utils.update_bn`.

    Args:
        model: any network.
        names: of blocks that are an `nn.Sequential`, also of others, with a BatchNorm or InstanceNorm and a
            ReLU or LeakyReLU before or behind it, or neither; or of such a normalisation or activation in an
            `nn.Sequential`.

    Returns:
        By name what it ends in and was fused, or why it was left alone.

    Raises:
        ValueError: the network has no submodule of a name.
        TypeError: names is a string.
    """
    if isinstance(names, str):
        raise TypeError(f"names must be a sequence of submodule names, got the string {names!r}")
    modules, places = find(model, tuple(names))
    return {name: _fuse(modules, place.path) for name, place in zip(names, places, strict=True)}


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
        norm = type(self.parent[self.norm]).__name__
        if self.activation is None:
            return norm
        activation = type(self.parent[self.activation]).__name__
        return f"{activation} + {norm}" if self.activation_first else f"{norm} + {activation}"

    def fuse(self) -> None:
        """Replace both."""
        activation = None if self.activation is None else self.parent[self.activation]
        self.parent[self.norm] = NormAct(self.parent[self.norm], activation, self.activation_first)
        if self.activation is not None:
            self.parent[self.activation] = nn.Identity()


def _fuse(modules: dict[str, nn.Module], path: str) -> str:
    """Fuse a block; say what was done."""
    block = modules[path]
    kind = type(block).__name__
    if isinstance(block, nn.Sequential):
        found = _pair_at_end(block)
    elif is_norm(block) or activation_of(block) is not None:
        parent = modules.get(path.rpartition(".")[0])
        if isinstance(parent, nn.Sequential):
            found = _pair_at(parent, [*parent].index(block))
        else:
            found = f"{kind} stands in no nn.Sequential, so what stands beside it is not known"
    elif isinstance(block, NormAct):
        found = "it is fused already"
    else:
        found = f"{kind} is no nn.Sequential, so what it ends in is not known"
    if isinstance(found, str):
        return f"left alone: {found}"
    kinds = found.kinds
    if isinstance(block, nn.Sequential):
        _fuse_inside(block)
    else:
        found.fuse()
    return f"fused: {kinds}"


def _fuse_inside(block: nn.Sequential) -> None:
    """Fuse all pairs of a block, the last first: an activation between two norms belongs to the first."""
    for at in reversed(range(len(block))):
        child = block[at]
        if isinstance(child, nn.Sequential):
            _fuse_inside(child)
        elif is_norm(child) or isinstance(child, (nn.ReLU, nn.LeakyReLU)):
            found = _pair_at(block, at)
            if isinstance(found, _Pair):
                found.fuse()


def _pair_at_end(block: nn.Sequential) -> _Pair | str:
    """The pair that ends a block, or what ends it instead."""
    places = [at for at, child in enumerate(block) if not isinstance(child, nn.Identity)]
    if not places:
        return "it holds no module"
    last = block[places[-1]]
    if isinstance(last, nn.Sequential):
        return _pair_at_end(last)
    return "it is fused already" if isinstance(last, NormAct) else _pair_at(block, places[-1])


def _pair_at(parent: nn.Sequential, at: int) -> _Pair | str:
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
    return found


def _is_activation(module: nn.Module) -> bool:
    return isinstance(module, (nn.ReLU, nn.LeakyReLU)) and activation_of(module) is not None


def _has_hooks(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)
