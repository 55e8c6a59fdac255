"""The Triton kernels compile for GPUs that need not be here, as their launchers launch them.

The interpreter takes what the compiler refuses, a variable that changes its type in a branch for
one. So a process without TRITON_INTERPRET runs this file, which calls the backends on CPU tensors
and turns every launch into a compilation; down to machine code that needs no driver.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch

F32, F64, BF16, F16, U8 = torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8


@pytest.mark.parametrize("stage", ["region_sums", "log_norm"])
@pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=pytest.mark.slow), 90], ids=lambda number: f"sm_{number}"
)
def test_every_kernel_compiles(stage, capability, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, __file__, stage, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    targets = json.loads(run.stdout)
    passes = ["forward", "backward"] + ["reduce", "mask_backward"] * (stage == "region_sums")
    assert targets.keys() == {f"{stage}_{name}_kernel" for name in passes}
    assert all(len(of_kernel) > 2 for of_kernel in targets.values())
    assert {re.sub("a$", "", target) for of_kernel in targets.values() for target in of_kernel} == {
        f"sm_{capability}"
    }


def _compile_only(capability):
    """Make every launch of this process a compilation; the dict fills with a target for each."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    triton.runtime.driver.set_active(Driver())
    kernels = {}
    launch = JITFunction.run

    def compile_instead(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.setdefault(self.fn.__name__, {})[id(kernel)] = kernel
        return kernel

    JITFunction.run = compile_instead
    return kernels


def _contiguous(*shape, dtype=F32):
    return torch.empty(shape, dtype=dtype)


def _channels_last(*shape, dtype=F32):
    return torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last)


def _cropped(*shape, dtype=F32):
    bigger = torch.empty([size + 2 for size in shape], dtype=dtype)
    return bigger[tuple(slice(1, size + 1) for size in shape)]


def _one_element(*shape, dtype=F32):
    return torch.empty(1, dtype=dtype).expand(shape)


# Features, dtype of the masks, whether the background has its own, whether there is upstream.
REGION_SUMS_CASES = [
    ([_contiguous(2, 64, 32, 32)], U8, False, False),
    ([_contiguous(2, 64, 32, 32, dtype=BF16)], F32, True, True),
    ([_contiguous(2, 3, 7, 5, dtype=F16)], U8, True, True),
    ([_contiguous(1, 1, 1, dtype=F64)], F64, False, True),
    ([_channels_last(2, 64, 32, 32)], F32, False, True),
    ([_channels_last(2, 17, 5, 3, dtype=BF16)], U8, False, False),
    ([_cropped(2, 5, 6, 7, dtype=F16)], F64, False, False),
    ([_cropped(2, 5, 6, 7, 8)], U8, True, True),
    ([_contiguous(2, 32, 48), _channels_last(2, 8, 4, 4, dtype=F64)], F32, True, True),
    ([_contiguous(2, 32, 48, dtype=F64), _channels_last(2, 8, 4, 4, dtype=BF16)], F32, True, True),
]
# More pixels than 32 bits count, in the memory of one.
HUGE = _one_element(1, 2, 2**16, 2**15 + 1)


def _run_region_sums():
    from fdkernels.region_sums.geometry import Geometry
    from fdkernels.region_sums.impl import triton as backend

    def run(layers, mask_dtype, has_bg, has_upstream, mask_gradient=True):
        sizes = [(F.shape[0], F.shape[2:].numel()) for F in layers]
        fg = [_one_element(*size, dtype=mask_dtype) for size in sizes]
        bg = [_one_element(*size, dtype=mask_dtype) for size in sizes] if has_bg else []
        sums, _ = backend.forward(layers, fg, bg)
        geometry = [Geometry(tuple(F.shape), F.stride(), F.dtype) for F in layers]
        upstream, features = layers if has_upstream else [], layers if mask_gradient else []
        backend.backward(sums, fg, bg, upstream, features, geometry)

    for case in REGION_SUMS_CASES:
        run(*case)
    run([HUGE], U8, has_bg=True, has_upstream=True, mask_gradient=False)
    backend._WIDE_PIXELS = 0
    run(*REGION_SUMS_CASES[0])


def _run_log_norm():
    from fdkernels.log_norm.impl import triton as backend
    from fdkernels.log_norm.options import EXCHANGES, NORMS, REDUCTIONS, REGION_WEIGHTS, Options

    pairings = {
        "none": None,
        "shuffle": torch.zeros(4, dtype=torch.int64),
        "pooled": torch.zeros(3, 2, dtype=torch.int64),
    }
    for number, (norm, exchange) in enumerate(itertools.product(NORMS, EXCHANGES)):
        weight = REGION_WEIGHTS[(number + number // 4) % 4]
        reduction = REDUCTIONS[(number + number // 3) % 3]
        dtype = (F32, F64)[number % 2]
        channels = ([16, 5], [300])[number % 2]
        options = Options(weight, number % 3 == 0, norm, 0.5, 1e-12, exchange, reduction)
        sums = torch.empty(2, 4, sum(channels), dtype=dtype)
        masses = torch.empty(2, 4, len(channels), dtype=dtype)
        arguments = (sums, masses, pairings[exchange], channels, [9] * len(channels), options)
        loss = backend.forward(*arguments)
        backend.backward(loss, *arguments)


def _main():
    kernels = _compile_only(int(sys.argv[2]))
    {"region_sums": _run_region_sums, "log_norm": _run_log_norm}[sys.argv[1]]()
    targets = {
        name: [re.search(r"\.target (\w+)", kernel.asm["ptx"])[1] for kernel in of_name.values()]
        for name, of_name in kernels.items()
    }
    print(json.dumps(targets))  # noqa: T201


if __name__ == "__main__":
    _main()
