"""Build `fdkernels._C` with CMake.

CMakeLists.txt lists sources and flags, pyproject.toml the metadata. Reads the environment variables
FDKERNELS_CPP and FDKERNELS_CUDA (auto, on or off), FDKERNELS_CUDA_ARCHS ("75;90") and CMAKE_ARGS.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _described(report: dict[str, Any]) -> str:
    """Say what is compiled, and how long that takes: minutes where nvcc compiles for several GPUs."""
    if not report["cpp"]:
        return "nothing is compiled; PyTorch and Triton compute"
    parts = [f"C++ kernels ({', '.join(report['isa'])})"]
    if report["cuda"]:
        parts.append(
            f"CUDA kernels for {', '.join(report['cuda_archs'])} (minutes; FDKERNELS_CUDA_ARCHS chooses)"
        )
    return f"compiling {' and '.join(parts)}, as far as they have changed since the last build here"


class CleanBuild(build):
    """`build` into an empty folder: setuptools would package leftovers of an earlier build."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """`build_ext` that builds and installs the module and `_build_report.json` with CMake."""

    def run(self) -> None:
        # Not in setuptools' folder, which is a new one for each editable install, so that nothing is compiled
        # again before it has changed.
        folder = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        in_place = self.inplace or self.editable_mode
        prefix = ROOT if in_place else Path(self.build_lib).resolve()
        self._cmake("-S", ROOT, "-B", folder, *self._configuration(folder))
        report = json.loads((folder / "_build_report.json").read_text(encoding="utf-8"))
        sys.stdout.write(f"fdkernels: {_described(report)}\n")
        sys.stdout.flush()
        self._cmake("--build", folder, "--config", "Release")
        self._cmake("--install", folder, "--config", "Release", "--prefix", prefix)
        if not report["cpp"]:
            self.distribution.ext_modules = []

    def _configuration(self, folder: Path) -> list[str]:
        """Return CMake's options, with `--fresh` if compilers or settings changed since they were cached."""
        settings = [
            f"-DFDKERNELS_CPP={os.environ.get('FDKERNELS_CPP') or 'auto'}",
            f"-DFDKERNELS_CUDA={os.environ.get('FDKERNELS_CUDA') or 'auto'}",
            f"-DFDKERNELS_CUDA_ARCHS={os.environ.get('FDKERNELS_CUDA_ARCHS', '')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        ninja = shutil.which("ninja") if os.name != "nt" else None
        names = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAHOSTCXX", "CUDAFLAGS", "CUDA_PATH")
        variables = [os.environ.get(name) for name in names]
        compilers = [shutil.which(name) for name in ("c++", "g++", "clang++", "cl", "nvcc")]
        key = json.dumps([settings, variables, compilers, bool(ninja)])
        key_file = folder / "settings.json"
        fresh = key_file.exists() and key_file.read_text(encoding="utf-8") != key
        folder.mkdir(parents=True, exist_ok=True)
        key_file.write_text(key, encoding="utf-8")

        # Pass ninja's path every time: pip's build environment is a new temporary folder for each build.
        generator = ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        return [*(["--fresh"] if fresh else []), *generator, *settings]

    def _cmake(self, *arguments: str | Path) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            sys.exit("fdkernels is built with CMake, which is not here: pip install cmake ninja")
        if subprocess.run([cmake, *map(str, arguments)], check=False).returncode:
            sys.exit(
                "Building the C++ and CUDA part of fdkernels failed: see the message above. "
                "Set FDKERNELS_CUDA=off to skip the CUDA kernels, FDKERNELS_CPP=off to skip both."
            )


class Wheel(bdist_wheel):
    """`bdist_wheel` that tags the wheel as pure Python if it contains no compiled module."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build":
            self.root_is_pure = not self.distribution.has_ext_modules()


setup(
    ext_modules=[Extension("fdkernels._C", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
