"""The text of `fdkernels info`: versions, build report, available backends."""

from __future__ import annotations

import platform

import torch

from fdkernels._version import __version__
from fdkernels.backend import auto_backend, backends
from fdkernels.build_info import build_info


def version_text() -> str:
    """Return the name and the version: "fdkernels 0.1.0"."""
    return f"fdkernels {__version__}"


def info_text() -> str:
    """Return versions, the build report and each backend with "available" or the reason it is not."""
    built = build_info()
    cpp = "no"
    if built["cpp"]:
        sets = f", {', '.join(built['isa'])}" if built["isa"] else ""
        cpp = f"yes ({built['cpp_compiler'] or 'unknown compiler'}{sets})"
    cuda = "no"
    if built["cuda"]:
        cuda = f"yes ({built['cuda_version'] or 'unknown version'}; {', '.join(built['cuda_archs'])})"
    device = "none"
    if torch.cuda.is_available():
        device = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    lines = [
        version_text(),
        f"Python {platform.python_version()}, torch {torch.__version__}",
        f"CPU threads: {torch.get_num_threads()}",
        f"CUDA devices: {device}",
        "",
        "Built:",
        f"  C++ kernels: {cpp}",
        f"  CUDA kernels: {cuda}",
        *(f"  {message}" for message in built["messages"]),
    ]
    if built["cpp"] and built["extension_error"]:
        lines.append(f"  The compiled module does not load: {built['extension_error']}")
    reasons = backends()
    on_cpu, on_cuda = auto_backend("cpu"), auto_backend("cuda")
    width = max(map(len, reasons))
    lines += ["", "Backends:"]
    lines += [f"  {name:{width}}  {reason or 'available'}" for name, reason in reasons.items()]
    lines += [
        "",
        f'backend="auto" takes {on_cpu} for CPU tensors and {on_cuda} for CUDA tensors.',
    ]
    return "\n".join(lines)


__all__ = ["info_text", "version_text"]
