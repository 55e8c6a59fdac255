"""What `benchmarks.instructions` runs under callgrind: figures between marks, on one thread.

A mark is a call of a function of torch that nothing else calls and at which callgrind writes down what it has
counted. Each figure has three of them: around k calls and around 2k, so that whatever a section itself takes
cancels.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable

import torch

import fdkernels
from benchmarks.cases import Case, make_inputs, named_case
from benchmarks.kernels import Kernels
from benchmarks.peers import contenders
from benchmarks.truth import Truth, clear_gradients

MARK = "at::get_num_interop_threads()"
_CALLS = 4
# Python specializes the code of a call in its first ones.
_WARM_CALLS = 16


def figures() -> dict[str, Callable[[], object]]:
    """What is counted, by name."""
    found: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("contiguous", "channels_last"):
            case = Case("map", ((2, 64, 64, 64),), (64, 64), dtype, layout, "cpu")
            found.update(_kernel_figures(case, f"{case.id.removeprefix('map-').removesuffix('-cpu')}"))
    pyramid = named_case("pyramid-32", torch.float32, "contiguous", "cpu")
    found.update(_kernel_figures(pyramid, "pyramid-32"))
    single = Case("small", ((4, 64, 8, 8),), (8, 8), torch.float32, "contiguous", "cpu")
    shuffled = named_case("shuffle-32", torch.float32, "contiguous", "cpu")
    ignored = named_case("ignore-32", torch.float32, "contiguous", "cpu")
    for name, case in (
        ("pyramid-32", pyramid),
        ("4x64x8x8", single),
        ("shuffle-32", shuffled),
        ("ignore-32", ignored),
    ):
        found.update(_call_figures(case, name))
    found["criterion forward+backward pyramid-32"] = _criterion(pyramid)
    return found


def run(mark: Callable[[], object], chosen: dict[str, Callable[[], object]]) -> list[dict[str, object]]:
    """Call every figure between marks; what was called, in order."""
    done = []
    gc.collect()
    gc.disable()
    for name, function in chosen.items():
        for _ in range(_WARM_CALLS):
            function()
        mark()
        for _ in range(_CALLS):
            function()
        mark()
        for _ in range(2 * _CALLS):
            function()
        mark()
        done.append({"figure": name, "calls": _CALLS})
    gc.enable()
    return done


def _kernel_figures(case: Case, name: str) -> dict[str, Callable[[], object]]:
    inputs = make_inputs(case)
    kernels = Kernels(case, inputs, Truth(case, inputs))
    return {f"kernel forward {name}": kernels.forward, f"kernel backward {name}": kernels.warm}


def _call_figures(case: Case, name: str) -> dict[str, Callable[[], object]]:
    inputs = make_inputs(case)
    losses = contenders(case, inputs, compiled=False)

    def step() -> None:
        clear_gradients(inputs.layers)
        losses["op"]().backward()

    return {f"op forward {name}": losses["op"], f"op forward+backward {name}": step}


def _criterion(case: Case) -> Callable[[], object]:
    inputs = make_inputs(case)
    criterion = fdkernels.FeatureDiscrepancyLoss(len(case.layers), alpha_init=0.1)

    def step() -> None:
        clear_gradients(inputs.layers)
        criterion.alpha.grad = None
        criterion(inputs.layers, inputs.mask).backward()

    return step


def main() -> None:
    """Run under callgrind; the last line of the output says what was called."""
    from fdkernels import _C

    torch.set_num_threads(1)
    done = run(torch.get_num_interop_threads, figures())
    print(json.dumps({"instruction_set": _C.cpu_instruction_set, "figures": done}))


if __name__ == "__main__":
    main()
