"""Compiles csrc with the CUDA kernels as host code, once a session.

Tests elsewhere can run backend `cuda` on the CPU, too: `emulate().backend` has the functions of a backend.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import pytest

import fdkernels
import fdkernels.op

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
OLDEST_COMPILER = 12  # the first g++ with _Float16 in C++

FLAGS = [
    *("-std=c++17", "-fPIC", "-U_FORTIFY_SOURCE"),
    # The installed fdkernels._C has variables of the same names, which two modules of a process would share.
    *("-fvisibility=hidden", "-fno-gnu-unique"),
]
DEFINES = [
    "-DFDKERNELS_WITH_CUDA=1",
    '-DFDKERNELS_VERSION="0"',
    '-DFDKERNELS_CUDA_VERSION="emulated"',
    '-DFDKERNELS_CUDA_ARCHS_BUILT=""',
    "-DFDK_ISA_BASELINE=1",
]
# The longest first; optimised are those that the tests run.
SOURCES = {
    "cuda/norm.cu": ["-O1", "-x", "c++"],
    "cuda/sums.cu": ["-O1", "-x", "c++"],
    "bindings.cpp": ["-O0"],
    "norm_bindings.cpp": ["-O0"],
    "cuda/regions.cu": ["-O1", "-x", "c++"],
    "cuda/losses.cu": ["-O1", "-x", "c++"],
    "cuda/masks.cu": ["-O1", "-x", "c++"],
    "cpu/isa/kernels.cpp": ["-O0"],
    "cpu/isa/region_kernels.cpp": ["-O0"],
    "cpu/isa/norm_kernels.cpp": ["-O0"],
    "cpu/dispatch.cpp": ["-O0"],
    "cpu/sums.cpp": ["-O0"],
    "cpu/regions.cpp": ["-O0"],
    "cpu/masks.cpp": ["-O0"],
    "cpu/mask_values.cpp": ["-O0"],
    "cpu/losses.cpp": ["-O0"],
    "cpu/norm.cpp": ["-O0"],
    "cpu/parallel.cpp": ["-O0"],
}


class Emulation(NamedTuple):
    """The CUDA kernels as host code.

    Attributes:
        module: `fdkernels._C` as it is with CUDA, but its "device memory" is that of the CPU.
        packing, mask_packing: those of fdkernels.op for that module.
        backend: fdkernels.op.cuda over that module, for tensors of the CPU.
        norms: fdkernels.op.cuda_norms likewise.
    """

    module: Any
    packing: Any
    mask_packing: Any
    backend: Any
    norms: Any


@lru_cache(maxsize=1)
def emulate() -> Emulation:
    """Build and load the emulation once, or skip the test with the reason why it cannot be built."""
    folder = tempfile.mkdtemp(prefix="cuda_emulation_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    module = _build(Path(folder))
    with mock.patch.object(fdkernels, "_C", module, create=True):
        packing = copy_of("packing")
        with mock.patch.object(fdkernels.op, "packing", packing, create=True):
            masks = copy_of("mask_packing")
            with mock.patch.object(fdkernels.op, "mask_packing", masks, create=True):
                backend: Any = copy_of("cuda")
            with mock.patch.object(fdkernels.op, "norm_packing", copy_of("norm_packing"), create=True):
                norms: Any = copy_of("cuda_norms")
    for kernels in (backend, norms):
        kernels._C = _WithoutDevice(module)
        kernels.current_stream = lambda device: 0
    return Emulation(module, packing, masks, backend, norms)


class _WithoutDevice:
    """The emulated module; CPU tensors have no device number."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            if "device" in named:
                return function(*arguments, **{**named, "device": 0})
            return function(*arguments[:-2], 0, arguments[-1])  # the last two are device and stream

        return call


def copy_of(name: str) -> ModuleType:
    """A second copy of a module of fdkernels.op."""
    path = Path(fdkernels.op.__path__[0]) / f"{name}.py"
    return _load(f"emulated_{name}", path)


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(folder: Path) -> ModuleType:
    gcc = _compiler()
    pybind11 = pytest.importorskip("pybind11", reason="there are no headers of pybind11")
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        pytest.skip(f"there are no headers of Python in {python}")
    includes = [f"-I{folder}" for folder in (HERE / "include", CSRC, pybind11.get_include(), python)]
    extra = shlex.split(os.environ.get("FDKERNELS_EMULATION_FLAGS", ""))
    objects = {name: folder / name.replace("/", "_").replace(".", "_") for name in SOURCES}
    common = [gcc, *FLAGS, *DEFINES, *includes]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [
            [*common, *flags, *extra, "-c", str(CSRC / name), "-o", str(objects[name])]
            for name, flags in SOURCES.items()
        ]
        list(pool.map(_run, commands))
    module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run([gcc, "-shared", *extra, *map(str, objects.values()), "-ldl", "-o", str(module)])
    with mock.patch.dict(os.environ):
        # It asks for an instruction set of the installed module, which this one does not have.
        os.environ.pop("FDKERNELS_CPU_ISA", None)
        return _load("_C", module)


def _compiler() -> str:
    if not CSRC.is_dir():
        pytest.skip(f"there are no sources in {CSRC}")
    machine = platform.machine()
    if platform.libc_ver()[0] != "glibc" or machine not in ("x86_64", "aarch64"):
        pytest.skip(f"fibers need glibc on x86_64 or aarch64, this is {platform.system()} on {machine}")
    path = shutil.which("g++")
    if path is None:
        pytest.skip("there is no g++")
    version = subprocess.run([path, "-dumpversion"], capture_output=True, text=True, check=True).stdout
    if int(version.split(".")[0]) < OLDEST_COMPILER:
        pytest.skip(f"g++ is {version.strip()}, older than {OLDEST_COMPILER}")
    return path


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{shlex.join(command)}\n{done.stderr}", pytrace=False)
