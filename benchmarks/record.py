"""What a result was measured on: machine, versions, command."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fdkernels
from fdkernels.build_info import build_info

_PACKAGES = ("numpy", "triton", "pytest-benchmark")
_COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
_COPY_ROUNDS = 15


@functools.cache
def machine(device: str) -> dict[str, Any]:
    """Processor, GPU and versions; `copy_bytes_per_second` counts bytes read and bytes written."""
    record: dict[str, Any] = {
        "cpu_model": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "cpu_cache_bytes": _cpu_cache_bytes(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "build": {key: build_info()[key] for key in ("cpp_compiler", "cuda_version", "cuda_archs", "isa")},
        "backends": {name: reason or "available" for name, reason in fdkernels.backends().items()},
        "copy_bytes_per_second": {},
    }
    devices = [device] if device != "all" else ["cpu", *(["cuda"] * torch.cuda.is_available())]
    for name in devices:
        record["copy_bytes_per_second"][name] = copy_rate(name)
    if "cuda" in devices:
        properties = torch.cuda.get_device_properties(0)
        record["gpu"] = properties.name
        record["gpu_memory_bytes"] = properties.total_memory
        record["gpu_cache_bytes"] = getattr(properties, "L2_cache_size", None)
        record["gpu_multiprocessors"] = properties.multi_processor_count
    return record


def versions() -> dict[str, str | None]:
    """Versions of this package, of Python, of torch and of what else decides speed."""
    found: dict[str, str | None] = {
        "fdkernels": fdkernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def copy_rate(device: str) -> float:
    """Bytes a second that `copy_` moves between buffers beyond every cache, read and written together."""
    source = torch.rand(_COPY_BYTES[device] // 4, device=device)
    target = torch.rand_like(source)
    seconds = [_seconds(lambda: target.copy_(source), device) for _ in range(_COPY_ROUNDS)]
    return float(f"{2 * source.nbytes / statistics.median(seconds):.4g}")


def command(arguments: Sequence[str]) -> str:
    """The command as somebody else would type it: paths from the checkout, elsewhere the name alone."""
    root = str(Path(__file__).resolve().parents[1])
    inside = (argument.replace(f"{root}/", "") for argument in arguments)
    return " ".join(["pytest", *(re.sub(r"(^|=)/.*/", r"\1", argument) for argument in inside)])


def _seconds(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_cache_bytes() -> int | None:
    """The size of the largest cache, as Linux tells it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        factor = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * factor)
    return max(sizes, default=None)
