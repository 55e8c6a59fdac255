"""Counts what a call does, which has no noise: instructions, launches, bytes, peak memory.

python -m benchmarks.counts instructions    # of a call on a CPU, by callgrind, beside the last count
python -m benchmarks.counts launches        # of a call on a GPU, by Triton's interpreter, without a GPU
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import cases, instructions, peers
from benchmarks.cases import Case, named_case
from fdkernels import backends

RESULTS = cases.ROOT / "benchmarks" / "results"

LAUNCHED_CASES = (
    *("unet-512", "nucleisegnet-512", "enc1-512", "deep-256"),
    *("ignore-256", "soft-256", "shuffle-256", "released-256", "volume-64"),
)
_LAUNCH = "launch::"
# Ops of torch that launch nothing: they make views, or tensors that are not written.
_FREE = frozenset(
    {
        "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand",
        "flatten", "lift_fresh", "narrow", "new_empty", "new_empty_strided", "permute", "reshape",
        "result_type", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "to",
        "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as", "_reshape_alias",
        "_unsafe_view", "_has_compatible_shallow_copy_type", "contiguous", "resize_", "detach_",
        "scalar_tensor", "resolve_conj", "resolve_neg", "is_nonzero", "item", "_local_scalar_dense",
    }
)  # fmt: skip
# The range check of a mask's values, which CUDA tensors meet under `fdkernels.debug()` alone.
_CHECKS = frozenset({"aten::aminmax"})
_MASK_BYTES = {"binary": 4, "soft": 4, "int64": 8}  # others 1


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """The most bytes of tensors alive at once during a call and not before it.

    On a GPU from the caching allocator; on a CPU from the allocations and frees that the profiler records, so
    it sees the inside of compiled code and of custom ops too, but not what a C++ kernel takes from malloc.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def kernel_launches(function: Callable[[], object]) -> int:
    """The kernels, copies and fills of a call on a GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def launches(case: Case) -> dict[str, dict[str, int]]:
    """The launches of forward and backward of a case on the backend `triton`.

    The number of layers and the options decide about it, not the sizes, so small tensors do.

    Args:
        case: on the CPU; small, as the interpreter is slow.

    Returns:
        Under `"forward"` and `"backward"` the count of each kernel, and of each op of torch under `aten::`.
    """
    inputs = cases.make_inputs(case)
    losses: list[Tensor] = []
    forward = count_launches(lambda: losses.append(peers.op(case, inputs, "triton")))
    gradient = torch.ones_like(losses[0])
    return {"forward": forward, "backward": count_launches(lambda: losses[0].backward(gradient))}


def count_launches(function: Callable[[], object]) -> dict[str, int]:
    """What a call would have a GPU do: Triton kernels by name, and ops of torch beside them."""
    with _launches_recorded(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    counts: Counter[str] = Counter()
    for event in profiler.events():
        if event.cpu_parent is None:
            _count(event, counts)
    return dict(counts)


def _count(event: Any, counts: Counter[str]) -> None:
    """Count an event if it is a kernel or an op that does something, else what lies within it."""
    namespace, _, name = event.name.partition("::")
    if event.name.startswith(_LAUNCH):
        counts[name] += 1
    elif namespace == "aten" and name not in _FREE:
        counts.update({event.name} - _CHECKS)
    else:
        for child in event.cpu_children:
            _count(child, counts)


@contextlib.contextmanager
def _launches_recorded() -> Iterator[None]:
    """Have the interpreter put a range around each launch, so that what it does within is told apart."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def recorded(self: Any, *arguments: Any, **constants: Any) -> Any:
        with record_function(f"{_LAUNCH}{self.fn.__name__}"):
            return launch(self, *arguments, **constants)

    GridExecutor.__call__ = recorded
    try:
        yield
    finally:
        GridExecutor.__call__ = launch


class Pass(NamedTuple):
    """The bytes that one pass of a call reads and writes."""

    name: str
    read: int
    written: int


