"""Compiles csrc with the CUDA kernels as host code, once for all tests of this folder."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

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
    "cuda/region_sums.cu": ["-O1", "-x", "c++"],
    "bindings.cpp": ["-O0"],
    "cuda/log_norm.cu": ["-O1", "-x", "c++"],
    "cuda/layer_losses.cu": ["-O1", "-x", "c++"],
    "cuda/layer_masks.cu": ["-O1", "-x", "c++"],
    "cpu/region_sums.cpp": ["-O0"],
    "cpu/region_sums_isa.cpp": ["-O0"],
    "cpu/layer_masks.cpp": ["-O0"],
    "cpu/log_norm.cpp": ["-O0"],
    "cpu/parallel.cpp": ["-O0"],
}


def compiler() -> str:
    """The g++ to use; without one, or where it could not compile the emulation, the tests are skipped."""
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


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{shlex.join(command)}\n{done.stderr}", pytrace=False)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine torch's threads wait for each other longer than the reference computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Launches:
    """How the emulation launches kernels: in which order it runs their blocks, and how many there were."""

    def __init__(self, module: ModuleType) -> None:
        assert module.__file__ is not None
        self._library = ctypes.CDLL(module.__file__)  # the module itself, which is loaded already

    def order(self, seed: int) -> None:
        """0: blocks run from the first to the last; -1: backwards; else shuffled, as the seed says."""
        self._library.cuda_emulation_set_order(seed)

    def count(self) -> int:
        """The kernels launched since the last call of this."""
        return int(self._library.cuda_emulation_take_launches())


@pytest.fixture
def launches(emulated: ModuleType) -> Iterator[Launches]:
    """The launches of the emulated module from here on, in their usual order."""
    control = Launches(emulated)
    control.count()
    yield control
    control.order(0)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """`fdkernels._C` as it is with CUDA, but its "device memory" is that of the CPU."""
    gcc = compiler()
    pybind11 = pytest.importorskip("pybind11", reason="there are no headers of pybind11")
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        pytest.skip(f"there are no headers of Python in {python}")
    includes = [f"-I{folder}" for folder in (HERE / "include", CSRC, pybind11.get_include(), python)]
    extra = shlex.split(os.environ.get("FDKERNELS_EMULATION_FLAGS", ""))

    folder = tmp_path_factory.mktemp("cuda_emulation")
    objects = {name: folder / name.replace("/", "_").replace(".", "_") for name in SOURCES}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [
            [
                gcc,
                *FLAGS,
                *DEFINES,
                *includes,
                *flags,
                *extra,
                "-c",
                str(CSRC / name),
                "-o",
                str(objects[name]),
            ]
            for name, flags in SOURCES.items()
        ]
        list(pool.map(run, commands))
    module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    run([gcc, "-shared", *extra, *map(str, objects.values()), "-ldl", "-o", str(module)])

    spec = importlib.util.spec_from_file_location("_C", module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
