"""Test one wheel beside each release of torch and under each Python, and write docs/versions.md.

    make test-matrix                                       every release of torch, every Python that is here
    make test-matrix MATRIX="3.11:2.8.0 3.13:2.13.0"       these pairs of a Python and a torch
    make test-matrix MATRIX="3.11:2.8.0:numpy<2.4"         with further requirements
    make test-matrix MATRIX_PYTHONS="python3.12 /opt/python/bin/python3.14"
    make test-matrix MATRIX_TESTS="op test_loss.py"        other tests than CORE

The wheel of a Python is built once and installed unchanged beside every torch. Each environment is removed
after its run: torch with its CUDA libraries takes several gigabytes.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from matrix.table import PAGE, Row, numbers, read_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]
# Where a version shows: the compiled module, autograd, registered ops, torch.compile, Triton, module hooks.
CORE = (
    "op/test_cpu.py",
    "op/test_registered.py",
    "op/test_triton.py",
    "op/test_weights.py",
    "test_backend.py",
    "test_classes.py",
    "test_compile.py",
    "test_criterion.py",
    "test_free_loss.py",
    "test_fuse_norms.py",
    "test_fused_taps.py",
    "test_loss.py",
    "test_norm_act.py",
    "test_tap.py",
    "test_taps.py",
)
TOOLS = ("pytest>=8", "hypothesis>=6")
NAMED_FAILURES = 3

REPORT = """
import json, platform
from importlib import metadata
import fdkernels, fdkernels._C, torch

def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"

print(json.dumps({
    "torch": torch.__version__,
    "triton": version("triton"),
    "numpy": version("numpy"),
    "backends": fdkernels.backends(),
    "machine": f"{platform.machine()} {fdkernels._C.cpu_instruction_set}",
}))
"""


class Combination(NamedTuple):
    """A Python, "3.11", a release of torch, "2.8.0", and requirements beside them."""

    python: str
    torch: str
    beside: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ":".join((self.python, self.torch, *self.beside))


def output_of(command: list[str]) -> str | None:
    """What a command prints, or None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def interpreters() -> dict[str, str]:
    """The Pythons that are here by version: those of MATRIX_PYTHONS, or python3.10 on of the PATH."""
    oldest = int(
        re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text("utf-8"))[1]
    )
    named = os.environ.get("MATRIX_PYTHONS", "").split()
    found = {}
    for command in named or [sys.executable, *(f"python3.{minor}" for minor in range(oldest, oldest + 20))]:
        code = "import sys; print(*sys.version_info[:2], sep='.'); print(sys._base_executable)"
        answer = output_of([command, "-c", code])
        if answer is None:
            if named:
                sys.exit(f"MATRIX_PYTHONS must name Pythons that run, got {command}")
            continue
        version, executable = answer.split()
        found.setdefault(version, executable)
    return found


def releases(python: str) -> list[str]:
    """The last patch of each release of torch that the registry has for a Python, from our bound on."""
    bound = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))[1]
    listed = output_of([python, "-m", "pip", "index", "versions", "torch"]) or ""
    line = re.search(r"Available versions: (.*)", listed)
    if line is None:
        sys.exit("The registry gives no release of torch; name combinations with MATRIX.")
    plain = [version for version in line[1].split(", ") if re.fullmatch(r"[\d.]+", version)]
    newest: dict[tuple[int, ...], str] = {}
    for version in sorted(plain, key=numbers):
        if numbers(version) >= numbers(bound):
            newest[numbers(version)[:2]] = version
    return list(newest.values())


def combinations(pythons: dict[str, str]) -> list[Combination]:
    """What MATRIX names; else this Python with every torch, and the others with their newest."""
    if wanted := os.environ.get("MATRIX", "").split():
        parts = [entry.split(":") for entry in wanted]
        if any(len(part) < 2 for part in parts):
            sys.exit(f"MATRIX must hold entries such as 3.11:2.8.0, got {' '.join(wanted)}")
        return [Combination(python, torch, tuple(beside)) for python, torch, *beside in parts]
    main = f"{sys.version_info[0]}.{sys.version_info[1]}"
    every = [Combination(main, torch) for torch in releases(pythons[main])]
    return every + [Combination(name, releases(path)[-1]) for name, path in pythons.items() if name != main]