def byte_counts(case: Case) -> list[Pass]:
    """The bytes of a call, from its shapes: every tensor once for each pass that reads or writes it.

    The mask is read once, at the size of the image, and every size below it is made from it; kernels read a
    weight of the mask's own size as it is (a float one where its values were checked, as here on a CPU).
    Pixels to ignore need a second weight of each size.
    """
    accumulate = 8 if case.dtype == torch.float64 else 4
    batch = case.layers[0][0]
    regions = 2 if case.mask_kind == "ignore" else 1
    mask_bytes = _MASK_BYTES.get(case.mask_kind, 1)
    sizes = {layer[2:] for layer in case.layers}
    as_is = {case.mask_size} if regions == 1 and case.mask_kind != "int64" else set()
    made = batch * regions * accumulate * sum(map(math.prod, sizes - as_is))
    weights = sum(
        batch * math.prod(layer[2:]) * (mask_bytes if layer[2:] in as_is else regions * accumulate)
        for layer in case.layers
    )
    sums = 2 * batch * accumulate * sum(layer[1] + 1 for layer in case.layers)
    losses = accumulate * len(case.layers)
    return [
        Pass("masks", batch * math.prod(case.mask_size) * mask_bytes if made else 0, made),
        Pass("sums", case.feature_bytes + weights, sums),
        Pass("losses and slopes", sums, losses + sums),
        Pass("gradient", sums + losses + weights, case.feature_bytes),
    ]


def tap_bytes(case: Case) -> tuple[int, int]:
    """Bytes of backward where a gradient arrives from the network: by `tap`, and by an op of its own.

    `tap` reads that gradient and writes the sum. An op of its own writes a gradient, and autograd reads both
    and writes their sum.
    """
    last = byte_counts(case)[-1]
    return last.read + last.written + case.feature_bytes, last.read + last.written + 3 * case.feature_bytes


def _instructions(output: Path, limit: float | None) -> int:
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        print(
            "valgrind is missing: instructions are counted by its tool callgrind; install it (on Debian and "
            "Ubuntu `apt-get install valgrind`) and run this again.",
            file=sys.stderr,
        )
        return 2
    before = json.loads(output.read_text("utf-8"))["measurements"] if output.is_file() else []
    entries = instructions.count(valgrind)
    rises = instructions.compare({entry["figure"]: entry["instructions"] for entry in before}, entries)
    _write(output, entries, "instructions")
    if limit is None or max(rises, default=0) <= limit:
        return 0
    print(f"a figure has risen by more than {limit:g} %", file=sys.stderr)
    return 1


def _launches(output: Path) -> int:
    reason = backends()["triton"]
    if reason is not None:
        print(f"launches are counted by Triton's interpreter: {reason}", file=sys.stderr)
        return 2
    entries = []
    for name in LAUNCHED_CASES:
        case = named_case(name, torch.float32, "contiguous", "cpu")
        counted = launches(replace(case.shrunk(), name=name))
        passes = [stage._asdict() for stage in byte_counts(case)]
        known = {"case": name, "num_layers": len(case.layers), "feature_bytes": case.feature_bytes}
        entries.append(known | {"stages": passes, "tap_bytes": tap_bytes(case), **counted})
        forward, backward = (sum(counted[direction].values()) for direction in ("forward", "backward"))
        print(f"{name:18} forward {forward}, backward {backward}")
    _write(output, entries, "launches")
    return 0


def _write(output: Path, entries: Sequence[Mapping[str, Any]], kind: str) -> None:
    head = cases.header(["python", "-m", "benchmarks.counts", *sys.argv[1:]], "cpu")
    cases.write_results(output, head, entries, kind)
    print(f"{output}: {len(entries)} entries")


def main(options: Sequence[str] | None = None) -> int:
    """Count, and write the JSON; the exit status is 1 beyond --limit, 2 where a tool is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("instructions", "launches", "drive"))
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the JSON; instructions are compared with it"
    )
    parser.add_argument("--limit", type=float, metavar="PERCENT", help="fail where instructions rise by more")
    arguments = parser.parse_args(options)
    if arguments.what == "drive":  # under callgrind
        torch.set_num_threads(1)
        names = instructions.drive(torch.get_num_interop_threads, instructions.figures())
        print(json.dumps({"instruction_set": cases.instruction_set(), "figures": names}))
        return 0
    if arguments.what == "launches" and os.environ.get("TRITON_INTERPRET") != "1":
        # A process of its own: triton reads the setting when it is imported.
        again = [sys.executable, "-m", "benchmarks.counts", *(options or sys.argv[1:])]
        return subprocess.run(again, check=False, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    if arguments.what == "launches":
        return _launches(arguments.output or RESULTS / "launches.json")
    default = RESULTS / f"instructions-{platform.machine()}.json"
    return _instructions(arguments.output or default, arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
