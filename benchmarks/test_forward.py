"""Forward: the loss beside one read of the features, and beside what a user would write instead."""

from __future__ import annotations

from typing import Any

from benchmarks.prepared import Prepared


def test_forward(prepared: Prepared, benchmark: Any, budget: float) -> None:
    functions = {**prepared.losses, "floor": prepared.floors.forward}
    prepared.measure(benchmark, "forward", functions, budget)


def test_kernel_forward(prepared: Prepared, benchmark: Any, budget: float) -> None:
    functions = {"kernel": prepared.kernels.forward, "floor": prepared.floors.forward}
    prepared.measure(benchmark, "kernel forward", functions, budget)
