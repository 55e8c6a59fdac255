"""What copies and files of the criterion do with its process group, which cannot be copied."""

from __future__ import annotations

import copy
from typing import Any

import torch.distributed as dist

from fdkernels.settings import Settings

__all__ = ["HoldsGroup"]


class HoldsGroup:
    """A module with `settings` that may hold a process group: a copy shares it, a file leaves it out."""

    settings: Settings
    _lost_group = False

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks of the loss, unless a call names others; after loading from a pickle, assign it anew."""
        return self.settings.group

    @group.setter
    def group(self, group: dist.ProcessGroup | None) -> None:
        self.settings, self._lost_group = self.settings._replace(group=group), False

    def check_group(self) -> None:
        """Refuse to compute the loss of this rank alone where that of a group was asked for.

        Raises:
            RuntimeError: the module comes from a pickle that left its group out.
        """
        if self._lost_group:
            raise RuntimeError(
                "this criterion was loaded from a pickle, which cannot hold the process group that it had: "
                "assign crit.group = torch.distributed.group.WORLD, say, or None for the loss of this rank "
                "alone, or pass group= to the call"
            )

    def __copy__(self) -> HoldsGroup:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> HoldsGroup:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo[id(self.group)] = self.group
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.group is not None:
            state.update(settings=self.settings._replace(group=None), _lost_group=True)
        return state
