"""What the loss costs in a training step: `python -m benchmarks.steps --output FILE`.

The step of each network with the loss on all nine layers beside the same step without it, in one interleaved
run.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from benchmarks import record
from benchmarks.memory import kernel_launches, peak_bytes
from benchmarks.prepared import compile_reason
from benchmarks.results import write_results
from benchmarks.step_contenders import (
    CONTENDERS,
    MODES,
    OP,
    PLAIN,
    WITHOUT,
    Step,
    StepCase,
    count_parameters,
    disagreement,
    unavailable,
)
from benchmarks.timing import MIN_ROUNDS, Samples, summarize
from fdkernels import models

# Real sizes on a GPU; on a CPU such that a step takes tenths of a second.
SIZES = {"cpu": (2, 128, 16), "cuda": (4, 512, None)}
BUDGETS = {"cpu": 5.0, "cuda": 3.0}
# Steps of a sample: on a GPU several, so that the host runs ahead as it does in training.
_REPEATS = {"cpu": 1, "cuda": 3}
_MAX_ROUNDS = 50
# Bounds on what the contenders may differ by in loss and gradients, of which rounding in the network below
# the loss is the larger part.
BOUNDS = {False: (1e-4, 1e-2), True: (2e-2, 0.2)}


def run_case(case: StepCase, budget: float) -> dict[str, Any]:
    """Compare the contenders' first steps, then time them in turn.

    Returns:
        The entry of the results.

    Raises:
        AssertionError: a contender gives other numbers; nothing is timed.
    """
    left_out = {name: reason for name in CONTENDERS if (reason := unavailable(name)) is not None}
    steps: dict[str, Step] = {}
    try:
        steps = {name: Step(case, name) for name in CONTENDERS if name not in left_out}
        left_out |= _leave_out_uncompilable(steps)
        errors = check(case, steps)
        samples = measure(steps, case.device, budget)
        peaks = {name: peak_bytes(step, case.device) for name, step in steps.items()}
        launches = {}
        if case.device == "cuda":
            launches = {name: kernel_launches(step) for name, step in steps.items()}
        parameters = count_parameters(steps[WITHOUT].model)
    finally:
        for step in steps.values():
            step.close()
    pairs = [(name, WITHOUT) for name in steps if name != WITHOUT]
    seconds, ratios = summarize(samples, pairs)
    return {
        "network": case.network,
        "mode": case.mode,
        "device": case.device,
        "images": f"{case.batch}x3x{case.side}x{case.side}",
        "base_channels": case.base_channels,
        "parameters": parameters,
        "rounds": len(samples[WITHOUT]),
        "seconds": seconds,
        "ratios": ratios,
        "peak_bytes": peaks,
        "launches": launches,
        "errors": errors,
        "left_out": left_out,
    }


def _leave_out_uncompilable(steps: dict[str, Step]) -> dict[str, str]:
    """Take out the steps that torch.compile refuses; why, by name."""
    reasons = {}
    for name, step in list(steps.items()):
        try:
            step.backward()
        except TorchDynamoException as error:
            reasons[name] = f"torch.compile does not take it: {str(error).splitlines()[0]}"
            steps.pop(name).close()
    return reasons


def check(case: StepCase, steps: Mapping[str, Step]) -> dict[str, dict[str, float]]:
    """How far the others' loss and gradients are from those of the plain loss.

    Raises:
        AssertionError: further than rounding explains.
    """
    expected = steps[PLAIN].outcome()
    bounds = BOUNDS["amp" in case.mode]
    errors = {}
    for name, step in steps.items():
        if name in (WITHOUT, PLAIN):
            continue
        found = disagreement(step.outcome(), expected)
        for what, error, bound in zip(("loss", "gradient"), found, bounds, strict=True):
            if not error <= bound:
                raise AssertionError(
                    f"{what} of {name} is wrong for {case.id}, so nothing is timed: it differs by "
                    f"{error:.2g} from that of the plain loss, at most {bound:.2g} was expected"
                )
        errors[name] = {"loss": float(f"{found[0]:.2g}"), "gradient": float(f"{found[1]:.2g}")}
    return errors


def measure(steps: Mapping[str, Step], device: str, budget: float) -> Samples:
    """Seconds of a step of each, in rounds that begin with the next of them."""
    repeats = _REPEATS[device]
    samples: Samples = {name: [] for name in steps}
    order = list(steps)
    for step in steps.values():  # the optimizer makes its state in the first step
        step()
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for done in range(_MAX_ROUNDS):
            if done >= MIN_ROUNDS and time.perf_counter() - begin > budget:
                break
            order.append(order.pop(0))
            for name in order:
                samples[name].append(_seconds(steps[name], device, repeats) / repeats)
    finally:
        gc.enable()
    return samples


def _seconds(step: Step, device: str, repeats: int) -> float:
    _wait(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def chosen_cases(arguments: argparse.Namespace) -> Iterator[StepCase]:
    """The cases that the command line asks for, those first that need no compiler."""
    batch, side, base_channels = SIZES[arguments.device]
    for mode in arguments.modes:
        for network in arguments.networks:
            yield StepCase(
                network,
                mode,
                arguments.device,
                arguments.batch or batch,
                arguments.side or side,
                arguments.base_channels or base_channels,
            )


def main() -> None:
    """Measure and write FILE after each network; the exit status is 1 if a contender was wrong."""
    arguments = _parse()
    begin = time.monotonic()
    header = record.header(["python", "-m", "benchmarks.steps", *sys.argv[1:]], arguments.device)
    if arguments.device == "cuda":
        torch.backends.cudnn.benchmark = True
    entries: list[dict[str, Any]] = []
    wrong = 0
    for case in chosen_cases(arguments):
        if arguments.time_limit is not None and time.monotonic() - begin > arguments.time_limit:
            print(
                f"the time limit of {arguments.time_limit:g} s has passed: {case.id} and what follows is "
                "left out"
            )
            break
        reason = compile_reason(case.device) if case.compiled else None
        if reason is not None:
            print(f"{case.id}: {reason}")
            continue
        try:
            entry = run_case(case, arguments.budget or BUDGETS[case.device])
        except torch.OutOfMemoryError as error:
            print(f"{case.id}: {str(error).splitlines()[0]}")
        except AssertionError as error:
            wrong += 1
            print(error)
        else:
            entries.append(entry)
            write_results(arguments.output, header, entries, kind="steps")
            print(_line(entry), flush=True)
        _clear(case)
    sys.exit(min(wrong, 1))


def _clear(case: StepCase) -> None:
    torch.compiler.reset()
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()


def _line(entry: dict[str, Any]) -> str:
    ratios = "  ".join(f"{name} {ratio['median']:.3f}" for name, ratio in entry["ratios"].items())
    seconds = entry["seconds"][WITHOUT]["median"]
    return f"{entry['network']:15} {entry['mode']:27} {seconds * 1e3:8.1f} ms  {ratios}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the JSON to write")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--networks", nargs="+", choices=models.names(), default=models.names())
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", type=int, help="images of a step")
    parser.add_argument("--side", type=int, help="their side in pixels, a multiple of 16")
    parser.add_argument("--base-channels", type=int, help="width of the first level")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="of timing, for each network and mode"
    )
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="begin no network after this time"
    )
    arguments = parser.parse_args()
    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


__all__ = ["BOUNDS", "OP", "check", "measure", "run_case"]

if __name__ == "__main__":
    main()
