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
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CleanBuild(build):
    """`build` into an empty folder: setuptools would package leftovers of an earlier build."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """`build_ext` that builds and installs the module and `_build_report.json` with CMake."""

    def run(self) -> None:
        folder = Path(self.build_temp).resolve() / "cmake"
        in_place = self.inplace or self.editable_mode
        prefix = ROOT if in_place else Path(self.build_lib).resolve()
        self._cmake("-S", ROOT, "-B", folder, *self._configuration(folder))
        self._cmake("--build", folder, "--config", "Release")
        self._cmake("--install", folder, "--config", "Release", "--prefix", prefix)
        if not json.loads((folder / "_build_report.json").read_text(encoding="utf-8"))["cpp"]:
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
