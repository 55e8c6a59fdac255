"""Fixtures of the emulated CUDA kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from cuda_emulation.build import Emulation, emulate


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine torch's threads wait for each other longer than the reference computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Launches:
    """How the emulation launches kernels: in which order it runs their blocks, and how many there were."""

    def __init__(self, emulated: Emulation) -> None:
        self._library = ctypes.CDLL(emulated.module.__file__)  # the module itself, which is loaded already

    def order(self, seed: int) -> None:
        """0: blocks run from the first to the last; -1: backwards; else shuffled, as the seed says."""
        self._library.cuda_emulation_set_order(seed)

    def count(self) -> int:
        """The kernels launched since the last call of this."""
        return int(self._library.cuda_emulation_take_launches())


@pytest.fixture
def launches(emulated: Emulation) -> Iterator[Launches]:
    """The launches of the emulated module from here on, in their usual order."""
    control = Launches(emulated)
    control.count()
    yield control
    control.order(0)


@pytest.fixture(scope="session")
def emulated() -> Emulation:
    """The CUDA kernels as host code."""
    return emulate()
