"""The Triton kernels compile for GPUs that need not be here, as their launchers launch them.

The interpreter takes what the compiler refuses, a variable that changes its type in a branch for
one. So a process without TRITON_INTERPRET runs this file, which calls the backends on CPU tensors
and turns every launch into a compilation; down to machine code that needs no driver.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

F32, F64, BF16, F16, U8 = torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8


# The kernels that each function of the backend launches.
KERNELS = {
    "masks": ["masks"],
    "sums": ["sums", "second_pass"],
    "sums_and_losses": ["sums", "losses"],
    "losses": ["losses"],
    "gradient": ["gradient"],
    "mask_gradient": ["mask_gradient"],
    "region_sums": ["region_sums", "second_pass"],
    "region_gradient": ["region_gradient"],
    "region_weight_gradient": ["region_weight_gradient"],
    "norm_forward": ["norm_moments", "norm_statistics", "norm_apply"],
    "norm_backward": ["norm_reduce", "norm_coefficients", "norm_gradient"],
}


@pytest.mark.parametrize("function", KERNELS)
@pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=pytest.mark.slow), 90], ids=lambda number: f"sm_{number}"
)
def test_every_kernel_compiles(function, capability, tmp_path):
    ptx = compiled(function, capability, tmp_path)
    assert ptx.keys() == {f"{name}_kernel" for name in KERNELS[function]}
    assert all(len(of_kernel) > 2 for name, of_kernel in ptx.items() if name != "second_pass_kernel")
    targets = {re.search(r"\.target (sm_\d+)", text)[1] for of_kernel in ptx.values() for text in of_kernel}
    assert targets == {f"sm_{capability}"}


@pytest.mark.parametrize("case", ["contiguous-float32", "channels_last-bfloat16"])
def test_a_pyramid_is_compiled_once_for_all_batches_and_moves_16_bytes_an_access(case, tmp_path):
    """Also where one small layer is not aligned, and the masks of full size are bytes."""
    ptx = compiled(case, 90, tmp_path)
    assert ptx.keys() == {"sums_kernel", "gradient_kernel"}
    assert all(len(of_kernel) == 1 for of_kernel in ptx.values())
    (forward,), (backward,) = ptx["sums_kernel"], ptx["gradient_kernel"]
    assert "ld.global.v4.b32" in forward
    assert "st.global.v4.b32" in backward


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_norm_is_compiled_once_for_all_sizes_and_moves_16_bytes_an_access(layout, tmp_path):
    ptx = compiled(f"norm {layout}", 90, tmp_path)
    assert ptx.keys() == {f"{name}_kernel" for name in KERNELS["norm_forward"] + KERNELS["norm_backward"]}
    assert {name: len(of_kernel) for name, of_kernel in ptx.items()} == dict.fromkeys(ptx, 1)
    for name in ("norm_moments", "norm_apply", "norm_reduce", "norm_gradient"):
        assert "ld.global.v4.b32" in ptx[f"{name}_kernel"][0]
    for name in ("norm_apply", "norm_gradient"):
        assert "st.global.v4.b32" in ptx[f"{name}_kernel"][0]


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


# Features, dtype of the weights (None is the accumulation dtype), whether the background has its own, and
# whether an upstream gradient arrives.
CASES = [
    ([_contiguous(2, 64, 32, 32)], U8, False, False),
    ([_contiguous(2, 64, 32, 32, dtype=BF16)], None, True, True),
    ([_contiguous(2, 3, 7, 5, dtype=F16)], U8, True, True),
    ([_contiguous(1, 1, 1, dtype=F64)], None, False, True),
    ([_channels_last(2, 64, 32, 32)], None, False, True),
    ([_channels_last(2, 17, 5, 3, dtype=BF16)], U8, False, False),
    ([_cropped(2, 5, 6, 7, dtype=F16)], None, False, False),
    ([_cropped(2, 5, 6, 7, 8)], U8, True, True),
    ([_contiguous(2, 32, 48), _channels_last(2, 8, 4, 4, dtype=F64)], None, True, True),
    ([_contiguous(2, 32, 48, dtype=F64), _channels_last(2, 8, 4, 4, dtype=BF16)], None, True, True),
]
# Features, dtype of the weights, how many regions, whether there are moments and an upstream gradient; the
# first pixels are selected out under moments.
REGION_CASES = [
    ([_contiguous(2, 64, 32, 32)], U8, 8, False, False),
    ([_contiguous(2, 64, 32, 32, dtype=BF16), _contiguous(2, 9, 5, 3, dtype=BF16)], None, 2, True, True),
    ([_channels_last(2, 64, 32, 32)], U8, 3, True, True),
    ([_channels_last(2, 16, 9, 4, dtype=F64), _cropped(2, 5, 6, 7, dtype=F16)], None, 4, True, False),
    ([_contiguous(2, 8, 16, 16, dtype=F16), _cropped(2, 5, 6, 7, 8, dtype=F16)], None, 17, True, True),
]
# A map, dtype of the weights (False without any), whether the background has its own, activation and whether
# it comes first, whether the statistics are those of samples, dtype of the parameters, and whether statistics
# are given.
NORM_CASES = [
    (_contiguous(2, 64, 32, 32), U8, False, "relu", False, False, F32, False),
    (_contiguous(2, 64, 32, 32), False, False, "relu", False, False, F32, False),
    (_contiguous(2, 64, 32, 32, dtype=BF16), None, True, "leaky_relu", False, True, F32, False),
    (_contiguous(2, 16, 9, dtype=BF16), False, False, "leaky_relu", True, False, F32, False),
    (_contiguous(2, 5, 7, 3, dtype=F16), U8, True, "relu", True, True, None, False),
    (_contiguous(2, 16, 8, 8, dtype=F64), None, False, "leaky_relu", False, False, F64, False),
    (_contiguous(300, 3, 5, 5, 5, dtype=F64), False, False, "none", False, True, F64, True),
    (_contiguous(40, 3, 64, 64), None, True, "relu", False, False, F64, True),
    (_channels_last(2, 64, 32, 32), U8, True, "relu", False, False, F32, False),
    (_channels_last(2, 64, 32, 32), False, False, "relu", False, False, F32, True),
    (_channels_last(2, 64, 32, 32, dtype=BF16), None, False, "relu", False, False, F32, False),
    (_channels_last(2, 5, 7, 3, dtype=BF16), False, False, "none", False, True, None, True),
    (_channels_last(2, 20, 7, 3, dtype=F16), None, True, "leaky_relu", True, True, F32, False),
    (_channels_last(2, 16, 8, 8, dtype=F64), None, True, "relu", True, False, F64, False),
    (_channels_last(2, 16, 8, 8, dtype=F64), False, False, "leaky_relu", False, True, F64, False),
    (_contiguous(1, 1, 2), U8, False, "none", False, False, None, False),
    # More elements in a sample than offsets of 32 bits reach, and more pixels; never touched.
    (_contiguous(1, 3, 2**15, 2**14, dtype=F16), U8, False, "relu", False, False, F32, False),
    (_channels_last(1, 64, 2**13, 2**11, dtype=F16), U8, True, "relu", False, False, F32, False),
    (_contiguous(1, 1, 2**16, 2**15, dtype=F16), False, False, "relu", False, True, F32, False),
]
# More pixels than 32 bits count, in the memory of one.
HUGE = ([_one_element(1, 2, 2**16, 2**15 + 1)], U8, True, True)


def _run(function):
    """Calls that launch the kernels of a function, also with offsets of 64 bits."""
    from fdkernels.op.triton import launch

    calls = {"sums": _sums, "gradient": _gradient, "mask_gradient": _mask_gradient}
    if function.startswith("norm_"):
        for case in NORM_CASES:
            _norm(function, *case)
    elif function.startswith("region_"):
        for case in REGION_CASES:
            _regions(function, *case)
        launch._WIDE = 0
        launch.plan_layers.cache_clear()
        _regions(function, *REGION_CASES[1])
    elif function in calls:
        for case in CASES:
            calls[function](*case)
        if function != "mask_gradient":
            calls[function](*HUGE)
        launch._WIDE = 0
        launch.plan_layers.cache_clear()
        calls[function](*CASES[0])
    else:
        {"masks": _masks, "losses": _losses, "sums_and_losses": _sums_and_losses}[function]()


def _weights(layers, dtype, has_bg):
    from fdkernels.op.pyramid import Weights, accumulate_dtype

    dtype = accumulate_dtype(layers) if dtype is None else dtype
    both = [[_one_element(F.shape[0], F.shape[2:].numel(), dtype=dtype) for F in layers] for _ in range(2)]
    return Weights(both[0], both[1] if has_bg else [])


def _as_they_are(layers):
    """A pyramid whose gradients have the strides of the features, dense or not."""
    from fdkernels.op.pyramid import Layer, describe

    own = tuple(Layer(tuple(F.shape), F.stride(), F.dtype) for F in layers)
    strides = tuple(F.stride() for F in layers)
    return replace(describe(layers), layers=own, strides=strides)


def _sums(layers, dtype, has_bg, has_upstream):
    from fdkernels.op import triton as backend

    backend.sums(layers, _weights(layers, dtype, has_bg), _as_they_are(layers), None, None, False)


def _grad_sums(layers):
    pyramid = _as_they_are(layers)
    return pyramid, torch.empty(2, layers[0].shape[0], sum(pyramid.channels), dtype=pyramid.dtype)


def _gradient(layers, dtype, has_bg, has_upstream):
    from fdkernels.op import triton as backend

    pyramid, g = _grad_sums(layers)
    factor = torch.empty(len(layers), dtype=g.dtype) if has_upstream else None
    weights = _weights(layers, dtype, has_bg)
    backend.gradient(g, factor, weights, layers if has_upstream else [], pyramid)


def _mask_gradient(layers, dtype, has_bg, has_upstream):
    from fdkernels.op import triton as backend

    backend.mask_gradient(_grad_sums(layers)[1], _weights(layers, dtype, has_bg), layers)


def _regions(function, layers, dtype, count, moments, has_upstream):
    from fdkernels.op import triton as backend
    from fdkernels.op.pyramid import Regions

    pyramid = _as_they_are(layers)
    weights = [
        _one_element(F.shape[0], count, F.shape[2:].numel(), dtype=dtype or pyramid.dtype) for F in layers
    ]
    g = torch.empty((2 if moments else 1) * count, 2, pyramid.total_channels, dtype=pyramid.dtype)
    regions = Regions(weights, moments, g[:count] if moments else None)
    if function == "region_sums":
        backend.region_sums(layers, regions, pyramid)
    elif function == "region_gradient":
        upstream = [layers[0], *[None] * (len(layers) - 1)] if has_upstream else []
        backend.region_gradient(g, regions, layers, upstream, pyramid)
    else:
        backend.region_weight_gradient(g, regions, layers)


def _norm(function, x, dtype, has_bg, activation, first, instance, kept, given):
    """A call; of the backward also some that leave out what is not needed."""
    from fdkernels.op import triton as backend
    from fdkernels.op.norm_formula import Formula, NormInputs, Running

    N, C = x.shape[:2]
    formula = Formula(instance, 1e-5, activation, 0.1 if activation == "leaky_relu" else 0.0, first)
    weight, bias = (None, None) if kept is None else (torch.ones(C, dtype=kept) for _ in range(2))
    weights = None if dtype is False else _weights([x], dtype, has_bg)
    statistics = torch.ones((2, N, C) if instance else (2, C), dtype=F64)
    if function == "norm_forward":
        inputs = NormInputs(x, weight, bias, statistics if given else None, given)
        running = None if weight is None or given else Running(weight, weight, 0.1)
        backend.norm_forward(inputs, formula, running, weights)
        return
    inputs = NormInputs(x, weight, bias, statistics, given)
    added = None
    if weights is not None:
        added = torch.ones(2, N, C, dtype=F64 if x.dtype == F64 else F32), weights
    for needs in ((True, True, True), (True, False, False), (False, False, True)):
        backend.norm_backward(inputs, formula, x, added, needs)


def _run_norm(lay_out):
    from fdkernels.op import triton as backend
    from fdkernels.op.norm_formula import Formula, NormInputs, Running
    from fdkernels.op.pyramid import Weights

    formula = Formula(False, 1e-5, "relu")
    for N, C, size in ((4, 64, 32), (3, 128, 16), (1, 64, 48)):
        x, of_channel = lay_out(N, C, size, size), torch.ones(C)
        inputs = NormInputs(x, of_channel, of_channel, None, False)
        weights = Weights([torch.ones(N, size * size)], [])
        running = Running(of_channel, of_channel, 1 / N)
        _y, statistics, _sums = backend.norm_forward(inputs, formula, running, weights)
        inputs = inputs._replace(statistics=statistics)
        backend.norm_backward(inputs, formula, x, (torch.ones(2, N, C), weights), (True, True, True))


PAIRINGS = {
    "none": None,
    "shuffle": torch.zeros(4, dtype=torch.int64),
    "pooled": torch.zeros(3, 2, dtype=torch.int64),
}


def _losses():
    from fdkernels.conventions import EXCHANGES, NORMS, REGION_WEIGHTS, Options
    from fdkernels.op import triton as backend
    from fdkernels.op.pyramid import describe

    for number, (norm, exchange) in enumerate(itertools.product(NORMS, EXCHANGES)):
        weight = REGION_WEIGHTS[(number + number // 4) % 4]
        reduction = ("mean", "sum")[number // 3 % 2]
        dtype = (F32, F64)[number % 2]
        channels = ([16, 5], [300])[number % 2]
        options = Options(weight, number % 3 == 0, norm, 0.5, 1e-12, exchange, reduction)
        sums = torch.empty(2, 4, sum(channels), dtype=dtype)
        masses = torch.empty(2, 4, len(channels), dtype=dtype)
        pyramid = describe([torch.empty(4, C, 9, dtype=dtype) for C in channels])
        backend.losses(sums, masses, pyramid, options, PAIRINGS[exchange])


def _sums_and_losses():
    from fdkernels.conventions import Options
    from fdkernels.op import triton as backend
    from fdkernels.op.pyramid import Weights, describe

    layers = [_contiguous(4, 16, 64, 64), _contiguous(4, 300, 4, 4)]
    for norm, weight, exchange, with_slopes in (
        ("vector", "region", "shuffle", False),
        ("relative", "none", "pooled", True),
        ("batch", "pixels", "pooled", True),
    ):
        options = Options(weight, weight == "pixels", norm, 0.5, 1e-12, exchange, "mean")
        for first in (U8, F32):
            for bg in ([], [_one_element(4, 4096, dtype=first), _one_element(4, 16)]):
                weights = Weights([_one_element(4, 4096, dtype=first), _one_element(4, 16)], bg)
                backend.sums(layers, weights, describe(layers), options, PAIRINGS[exchange], with_slopes)


def _masks():
    from fdkernels.op import triton as backend

    sizes = [torch.Size([size, size]) for size in (64, 9)]
    for dtype, how, ignore_index, wide in (
        (torch.bool, "area", None, F32),
        (U8, "max", 255, F32),
        (torch.int64, "nearest", -1, F32),
        (BF16, "area", 0.1, F32),
        (F64, "max", 0.1, F64),
    ):
        backend.masks(torch.ones(2, 1, 64, 64, dtype=dtype), sizes, wide, how, ignore_index)
    # The package has a function by the name of the module.
    importlib.import_module("fdkernels.op.triton.masks")._WIDE = 0
    backend.masks(torch.ones(2, 1, 64, dtype=F32), [torch.Size([5])], F32, "area", 0.1)


def _run_pyramid(lay_out, dtype):
    from fdkernels.op import triton as backend
    from fdkernels.op.pyramid import Weights, describe
    from fdkernels.op.triton.sums import sum_tiles

    for batch in (4, 3, 1):
        layers = [lay_out(batch, C, s, s, dtype=dtype) for C, s in ((64, 32), (128, 16), (128, 7))]
        fg = [torch.empty(batch, 32 * 32, dtype=U8), torch.empty(batch, 256), torch.empty(batch, 49)]
        weights = Weights(fg, [])
        sum_tiles(layers, weights, describe(layers))
        g = torch.empty(2, batch, 320)
        backend.gradient(g, torch.empty(3), weights, layers, describe(layers))


def _main():
    kernels = _compile_only(int(sys.argv[2]))
    layouts = {"contiguous-float32": (_contiguous, F32), "channels_last-bfloat16": (_channels_last, BF16)}
    if sys.argv[1] in layouts:
        _run_pyramid(*layouts[sys.argv[1]])
    elif sys.argv[1].startswith("norm "):
        _run_norm({"contiguous": _contiguous, "channels_last": _channels_last}[sys.argv[1][5:]])
    else:
        _run(sys.argv[1])
    ptx = {name: [kernel.asm["ptx"] for kernel in of_name.values()] for name, of_name in kernels.items()}
    print(json.dumps(ptx))  # noqa: T201


if __name__ == "__main__":
    _main()
