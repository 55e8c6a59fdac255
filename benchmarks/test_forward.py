"""Forward: the loss beside one read of the features, and beside what a user would write instead."""

from __future__ import annotations

import pytest

from benchmarks.prepared import Measure, Prepared


def test_forward(prepared: Prepared, measure: Measure) -> None:
    measure("forward", {**prepared.losses, "floor": prepared.floors.forward})


@pytest.mark.kernel
def test_kernel_forward(prepared: Prepared, measure: Measure) -> None:
    measure("kernel forward", {"kernel": prepared.kernels.forward, "floor": prepared.floors.forward})
