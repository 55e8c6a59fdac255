"""The five functions in every language."""

from __future__ import annotations

import os

import pytest

import fdkernels as fdk
from cuda_emulation.build import emulate
from fdkernels.op.kernels import Kernels, kernels_of


@pytest.fixture(params=["reference", "cpu", "triton", "cuda", "cuda on the cpu"])
def language(request: pytest.FixtureRequest) -> tuple[Kernels, str]:
    """The kernels in each language and a device for them; the CUDA sources also compiled for the host."""
    name = request.param
    if name == "cuda on the cpu":
        return emulate().backend, "cpu"
    if reason := fdk.backends()[name]:
        pytest.skip(f"backend {name!r}: {reason}")
    on_gpu = name == "cuda" or (name == "triton" and os.environ.get("TRITON_INTERPRET") != "1")
    return kernels_of(name), "cuda" if on_gpu else "cpu"
