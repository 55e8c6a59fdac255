"""What a call takes beside time: peak memory, kernel launches, dispatched ops."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import Case

# Bytes that a contender's forward and backward hold at once, over those of the features, features included;
# about, and rather more.
_PEAK_FACTORS = {"eager": 7.0, "compiled": 4.0, "bmm": 4.0}
_PEAK_FACTOR = 2.6  # features, gradient, and what the check against the truth takes


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """The most bytes of tensors that were alive at once during a call and not before it.

    On a GPU from the caching allocator's own count; on a CPU from the allocations and frees that the profiler
    records, so it sees the inside of compiled code and of custom ops too. Scratch memory of a C++ kernel that
    comes from malloc and not from torch is not counted.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def kernel_launches(function: Callable[[], object]) -> int:
    """How many kernels, copies and fills a call has a GPU do."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


class Dispatched(TorchDispatchMode):
    """Counts the ops that torch dispatches to a backend within the block, views and allocations too.

    What a compiled graph or a custom op does inside is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def dispatched_ops(function: Callable[[], object]) -> int:
    """How many ops a call dispatches, each of which costs the host about a microsecond or more."""
    with Dispatched() as counter:
        function()
    return len(counter.names)


def does_not_fit(case: Case, contender: str = "op") -> str | None:
    """Why a contender's memory is not there on the device, or None."""
    free = torch.cuda.mem_get_info()[0] if case.device == "cuda" else _available_bytes()
    needed = _PEAK_FACTORS.get(contender, _PEAK_FACTOR) * case.feature_bytes
    if free is None or free >= needed:
        return None
    return f"{needed / 2**30:.3g} GiB are needed for {case.name}, {free / 2**30:.3g} GiB are free"


def _available_bytes() -> int | None:
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
