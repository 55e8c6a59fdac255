"""The instructions of a call on a CPU, by callgrind; benchmarks/counts.py is the command."""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cases, peers
from benchmarks.cases import Case, named_case
from fdkernels import FeatureDiscrepancyLoss, NormAct

# A mark is a call of a function of torch that nothing else calls, at which callgrind writes down what it has
# counted. Each figure has three: around k calls and around 2k, so that what a section itself takes cancels.
MARK = "at::get_num_interop_threads()"
CALLS = 4
WARM_CALLS = 16  # Python specializes the code of a call in its first ones
# valgrind knows no AVX-512; torch's own kernels are held to the same set.
_X86_SETTINGS = {"FDKERNELS_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}


def figures() -> dict[str, Callable[[], object]]:
    """The calls whose instructions are counted, by name."""
    named = {
        f"{cases.dtype_name(dtype)}-{layout}": Case("map", ((2, 64, 64, 64),), (64, 64), dtype, layout, "cpu")
        for dtype in (torch.float32, torch.bfloat16)
        for layout in ("contiguous", "channels_last")
    }
    variant = (torch.float32, "contiguous", "cpu")
    small = {name: named_case(name, *variant) for name in ("pyramid-32", "shuffle-32", "ignore-32")}
    pyramid = small["pyramid-32"]
    found: dict[str, Callable[[], object]] = {}
    for name, case in {**named, "pyramid-32": pyramid}.items():
        inputs = cases.make_inputs(case)
        buffers = peers.Floors(inputs.layers).buffers
        kernels = cases.kernels_of(case, inputs, peers.Truth(case, inputs).grad_sums, buffers)
        found |= {f"kernel forward {name}": kernels.forward, f"kernel backward {name}": kernels.warm}
    single = Case("small", ((4, 64, 8, 8),), (8, 8), *variant)
    ordered = {"pyramid-32": pyramid, "4x64x8x8": single, **small}
    for name, case in ordered.items():
        inputs = cases.make_inputs(case)
        loss = peers.contenders(case, inputs, compiled=False)["op"]
        found |= {f"op forward {name}": loss, f"op forward+backward {name}": step_by(inputs.layers, loss)}
    inputs = cases.make_inputs(pyramid)
    criterion = FeatureDiscrepancyLoss(len(pyramid.layers), alpha_init=0.1)
    loss = lambda: criterion(inputs.layers, inputs.mask)  # noqa: E731
    found["criterion forward+backward pyramid-32"] = step_by([*inputs.layers, criterion.alpha], loss)
    return found | _norms()


def _norms() -> dict[str, Callable[[], object]]:
    """Batch norm and ReLU on a map so small that little else than the host's part is counted."""
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    torchs = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    fused = NormAct(nn.BatchNorm2d(8), nn.ReLU())
    found: dict[str, Callable[[], object]] = {}
    for name, module in {"torch": torchs, "fused": fused}.items():
        loss = lambda module=module: module(x).sum()  # noqa: E731
        found[f"norm forward {name}"] = lambda module=module: module(x)
        found[f"norm forward+backward {name}"] = step_by([x, *module.parameters()], loss)
    return found


def step_by(leaves: Sequence[Tensor], loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward and backward of a loss, which leave each leaf, of any shape, a gradient of its own."""

    def step() -> None:
        peers.clear_gradients(leaves)
        loss().backward()

    return step


def drive(mark: Callable[[], object], chosen: Mapping[str, Callable[[], object]]) -> list[str]:
    """Call every figure between marks; their names, in order."""
    gc.collect()
    gc.disable()
    for function in chosen.values():
        for _ in range(WARM_CALLS):
            function()
        mark()
        for _ in range(CALLS):
            function()
        mark()
        for _ in range(2 * CALLS):
            function()
        mark()
    gc.enable()
    return list(chosen)


def count(valgrind: str) -> list[dict[str, Any]]:
    """Run `drive` under callgrind, on one thread.

    Returns:
        For each figure its name, the instructions of a call and the instruction set of the kernels.

    Raises:
        RuntimeError: the driver failed, or callgrind did not see its marks.
    """
    settings = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    if platform.machine().lower() in ("x86_64", "amd64"):
        settings |= _X86_SETTINGS
    with tempfile.TemporaryDirectory() as folder:
        tool = [valgrind, "--tool=callgrind", f"--callgrind-out-file={folder}/callgrind"]
        done = subprocess.run(
            [*tool, f"--dump-before={MARK}", sys.executable, "-m", "benchmarks.counts", "drive"],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, **settings},
            cwd=cases.ROOT,
        )
        if done.returncode:
            raise RuntimeError(f"the driver failed under callgrind:\n{done.stderr[-3000:]}")
        said = json.loads(done.stdout.splitlines()[-1])
        # A dump is numbered where a mark caused it; what follows the last mark has no number.
        dumps = sorted(Path(folder).glob("callgrind.*"), key=lambda path: int(path.suffix[1:]))
        totals = [total_of(path.read_text(encoding="utf-8", errors="replace")) for path in dumps]
    counted = per_call(totals, said["figures"])
    return [entry | {"instruction_set": said["instruction_set"]} for entry in counted]


def per_call(totals: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
    """Instructions of a call from those of the sections that end at each mark.

    Args:
        totals: of the sections in order; those before the first figure's mark may be more than one.
        names: of the figures; the three marks of each end what came before, k calls and 2k calls.
    """
    if len(totals) < 3 * len(names):
        raise RuntimeError(
            f"callgrind must see {3 * len(names)} marks, one at each call of {MARK}, got {len(totals)}"
        )
    sections = totals[len(totals) - 3 * len(names) :]
    differences = [two - one for one, two in zip(sections[1::3], sections[2::3], strict=True)]
    return [
        {"figure": name, "instructions": round(difference / CALLS)}
        for name, difference in zip(names, differences, strict=True)
    ]


def total_of(dump: str) -> int:
    """The instructions of one dump of callgrind."""
    found = re.search(r"^totals: (\d+)", dump, re.MULTILINE)
    if found is None:
        raise RuntimeError("a dump of callgrind must have a line `totals: ...`, got none")
    return int(found.group(1))


def compare(before: Mapping[str, int], entries: Sequence[Mapping[str, Any]]) -> list[float]:
    """Print each figure beside the one before; by how many percent each has risen."""
    rises = []
    print(f"{'instructions of a call':52} {'before':>14} {'now':>14} {'change':>9}")
    for entry in entries:
        old, now = before.get(entry["figure"]), entry["instructions"]
        if old:
            rises.append(100 * (now / old - 1))
        change = f"{rises[-1]:+8.2f}%" if old else "new"
        print(f"{entry['figure']:52} {old or '':>14} {now:>14} {change:>9}")
    for name in before.keys() - {entry["figure"] for entry in entries}:
        print(f"{name:52} {before[name]:>14} {'gone':>14}")
    return rises
