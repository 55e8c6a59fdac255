"""Options, cases and the record of `make bench`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# At the end, as `import fdkernels` must be the installed package and not this source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from benchmarks.case_sets import SETS, cases
from benchmarks.cases import Case
from benchmarks.memory import does_not_fit
from benchmarks.prepared import Measure, Prepared
from benchmarks.results import write_results
from benchmarks.timing import Functions

# Seconds of measuring for each test. A GPU's times scatter less, and a lent one is short of time.
BUDGETS, QUICK_BUDGET = {"cpu": 0.4, "cuda": 0.15}, 0.05

_BEGIN = time.monotonic()
_ENTRIES = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fdkernels")
    group.addoption(
        "--set",
        default="core,scaling",
        type=_sets,
        metavar="NAMES",
        help=f"which cases, separated by commas: {', '.join(SETS)}; the default is core,scaling",
    )
    group.addoption("--quick", action="store_true", help="two cases and few rounds: does it run?")
    group.addoption("--results", type=Path, metavar="FILE", help="write what is measured, after each case")
    group.addoption(
        "--device",
        choices=("all", "cpu", "cuda"),
        default="all",
        help="where to measure; all is the CPU and, where there is one, the GPU",
    )
    group.addoption(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="start no case after this time; the results have what was measured until then",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernel: a measurement of the kernels, which every mask has alike")
    config.addinivalue_line("markers", "cpu_only: a measurement that a GPU does not need")
    config.stash[_ENTRIES] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "prepared" in metafunc.fixturenames:
        chosen = _chosen_cases(metafunc.config)
        if metafunc.definition.get_closest_marker("cpu_only"):
            chosen = [case for case in chosen if case.device == "cpu"]
        if metafunc.definition.get_closest_marker("kernel"):
            chosen = [case for case in chosen if case.is_plain]
        # Scope session, so that all tests of a case follow one another and it is prepared once.
        metafunc.parametrize(
            "prepared", chosen, indirect=True, scope="session", ids=[case.id for case in chosen]
        )


@pytest.fixture(scope="session")
def prepared(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    """The case, made ready and compared with the truth."""
    case: Case = request.param
    limit = request.config.getoption("--time-limit")
    if limit is not None and time.monotonic() - _BEGIN > limit:
        pytest.skip(f"the time limit of {limit:g} s has passed")
    reason = does_not_fit(case)
    if reason is not None:
        pytest.skip(f"too little memory: {reason}")
    yield Prepared(case)
    torch.compiler.reset()
    if case.device == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def measure(request: pytest.FixtureRequest, prepared: Prepared, benchmark: Any) -> Measure:
    """Times the functions of a mode and writes the results so far."""
    config = request.config
    budget = QUICK_BUDGET if config.getoption("--quick") else BUDGETS[prepared.case.device]

    def run(mode: str, functions: Functions) -> None:
        entry = prepared.measure(benchmark, mode, functions, budget)
        if entry is not None:
            config.stash[_ENTRIES].append(entry)
            _write(config)

    return run


def _write(config: pytest.Config) -> None:
    path: Path | None = config.getoption("--results")
    if path is None:
        return
    header = record.header(
        ["pytest", *config.invocation_params.args], config.getoption("--device"), config.getoption("--quick")
    )
    write_results(path, header, config.stash[_ENTRIES])


def _sets(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in SETS:
            raise pytest.UsageError(f"--set takes {', '.join(SETS)}, got {name!r}")
    return names


def _chosen_cases(config: pytest.Config) -> list[Case]:
    device = config.getoption("--device")
    devices = ["cpu", "cuda"] if device == "all" else [device]
    if device == "all" and not torch.cuda.is_available():
        devices = ["cpu"]
    sets = ("quick",) if config.getoption("--quick") else config.getoption("--set")
    return [case for name in devices for case in cases(name, sets)]
