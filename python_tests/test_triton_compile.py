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


KERNELS = {
    "region_sums": ["forward", "reduce", "backward", "mask_backward"],
    "log_norm": ["forward", "backward"],
    "layer_losses": ["forward"],
    "layer_masks": ["forward"],
}


@pytest.mark.parametrize("stage", KERNELS)
@pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=pytest.mark.slow), 90], ids=lambda number: f"sm_{number}"
)
def test_every_kernel_compiles(stage, capability, tmp_path):
    ptx = compiled(stage, capability, tmp_path)
    assert ptx.keys() == {f"{stage}_{name}_kernel" for name in KERNELS[stage]}
    assert all(len(of_kernel) > 2 for of_kernel in ptx.values())
    targets = {re.search(r"\.target (sm_\d+)", text)[1] for of_kernel in ptx.values() for text in of_kernel}
    assert targets == {f"sm_{capability}"}


@pytest.mark.parametrize("case", ["contiguous-float32", "channels_last-bfloat16"])
def test_a_pyramid_is_compiled_once_for_all_batches_and_moves_16_bytes_an_access(case, tmp_path):
    """Also where one small layer is not aligned, and the masks of full size are bytes."""
    ptx = compiled(case, 90, tmp_path)
    assert ptx.keys() == {"region_sums_forward_kernel", "region_sums_backward_kernel"}
    assert all(len(of_kernel) == 1 for of_kernel in ptx.values())
    (forward,), (backward,) = ptx["region_sums_forward_kernel"], ptx["region_sums_backward_kernel"]
    assert "ld.global.v4.b32" in forward
    assert "st.global.v4.b32" in backward


def compiled(what, capability, tmp_path):
    """The PTX of each kernel that a function of this file launches, in a process without the interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, __file__, what, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def _compile_only(capability):
    """Make every launch of this process a compilation; the dict fills with the kernels by name."""
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
    from fdkernels.region_sums.impl import triton_layers

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
    triton_layers._WIDE = 0
    triton_layers.plan_layers.cache_clear()
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


def _run_layer_losses():
    from fdkernels.layer_losses.impl import triton as backend
    from fdkernels.log_norm.options import Options

    layers = [_contiguous(4, 16, 64, 64), _contiguous(4, 300, 4, 4)]
    fg = [_one_element(4, 4096, dtype=U8), _one_element(4, 16)]
    pairings = {
        "none": None,
        "shuffle": torch.zeros(4, dtype=torch.int64),
        "pooled": torch.zeros(3, 2, dtype=torch.int64),
    }
    for norm, weight, exchange, with_slopes in (
        ("vector", "region", "shuffle", False),
        ("relative", "none", "pooled", True),
        ("batch", "pixels", "pooled", True),
    ):
        options = Options(weight, weight == "pixels", norm, 0.5, 1e-12, exchange, "mean")
        backend.forward(layers, fg, [], pairings[exchange], options, with_slopes)


def _run_layer_masks():
    from fdkernels.layer_masks.impl import triton as backend

    sizes = [torch.Size([size, size]) for size in (64, 9)]
    for dtype, how, ignore_index, wide in (
        (torch.bool, "area", None, F32),
        (U8, "max", 255, F32),
        (torch.int64, "nearest", -1, F32),
        (BF16, "area", 0.1, F32),
        (F64, "max", 0.1, F64),
    ):
        backend.forward(torch.ones(2, 1, 64, 64, dtype=dtype), sizes, wide, how, ignore_index)
    backend._WIDE = 0
    backend.forward(torch.ones(2, 1, 64, dtype=F32), [torch.Size([5])], F32, "area", 0.1)


def _run_pyramid(lay_out, dtype):
    from fdkernels.region_sums.geometry import Geometry
    from fdkernels.region_sums.impl import triton as backend

    for batch in (4, 3, 1):
        layers = [lay_out(batch, C, s, s, dtype=dtype) for C, s in ((64, 32), (128, 16), (128, 7))]
        fg = [torch.empty(batch, 32 * 32, dtype=U8), torch.empty(batch, 256), torch.empty(batch, 49)]
        backend.sum_tiles(layers, fg, [])
        geometry = [Geometry(tuple(F.shape), F.stride(), F.dtype) for F in layers]
        backend.write_gradients(torch.empty(2, batch, 320), torch.empty(3), fg, [], layers, geometry)


def _main():
    kernels = _compile_only(int(sys.argv[2]))
    {
        "region_sums": _run_region_sums,
        "log_norm": _run_log_norm,
        "layer_losses": _run_layer_losses,
        "layer_masks": _run_layer_masks,
        "contiguous-float32": lambda: _run_pyramid(_contiguous, F32),
        "channels_last-bfloat16": lambda: _run_pyramid(_channels_last, BF16),
    }[sys.argv[1]]()
    ptx = {
        name: [kernel.asm["ptx"] for kernel in of_name.values()]
        for name, of_name in kernels.items()
        if sys.argv[1] not in KERNELS or name.startswith(sys.argv[1])
    }
    print(json.dumps(ptx))  # noqa: T201


if __name__ == "__main__":
    _main()
