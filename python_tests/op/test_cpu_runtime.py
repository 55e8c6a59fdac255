"""The CPU kernels and the process around them: threads, instruction sets, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fdkernels as fdk
from fdkernels.build_info import build_info

pytestmark = [
    pytest.mark.skipif(fdk.backends()["cpu"] is not None, reason=str(fdk.backends()["cpu"])),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

# Prints the loss and the gradient's checksum of a pyramid that takes every path of the kernels.
_PYRAMID = """
import torch, fdkernels as fdk
torch.manual_seed(0)
mask = torch.rand(2, 1, 24, 20) > 0.4
shapes = [(2, 5, 24, 20), (2, 70, 12, 10), (2, 3, 1, 1)]
total = 0
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for layout in (torch.contiguous_format, torch.channels_last):
        maps = [(torch.randn(shape) + 0.3).to(dtype) for shape in shapes]
        features = [x.to(memory_format=layout).requires_grad_() for x in maps]
        loss = fdk.feature_discrepancy_loss(features, mask, backend="cpu")
        loss.backward()
        total += loss.item() + sum(f.grad.double().abs().sum().item() for f in features)
print(fdk._C.cpu_instruction_set, repr(total))
"""


# Prints how many sums and masses are not those of float64. The kernels take channels (in channels_last) and
# pixels in pairs of vectors, vectors and parts of one, and few channels apart; beyond the last lies NaN.
_EXTENTS = """
import torch, fdkernels as fdk
torch.manual_seed(0)
wrong = 0
bounds = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-6, torch.float16: 2e-6}
channels_last = {"shape": (2, 7, 11), "order": (0, 3, 1, 2)}
contiguous = {"shape": (2, 5, 1), "order": (0, 1, 2, 3)}
for extent in (*range(1, 36), 40, 48, 63, 64, 65, 72, 100, 128, 129, 1030):
    for layout in (channels_last, contiguous):
        for dtype, bound in bounds.items():
            rows = torch.randn(*layout["shape"], extent + 3).to(dtype)
            rows[..., extent:] = torch.nan
            x = rows[..., :extent].permute(layout["order"])
            mask = (torch.rand(2, 1, *x.shape[2:]) > 0.5).float()
            mask[:, :, ::3, ::5] = 9
            if dtype in (torch.float32, torch.float16):
                mask = mask.to(torch.uint8)
            for ignored in (None, 9):
                given = mask if ignored else mask.clamp(max=1)
                found = fdk.region_sums(x, given, ignore_index=ignored, backend="cpu")
                for sums, mass, value in ((found.fg, found.fg_mass, 1), (found.bg, found.bg_mass, 0)):
                    weights, wide = (given == value).double(), x.double()
                    error = (sums.double() - (wide * weights).sum((2, 3))).abs()
                    wrong += not (error <= bound * (1 + wide.abs().sum((2, 3)))).all()
                    wrong += not torch.equal(mass.double(), weights.sum((1, 2, 3)))
print(wrong)
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd="/",  # not the source tree, which would go before the installed package
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_one_openmp_runtime_is_loaded():
    code = """
import torch, fdkernels as fdk
x = torch.randn(4, 16, 64, 64)
x.sum(); fdk.feature_discrepancy_loss(x, torch.rand(4, 1, 64, 64) > 0.5, backend="cpu")
names = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(sum(any(word in name.rsplit("/", 1)[-1] for word in ("gomp", "iomp", "libomp")) for name in names))
"""
    assert run(code) == "1"


def test_threads_are_those_of_torch():
    code = """
import os, torch, fdkernels as fdk
torch.set_num_threads(2)
x, mask = torch.randn(4, 64, 64, 64, requires_grad=True), torch.rand(4, 1, 64, 64) > 0.5
(x * 2).sum().backward()
fdk.feature_discrepancy_loss(x, mask, backend="reference").backward()
before = len(os.listdir("/proc/self/task"))
fdk.feature_discrepancy_loss(x, mask, backend="cpu").backward()
print(len(os.listdir("/proc/self/task")) - before, fdk._C.cpu_thread_runtime())
"""
    assert run(code) == "0 the OpenMP runtime of torch"


@pytest.mark.parametrize("isa", build_info()["isa"])
def test_every_instruction_set_gives_the_same_numbers(isa):
    try:
        name, total = run(_PYRAMID, FDKERNELS_CPU_ISA=isa).split()
    except AssertionError as error:
        if "FDKERNELS_CPU_ISA" in str(error):
            pytest.skip(f"this processor has no {isa}")
        raise
    assert name == isa
    best = float(run(_PYRAMID).split()[1])
    # Sixteen-bit gradients may round the other way at a tie.
    assert float(total) == pytest.approx(best, rel=2e-4)


@pytest.mark.parametrize("isa", build_info()["isa"])
def test_sums_of_any_number_of_channels_and_pixels_under_every_instruction_set(isa):
    try:
        assert run(_EXTENTS, FDKERNELS_CPU_ISA=isa) == "0"
    except AssertionError as error:
        if "FDKERNELS_CPU_ISA" in str(error):
            pytest.skip(f"this processor has no {isa}")
        raise


def test_an_unknown_instruction_set_is_refused():
    code = "import fdkernels as fdk; print(fdk.backends()['cpu'])"
    reason = run(code, FDKERNELS_CPU_ISA="sse9")
    assert "FDKERNELS_CPU_ISA must be" in reason
    assert "got sse9" in reason


def test_a_forked_worker_computes_on_one_thread():
    """DataLoader workers are forked after torch's threads exist; there get_num_threads() is 1."""
    x, mask = torch.randn(4, 16, 32, 32), torch.rand(4, 1, 32, 32) > 0.5
    expected = fdk.feature_discrepancy_loss(x, mask, backend="cpu").item()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        value = fdk.feature_discrepancy_loss(x, mask, backend="cpu").item()
        os.write(write, repr(value).encode())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert float(os.read(read, 64)) == expected
    os.close(read)
    os.close(write)


def test_sources_link_no_openmp_runtime():
    module = Path(fdk._C.__file__)
    needed = subprocess.run(["ldd", str(module)], capture_output=True, text=True, check=False).stdout
    assert "omp" not in needed
