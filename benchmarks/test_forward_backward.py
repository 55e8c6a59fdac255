"""Forward and backward into a fresh gradient, as a training step does, and the backward kernel alone."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.prepared import Prepared


def test_forward_backward(prepared: Prepared, benchmark: Any, budget: float) -> None:
    functions = {**prepared.steps, "floor": prepared.floors.forward_backward}
    prepared.measure(benchmark, "forward+backward", functions, budget)


def test_kernel_backward(prepared: Prepared, benchmark: Any, budget: float) -> None:
    functions = {"kernel": prepared.kernels.backward, "floor": prepared.floors.backward}
    prepared.measure(benchmark, "kernel backward", functions, budget)


@pytest.mark.cpu_only  # the memory that a GPU's allocator gives is warm
def test_kernel_backward_into_warm_memory(prepared: Prepared, benchmark: Any, budget: float) -> None:
    functions = {"kernel": prepared.kernels.warm, "floor": prepared.floors.warm}
    prepared.measure(benchmark, "kernel backward, warm", functions, budget)
