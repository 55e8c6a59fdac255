"""Bytes and launches of a call, counted without a GPU: `python -m benchmarks.launches --output FILE`.

Triton's interpreter runs the kernels on CPU tensors, and the profiler sees what else a call has torch do; on
a GPU each of both is a launch, views and allocations aside. The number of layers and the options decide about
it, not the sizes, so small tensors do.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import record
from benchmarks.cases import Case, make_inputs, named_case
from benchmarks.counted import count_bytes, tap_bytes
from benchmarks.peers import op
from benchmarks.results import write_results
from fdkernels import backends

NAMES = (
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


def launches(case: Case) -> dict[str, dict[str, int]]:
    """How often forward and backward of a case launch which kernel on the backend `triton`.

    Args:
        case: on the CPU; small, as the interpreter is slow.

    Returns:
        Under `"forward"` and `"backward"` the count of each kernel, and of each op of torch under `aten::`.
    """
    inputs = make_inputs(case)
    losses: list[Tensor] = []
    forward = count_launches(lambda: losses.append(op(case, inputs, "triton")))
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
    if event.name.startswith(_LAUNCH):
        counts[event.name.removeprefix(_LAUNCH)] += 1
        return
    namespace, _, name = event.name.partition("::")
    if namespace == "aten" and name not in _FREE:
        if event.name not in _CHECKS:
            counts[event.name] += 1
        return
    for child in event.cpu_children:
        _count(child, counts)


@contextmanager
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


def main() -> None:
    """Count the launches of every case and write FILE."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the JSON to write")
    arguments = parser.parse_args()
    reason = backends()["triton"]
    if reason is not None:
        print(f"launches are counted by Triton's interpreter: {reason}", file=sys.stderr)
        sys.exit(2)
    entries = []
    for name in NAMES:
        case = named_case(name, torch.float32, "contiguous", "cpu")
        found = launches(replace(case.shrunk(), name=name))
        entries.append({
            "case": name,
            "num_layers": len(case.layers),
            "feature_bytes": case.feature_bytes,
            "stages": [stage._asdict() for stage in count_bytes(case)],
            "tap_bytes": tap_bytes(case),
            **found,
        })  # fmt: skip
        print(
            f"{name:18} forward {sum(found['forward'].values())}, backward {sum(found['backward'].values())}"
        )
    header = record.header(["python", "-m", "benchmarks.launches", *sys.argv[1:]], "cpu")
    write_results(arguments.output, header, entries, kind="launches")


if __name__ == "__main__":
    main()
