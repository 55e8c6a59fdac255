"""Microseconds that a call takes on the host beside its kernels: `python -m benchmarks.host --output FILE`.

The kernels are left out: what stands in their place returns at once. The road of CUDA runs on tensors of the
CPU, and without a stream to ask for, so that no GPU is needed; on one, memory comes from another allocator.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks import cases, peers
from benchmarks.cases import Case, named_case
from benchmarks.instructions import step_by
from fdkernels import FeatureDiscrepancyLoss, checks
from fdkernels.op import cpu, cuda, kernels

ROADS = ("cpu", "cuda")
ROUNDS, CALLS = 200, 10  # the median of so many rounds, each the mean of some calls


def main(options: Sequence[str] | None = None) -> int:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the JSON to write")
    output = parser.parse_args(options).output
    torch.set_num_threads(1)
    entries = [measure(road) for road in ROADS]
    head = cases.header(["python", "-m", "benchmarks.host", *sys.argv[1:]], "cpu")
    cases.write_results(output, head, entries, "host")
    for entry in entries:
        print(entry["road"], *(f"{name} {us:.0f} µs" for name, us in entry["microseconds"].items()), sep="  ")
    return 0


def measure(road: str) -> dict[str, Any]:
    """The entry of a road: the median of each call."""
    with without_kernels(road):
        return {"road": road, "microseconds": {name: _median(call) for name, call in calls().items()}}


def calls() -> dict[str, Callable[[], object]]:
    """The calls by name: one small map, nine, and nine by the criterion, forward and with backward."""
    variant = (torch.float32, "contiguous", "cpu")
    small = Case("4x64x8x8", ((4, 64, 8, 8),), (8, 8), *variant)
    found: dict[str, Callable[[], object]] = {}
    for case in (small, named_case("pyramid-32", *variant)):
        inputs = cases.make_inputs(case)
        loss = peers.contenders(case, inputs, compiled=False)["op"]
        found |= {
            f"op forward {case.name}": loss,
            f"op forward+backward {case.name}": step_by(inputs.layers, loss),
        }
    criterion = FeatureDiscrepancyLoss(len(inputs.layers), alpha_init=0.1, patience=10**9)
    loss = lambda: criterion(inputs.layers, inputs.mask)  # noqa: E731
    found["criterion forward+backward pyramid-32"] = step_by([*inputs.layers, criterion.alpha], loss)
    return found


@contextlib.contextmanager
def without_kernels(road: str) -> Iterator[None]:
    """Let calls on the CPU take a road whose kernels do nothing."""
    module = {"cpu": cpu, "cuda": cuda}[road]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "_C", _idle(module._C)))  # noqa: SLF001
        stack.enter_context(mock.patch.dict(kernels._kernels, {"cpu": module}))  # noqa: SLF001
        if road == "cuda":
            stack.enter_context(mock.patch.object(cuda, "current_stream", _stream))
            # Of a GPU no values are read: the host would wait for it.
            stack.enter_context(mock.patch.object(checks, "values_are_readable", _are_not))
        yield


def _idle(module: ModuleType) -> SimpleNamespace:
    """The compiled module with kernels that find every mask right and write nothing."""
    names = {name: getattr(module, name) for name in dir(module)}
    return SimpleNamespace(
        **{name: _return_true if name.startswith(("cpu_", "cuda_")) else it for name, it in names.items()},
        **{name: _return_true for name in ("cuda_masks", "cuda_sums", "cuda_gradient") if name not in names},
    )


def _return_true(*_: object, **__: object) -> bool:
    return True


def _stream(_: torch.device) -> int:
    return 0


def _are_not(_: torch.Tensor) -> bool:
    return False


def _median(call: Callable[[], object]) -> float:
    """Microseconds of a call."""
    means = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in itertools.repeat(None, CALLS):
            call()
        means.append((time.perf_counter() - begin) / CALLS)
    return round(1e6 * statistics.median(means), 1)


if __name__ == "__main__":
    sys.exit(main())
