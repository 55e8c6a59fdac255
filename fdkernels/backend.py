"""Which backends are available here, which one `"auto"` takes, and which one the user chose."""

from __future__ import annotations

import importlib
import os
import re
from types import TracebackType
from typing import Any

import torch

from fdkernels.checks import MaskCheck, one_of
from fdkernels.transforms import has_plain_memory, in_transform

BACKENDS = ("cuda", "triton", "cpu", "reference")

_OLDEST_TRITON = (3, 4)
# Older interpreters make a number of an array of one element at every loop, which newer numpy refuses.
_INTERPRETS_WITH_NEW_NUMPY, _NEW_NUMPY = (3, 7), (2, 4)

# Process-wide, like the flags of torch.backends: backward runs in threads of its own, which a context
# variable would not reach, and torch.compile guards on a global.
_selected = "auto"
_reasons: dict[str, str | None] = {}


def backends() -> dict[str, str | None]:
    """Say which backends are available here.

    Returns:
        A dict from each backend's name, `"cuda"`, `"triton"`, `"cpu"` and `"reference"`, to None where it is
        available, else to the reason why it is not. With TRITON_INTERPRET=1 in the environment before the
        first use, Triton is available for CPU tensors.
    """
    return {name: _reason(name) for name in BACKENDS}


class use_backend:
    """Make `backend="auto"` mean the named backend: `with fdkernels.use_backend("reference"): ...`.

    The choice holds for all threads of the process until the block ends. A call that names a backend
    overrides it.

    Args:
        name: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend is not available here.
    """

    def __init__(self, name: str) -> None:
        one_of("backend", name, ("auto", *BACKENDS))
        if name != "auto":
            _require(name)
        self.name = name
        self._previous: list[str] = []

    def __enter__(self) -> use_backend:
        global _selected
        self._previous.append(_selected)
        _selected = self.name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _selected
        _selected = self._previous.pop()


def resolve(backend: str, device: torch.device) -> str:
    """The name of the backend that computes on `device`.

    Inside torch.func's transforms and forward-mode differentiation that is the reference.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend is not available here, not for tensors on this device, or not inside a
            transform.
    """
    one_of("backend", backend, ("auto", *BACKENDS))
    if backend == "auto":
        backend = _selected
    if in_transform():
        if backend not in ("auto", "reference"):
            raise RuntimeError(
                f"backend={backend!r} cannot be transformed by torch.func or forward-mode differentiation; "
                "take backend='auto' or 'reference' there"
            )
        return "reference"
    if backend == "auto":
        return auto_backend(device.type)
    _require(backend)
    wanted = _device_type(backend)
    if wanted is not None and device.type != wanted:
        raise RuntimeError(f"backend={backend!r} computes on {wanted} tensors here, got features on {device}")
    return backend


def selected() -> str:
    """What the user has said `"auto"` means, itself where nothing was said."""
    return _selected


def auto_backend(device_type: str) -> str:
    """What `"auto"` takes for tensors on a device of that type: the fastest backend that is available."""
    preferred = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}.get(device_type, ())
    for name in preferred:
        # Under the interpreter Triton is a debugger; on CUDA tensors it would copy them to the host and back.
        if _reason(name) is None and not (name == "triton" and _interpreting()):
            return name
    return "reference"


def mask_check(mask: Any) -> MaskCheck | None:
    """What makes the check of the values of such a mask by a kernel, which reads them once and copies none.

    None where no kernel reads the mask: a check in torch decides then.
    """
    if not has_plain_memory(mask) or mask.device.type != "cpu" or auto_backend("cpu") != "cpu":
        return None
    from fdkernels.op import cpu

    return cpu.mask_check


def _require(backend: str) -> None:
    reason = _reason(backend)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} is not available here: {reason}")


@torch.compiler.assume_constant_result
def _reason(backend: str) -> str | None:
    if backend not in _reasons:
        _reasons[backend] = _PROBES[backend]()
    return _reasons[backend]


@torch.compiler.assume_constant_result
def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _device_type(backend: str) -> str | None:
    if backend == "reference":
        return None
    if backend == "triton":
        return "cpu" if _interpreting() else "cuda"
    return backend


def _extension_reason() -> str | None:
    try:
        importlib.import_module("fdkernels._C")
    except ImportError as error:
        return (
            f"the compiled extension fdkernels._C could not be imported ({error}); "
            "`fdkernels info` says what was built"
        )
    return None


def _probe_reference() -> None:
    return None


def _probe_cpu() -> str | None:
    return _extension_reason()


def _probe_triton() -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton could not be imported ({error})"
    found = _release(triton.__version__)
    if found < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"the kernels take tuples of layers, which need Triton {oldest}; this is {triton.__version__}"
    numpy = importlib.import_module("numpy")
    if _interpreting() and found < _INTERPRETS_WITH_NEW_NUMPY and _release(numpy.__version__) >= _NEW_NUMPY:
        newer, older = (".".join(map(str, v)) for v in (_INTERPRETS_WITH_NEW_NUMPY, _NEW_NUMPY))
        return (
            f"Triton {triton.__version__} interprets no loops under numpy {numpy.__version__}; "
            f"install Triton {newer} or numpy<{older}"
        )
    if _interpreting() or torch.cuda.is_available():
        return None
    return (
        "torch finds no CUDA device; with TRITON_INTERPRET=1 in the environment the kernels are interpreted"
    )


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def _probe_cuda() -> str | None:
    reason = _extension_reason()
    if reason is not None:
        return reason
    extension = importlib.import_module("fdkernels._C")
    if not extension.with_cuda:
        return "fdkernels was built without CUDA; `fdkernels info` says why"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.cuda is None:
        return "this torch drives its devices through ROCm, not CUDA"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not runs_on(extension.cuda_archs, capability):
            number = "{}{}".format(*capability)
            return (
                f"fdkernels was built for {extension.cuda_archs}, and {torch.cuda.get_device_name(index)} is "
                f"sm_{number}; install it again here, or with FDKERNELS_CUDA_ARCHS={number}"
            )
    return None


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for archs such as "sm_80,compute_80" runs on a GPU.

    Machine code runs on its own generation from its number on, PTX on all later GPUs, and code for 90a on
    that GPU alone.
    """
    for kind, major, minor, only in re.findall(r"(sm|compute)_(\d+)(\d)(a?)", archs):
        built = (int(major), int(minor))
        if built == capability or (not only and built < capability and kind == "compute"):
            return True
        if not only and built < capability and built[0] == capability[0]:
            return True
    return False


_PROBES = {
    "cuda": _probe_cuda,
    "triton": _probe_triton,
    "cpu": _probe_cpu,
    "reference": _probe_reference,
}