def build_wheel(python: str, folder: Path) -> Path:
    """Build the wheel of a Python, with the CPU kernels alone unless FDKERNELS_CUDA says otherwise."""
    environment = {"FDKERNELS_CUDA": "off", **os.environ}
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, env=environment)
    return next(folder.glob("fdkernels-*.whl"))


def failures_in(report: Path) -> Iterator[str]:
    """The tests that failed, each by its file and name without parameters."""
    for case in ET.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            file = case.get("classname", "").rsplit(".", 1)[-1]
            yield f"{file}::{case.get('name', '').partition('[')[0]}"


def run_tests(venv: Path, report: Path) -> tuple[dict[str, int], list[str]]:
    """Run the core tests in an environment; their counts, and which failed."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CI": "true"}
    names = os.environ.get("MATRIX_TESTS", "").split() or CORE
    selected = [str(ROOT / "python_tests" / name) for name in names]
    options = ["-m", "not slow", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
    log = report.with_suffix(".log")
    with log.open("w") as out:
        command = [str(venv / "bin" / "pytest"), *options, *selected]
        subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=out, check=False)
    if not report.exists():
        return {"tests": 0, "failures": 1, "errors": 0, "skipped": 0}, [f"pytest did not start, see {log}"]
    suite = ET.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    return counts, list(dict.fromkeys(failures_in(report)))


def tested(row: Row, venv: Path, report: Path) -> Row:
    """The row of what an environment holds, after the tests ran there."""
    # From a folder without the sources, which would go before the wheel.
    command = [str(venv / "bin" / "python"), "-c", REPORT]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    about = subprocess.run(
        command, cwd=report.parent, env=environment, capture_output=True, text=True, check=False
    )
    if about.returncode:
        return row._replace(failed="not imported: " + about.stderr.strip().splitlines()[-1])
    facts = json.loads(about.stdout.splitlines()[-1])
    counts, failed = run_tests(venv, report)
    names = ", ".join(failed[:NAMED_FAILURES])
    more = f" and {len(failed) - NAMED_FAILURES} more" if len(failed) > NAMED_FAILURES else ""
    count = counts["failures"] + counts["errors"]
    return row._replace(
        torch=facts["torch"].partition("+")[0],
        triton=facts["triton"],
        numpy=facts["numpy"],
        backends=", ".join(name for name, reason in facts["backends"].items() if reason is None),
        machine=facts["machine"],
        passed=str(counts["tests"] - count - counts["skipped"]),
        skipped=str(counts["skipped"]),
        failed=f"{count}: {names}{more}" if count else "0",
    )


def try_combination(chosen: Combination, python: str, wheel: Path, folder: Path) -> Row:
    """Install and test one combination, and remove its environment."""
    venv = folder / "venv"
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    row = Row(chosen.python, chosen.torch, date=today)
    try:
        subprocess.run([python, "-m", "venv", str(venv)], check=True)
        requirements = [str(wheel), f"torch=={chosen.torch}", *TOOLS, *chosen.beside]
        install = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", *requirements]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return row._replace(failed="not installed: " + (reasons or ["pip failed"])[0])
        return tested(row, venv, folder / f"{re.sub(r'[^0-9.]+', '_', str(chosen))}.xml")
    finally:
        shutil.rmtree(venv, ignore_errors=True)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and removes the environment
    pythons = interpreters()
    chosen = combinations(pythons)
    folder = Path(tempfile.mkdtemp(prefix="matrix-", dir=os.environ.get("MATRIX_FOLDER")))
    print(f"{len(chosen)} combinations; logs in {folder}", flush=True)
    wheels: dict[str, Path] = {}
    for one in chosen:
        print(f"Python {one.python}, torch {one.torch} {' '.join(one.beside)}", flush=True)
        if one.python not in pythons:
            sys.exit(
                f"Python {one.python} is not here; name it with MATRIX_PYTHONS. Found {', '.join(pythons)}."
            )
        if one.python not in wheels:
            (folder / one.python).mkdir()
            wheels[one.python] = build_wheel(pythons[one.python], folder / one.python)
        started = time.monotonic()
        row = try_combination(one, pythons[one.python], wheels[one.python], folder)
        minutes = (time.monotonic() - started) / 60
        print(
            f"  {row.passed} passed, {row.skipped} skipped, failed: {row.failed} ({minutes:.0f} minutes)",
            flush=True,
        )
        write_rows(PAGE, [row, *read_rows(PAGE)])


if __name__ == "__main__":
    main()
