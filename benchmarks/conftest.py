"""Options, cases and the record of `make bench`."""

from __future__ import annotations

import os
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
from benchmarks.cases import Case, cases, dtype_name
from benchmarks.prepared import Prepared, too_little_memory

# One case of each kind: a layer and a pyramid, in the dtype of which torch.compile is quickest.
QUICK_NAMES, QUICK_DTYPE = ("enc1-128", "pyramid-32"), "float32"
# Seconds of measuring for each test. A GPU's times scatter less, and a lent one is short of time.
BUDGETS, QUICK_BUDGET = {"cpu": 0.5, "cuda": 0.15}, 0.05

_BEGIN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fdkernels")
    group.addoption("--quick", action="store_true", help="few cases and rounds: does it run?")
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
        help="start no case after this time; the report has what was measured until then",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_only: a measurement that a GPU does not need")
    # pytest-benchmark would find only at the end that there is no such folder.
    path = config.getoption("--benchmark-json")
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "prepared" in metafunc.fixturenames:
        chosen = _chosen_cases(metafunc.config)
        if metafunc.definition.get_closest_marker("cpu_only"):
            chosen = [case for case in chosen if case.device == "cpu"]
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
    reason = too_little_memory(case)
    if reason is not None:
        pytest.skip(f"too little memory: {reason}")
    yield Prepared(case)
    torch.compiler.reset()
    if case.device == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def budget(request: pytest.FixtureRequest, prepared: Prepared) -> float:
    """Seconds of measuring."""
    quick = request.config.getoption("--quick")
    return QUICK_BUDGET if quick else BUDGETS[prepared.case.device]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Replace what names the machine and not its kind by what decides speed."""
    machine_info.clear()
    machine_info.update(record.machine(config.getoption("--device")))


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """A copy of the tree without its history is told its commit by FDKERNELS_COMMIT."""
    if "FDKERNELS_COMMIT" in os.environ:
        commit_info["id"] = os.environ["FDKERNELS_COMMIT"]


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Add the command; leave out single rounds, of which `extra_info` holds the quartiles."""
    output_json["command"] = record.command([str(arg) for arg in config.invocation_params.args])
    output_json["quick"] = config.getoption("--quick")
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
        for name in ("params", "options"):  # `extra_info` says it all
            entry.pop(name, None)


def _chosen_cases(config: pytest.Config) -> list[Case]:
    device = config.getoption("--device")
    devices = ["cpu", "cuda"] if device == "all" else [device]
    if device == "all" and not torch.cuda.is_available():
        devices = ["cpu"]
    chosen = [case for name in devices for case in cases(name)]
    if config.getoption("--quick"):
        chosen = [
            case for case in chosen if case.name in QUICK_NAMES and dtype_name(case.dtype) == QUICK_DTYPE
        ]
    return chosen
