"""Forward and backward into a fresh gradient, as a training step does, and the backward kernel alone."""

from __future__ import annotations

import pytest

from benchmarks.prepared import Measure, Prepared


def test_forward_backward(prepared: Prepared, measure: Measure) -> None:
    measure("forward+backward", {**prepared.steps, "floor": prepared.floors.forward_backward})


@pytest.mark.kernel
def test_kernel_backward(prepared: Prepared, measure: Measure) -> None:
    measure("kernel backward", {"kernel": prepared.kernels.backward, "floor": prepared.floors.backward})


@pytest.mark.kernel
@pytest.mark.cpu_only  # the memory that a GPU's allocator gives is warm
def test_kernel_backward_into_warm_memory(prepared: Prepared, measure: Measure) -> None:
    measure("kernel backward, warm", {"kernel": prepared.kernels.warm, "floor": prepared.floors.warm})


@pytest.mark.kernel
def test_tap(prepared: Prepared, measure: Measure) -> None:
    tapped = prepared.tapped
    measure("tap", {"tap": tapped.tap, "separate": tapped.separate, "floor": tapped.floor})
