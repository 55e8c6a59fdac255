"""Build report of this installation: the kernels that were built, and why the others were not."""

from __future__ import annotations

import importlib
import importlib.util
import json
import warnings
from importlib import resources
from typing import Any

from fdkernels._version import __version__

__all__ = ["build_info", "warn_if_not_built"]

_REPORT = "_build_report.json"

_NOT_BUILT: dict[str, Any] = {
    "version": __version__,
    "cpp": False,
    "cpp_compiler": None,
    "cuda": False,
    "cuda_version": None,
    "cuda_archs": [],
    "isa": [],
    "messages": ["This source tree was not built; run `pip install .` to build the C++ kernels."],
}


def build_info() -> dict[str, Any]:
    """Return the build report, and whether the compiled module loads here.

    Returns:
        A new dict with the keys
        `version`: version of the package, a string;
        `cpp`, `cuda`: whether the C++ and the CUDA kernels were built;
        `cpp_compiler`: name and version of the C++ compiler, or None;
        `cuda_version`: version of nvcc, or None;
        `cuda_archs`: GPU architectures, "sm_90" for machine code and "compute_90" for PTX;
        `isa`: instruction sets of the CPU kernels; one of them is selected at run time;
        `messages`: one sentence for each part that was not built, saying why;
        `extension`: path of the compiled module, or None if it does not load;
        `extension_error`: why it does not load, or None.
    """
    report = resources.files("fdkernels").joinpath(_REPORT)
    info = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else _NOT_BUILT
    info = {key: list(value) if isinstance(value, list) else value for key, value in info.items()}
    info["extension"] = info["extension_error"] = None
    try:
        info["extension"] = importlib.import_module("fdkernels._C").__file__
    except ImportError as error:
        info["extension_error"] = str(error)
    return info


def warn_if_not_built() -> None:
    """Warn in a source tree that has neither a compiled module nor the report that every build leaves.

    An installation without a compiler has the report, and `fdkernels.backends()` tells its reason.
    """
    if importlib.util.find_spec("fdkernels._C") is not None:
        return
    if not resources.files("fdkernels").joinpath(_REPORT).is_file():
        warnings.warn(
            "fdkernels is imported from a source tree that was not built, so CPU tensors take the slow "
            "reference; run `pip install .` in it",
            RuntimeWarning,
            stacklevel=3,
        )
