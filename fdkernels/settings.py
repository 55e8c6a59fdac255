"""What stays the same from call to call: the settings of a loss, checked once for each set of arguments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
import torch.distributed as dist

from fdkernels import backend as backends
from fdkernels import checks, geometry
from fdkernels.classes import BINARY, Classes
from fdkernels.conventions import EXCHANGES, MASK_RESIZES, REDUCTIONS, Convention, get_convention

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Settings", "has_two_regions", "resize_of", "settings_of"]


class Settings(NamedTuple):
    """The arguments of `feature_discrepancy_loss` that stay the same from call to call, by their names.

    `classes` holds `mode`, `num_classes`, `include_background` and `pairs`.
    """

    convention: Convention
    exchange: str
    mask_resize: str | None
    ignore_index: float | None
    eps: float
    reduction: str
    group: dist.ProcessGroup | None
    backend: str
    aspect: str = "same"
    channel_dim: int = 1
    classes: Classes = BINARY

    def check(self) -> None:
        """Raise TypeError or ValueError for a setting that does not exist."""
        checks.one_of("exchange", self.exchange, EXCHANGES)
        checks.one_of("reduction", self.reduction, REDUCTIONS)
        checks.non_negative("eps", self.eps)
        checks.one_of("backend", self.backend, ("auto", *backends.BACKENDS))
        checks.one_of("aspect", self.aspect, geometry.ASPECTS)
        if self.mask_resize is not None:
            checks.one_of("mask_resize", self.mask_resize, MASK_RESIZES)
        if self.classes.is_binary:
            return
        what = f"mode={self.classes.mode!r}"
        if self.convention.norm == "batch" or self.convention.masked_background:
            raise ValueError(f"convention={self.convention.name!r} is for mode='binary', got {what}")
        if self.exchange == "pooled":
            raise ValueError(f"exchange='pooled' is for mode='binary', got {what}")


# Functions and no properties: Dynamo of torch before 2.9 does not look up those of a named tuple.
def resize_of(settings: Settings) -> str:
    """How the mask is resized to a layer."""
    return settings.mask_resize or settings.convention.mask_resize


def has_two_regions(settings: Settings) -> bool:
    """Whether the kernels of two regions serve: one class, and no second moments."""
    return settings.classes.is_binary and settings.convention.norm != "fisher"


class _Given(TypedDict):
    convention: str | Convention
    exchange: str
    mask_resize: str | None
    ignore_index: float | None
    eps: float
    reduction: str
    backend: str
    aspect: str
    channel_dim: int
    mode: str
    num_classes: int | None
    include_background: bool
    pairs: Sequence[tuple[int, int]] | None


def settings_of(group: dist.ProcessGroup | None = None, **given: Unpack[_Given]) -> Settings:
    """The checked settings of a call.

    Args:
        group: as for `fdkernels.feature_discrepancy_loss`.
        **given: its other settings, by their names.

    Raises:
        TypeError, ValueError: a setting that does not exist.
    """
    settings = _of_call(given)
    return settings if group is None else settings._replace(group=group)


def _of_call(given: _Given) -> Settings:
    # torch.compile would trace the function behind the cache and warn.
    if torch.compiler.is_compiling():
        return _made(**given)
    try:
        return _known(**given)
    except TypeError:  # such as of a list, which has no hash; what is wrong is said again
        return _made(**given)


def _made(
    *,
    convention: str | Convention,
    mode: str,
    num_classes: int | None,
    include_background: bool,
    pairs: Sequence[tuple[int, int]] | None,
    **others: Any,
) -> Settings:
    classes = Classes.of(mode, num_classes, include_background, pairs)
    settings = Settings(convention=get_convention(convention), classes=classes, group=None, **others)
    settings.check()
    return settings


# By type, too: True is no number of classes, though it equals 1.
_known = lru_cache(maxsize=64, typed=True)(_made)
