"""What a result was measured on: machine, versions, commit, command."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fdkernels
from fdkernels.build_info import build_info

_ROOT = str(Path(__file__).resolve().parents[1])
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


def header(arguments: Sequence[str], device: str, quick: bool = False) -> dict[str, Any]:
    """What stands at the head of a file of results: machine, commit, time and command."""
    return {
        "machine": machine(device),
        "commit": commit(),
        "when": _begin(),
        "command": command(arguments),
        "quick": quick,
    }


@functools.cache
def commit() -> dict[str, Any]:
    """The commit and whether there are changes beside results.

    A copy of the tree without its history is told its commit by FDKERNELS_COMMIT.
    """
    if "FDKERNELS_COMMIT" in os.environ:
        return {"id": os.environ["FDKERNELS_COMMIT"], "dirty": None}
    head = _git("rev-parse", "HEAD")
    if head is None:
        return {"id": None, "dirty": None}
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!benchmarks/README.md")
    return {"id": head, "dirty": bool(changes)}


def command(arguments: Sequence[str]) -> str:
    """The command as somebody else would type it: paths from the checkout, elsewhere the name alone."""
    inside = (str(argument).replace(f"{_ROOT}/", "") for argument in arguments)
    return " ".join(re.sub(r"(^|=)/.*/", r"\1", argument) for argument in inside)


def folder_name(device: str) -> str:
    """A name for the machine's kind, such as `nvidia-h100-80gb-hbm3` or `amd-epyc`."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_model()
    words = re.sub(r"\((r|tm)\)|processor|cpu|@.*|\d+-core", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") or platform.machine()


def main() -> None:
    """Print the folder of the results of this machine."""
    print(folder_name("cuda" if torch.cuda.is_available() else "cpu"))


@functools.cache
def _begin() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_ROOT, check=True, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


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


if __name__ == "__main__":
    main()
