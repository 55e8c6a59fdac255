"""What the loss costs in training: `python -m benchmarks.steps --output FILE`.

The step of each network with the loss on all nine layers beside the same step without it, in one interleaved
run. With `--presets`: the steps of `fdkernels train` for the presets, without the loss and then with it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import TorchDynamoException

from benchmarks import cases
from benchmarks.calls import MIN_ROUNDS, Samples, summarize
from benchmarks.counts import kernel_launches, peak_bytes
from benchmarks.peers import compile_reason
from benchmarks.training_step import CONTENDERS, FREE, NORMS, OP, PLAIN, TAP, WITHOUT, Step, StepCase, nuclei
from fdkernels import models

MODES = ("eager", "amp", "channels_last", "compiled", "network compiled", "amp channels_last compiled")
# Batch, side and base channels: real sizes on a GPU; on a CPU such that a step takes tenths of a second.
SIZES = {"cpu": (4, 256, 16), "cuda": (4, 512, None)}
BUDGETS = {"cpu": 5.0, "cuda": 3.0}
# Steps of a sample: on a GPU several, so that the host runs ahead as it does in training.
_REPEATS = {"cpu": 1, "cuda": 3}
_MAX_ROUNDS = 50
# Bounds on the differences of loss and gradients, without and with autocast, most of them rounding in the
# network below the loss.
BOUNDS = {False: (1e-4, 1e-2), True: (2e-2, 0.2)}
# Normalisations that round in another order turn activations near 0 on or off, so their gradients are held to
# those of the step in float64. (By those torch's own normalisation, channels_last, is up to 0.11 off.)
FREE_BOUND = 0.05
# Steps of a training that are not counted: they allocate, choose convolutions and make the optimizer's state.
WARM_UP = 3


def run_case(case: StepCase, budget: float) -> dict[str, Any]:
    """Compare the contenders' first steps, then time them in turn; the entry of the results.

    Raises:
        AssertionError: a contender gives other numbers; nothing is timed.
    """
    steps: dict[str, Step] = {}
    try:
        steps = {name: Step(case, name) for name in CONTENDERS}
        with dynamo_config.patch(skip_nnmodule_hook_guards=False):  # or one network's graph serves all
            left_out = leave_out_uncompilable(steps)
        errors = check(case, steps)
        samples = measure(steps, case.device, budget)
        peaks = {name: peak_bytes(step, case.device) for name, step in steps.items()}
        on_gpu = steps if case.device == "cuda" else {}
        launches = {name: kernel_launches(step) for name, step in on_gpu.items()}
    finally:
        for step in steps.values():
            step.close()
    pairs = [(name, WITHOUT) for name in steps if name != WITHOUT]
    pairs += [(FREE, NORMS)] if {FREE, NORMS} <= steps.keys() else []
    seconds, ratios = summarize(samples, pairs)
    return case.record | {
        "rounds": len(samples[WITHOUT]),
        "seconds": seconds,
        "ratios": ratios,
        "peak_bytes": peaks,
        "launches": launches,
        "errors": errors,
        "left_out": left_out,
    }


def leave_out_uncompilable(steps: dict[str, Step]) -> dict[str, str]:
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
    """|loss - expected| / max(1, |expected|) and ‖gradients - expected‖ / ‖expected‖ against the plain loss.

    More than rounding explains is an AssertionError.
    """
    half = "amp" in case.mode
    expected = steps[PLAIN].outcome()
    of_loss, of_gradient = BOUNDS[half]
    errors = {}
    for name in (OP, TAP, FREE):
        if name not in steps:
            continue  # torch.compile refused it
        is_exact = name == FREE and not half
        # A GPU's convolutions in TF32 would be further off than the normalisations.
        with (
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
            if is_exact
            else contextlib.nullcontext()
        ):
            found = disagreement(steps[name].outcome(), outcome_in_double(case) if is_exact else expected)
        errors[name] = dict(zip(("loss", "gradient"), found, strict=True))
        bounds = of_loss, FREE_BOUND if is_exact else of_gradient
        for (what, error), bound in zip(errors[name].items(), bounds, strict=True):
            if not error <= bound:
                raise AssertionError(
                    f"{what} of {name} is wrong for {case.id}, so nothing is timed: it differs by "
                    f"{error:.2g} from that of the plain loss, at most {bound:.2g} was expected"
                )
    return errors


def outcome_in_double(case: StepCase) -> tuple[float, Tensor]:
    """Loss and gradients, [parameters], of the plain loss in float64."""
    step = Step(dataclasses.replace(case, mode="eager"), PLAIN)
    try:
        for module in (step.model, step.criterion):
            module.double()
        step.images, step.mask = step.images.double(), step.mask.double()
        return step.outcome()
    finally:
        step.close()


def disagreement(got: tuple[float, Tensor], expected: tuple[float, Tensor]) -> tuple[float, float]:
    """The relative errors of `check` for two outcomes."""
    (loss, gradients), (right, norm) = got, (expected[0], torch.linalg.vector_norm(expected[1]))
    distance = torch.linalg.vector_norm(gradients - expected[1])
    return abs(loss - right) / max(1.0, abs(right)), (distance / norm).item()


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
                _wait(device)
                start = time.perf_counter()
                for _ in range(repeats):
                    steps[name]()
                _wait(device)
                samples[name].append((time.perf_counter() - start) / repeats)
    finally:
        gc.enable()
    return samples


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def run_preset(preset: str, mode: str, device: str, steps: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Time steps of the second phase of `fdkernels train`, without the loss and then with it.

    The images are made up, in memory, of the preset's size unless `changes` has another. Drift of the machine
    does not cancel, as it does between the contenders of a step.

    Returns:
        The entry of the results; the ratios are those of step to step, memory is known on a GPU alone.
    """
    from fdkernels.segmentation.config import TrainingConfig
    from fdkernels.segmentation.presets import preset_fields

    fields = preset_fields(preset) | {name: value for name, value in changes.items() if value is not None}
    fields |= {"channels_last": "channels_last" in mode, "compile": "compiled" in mode}
    fields |= {"precision": "bf16-mixed" if "amp" in mode else "32-true", "accelerator": device}
    samples, peaks = {}, {}
    for name in (WITHOUT, OP):
        config = TrainingConfig(data="", output="", fd_loss=name == OP, **fields)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        samples[name] = train_steps(config, steps)
        if device == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()
        gc.collect()
    case = StepCase(config.model, mode, device, config.batch_size, config.size or 1, config.base_channels)
    seconds, ratios = summarize(samples, [(OP, WITHOUT)])
    known = {"preset": preset, **case.record, "rounds": steps}
    return known | {"seconds": seconds, "ratios": ratios, "peak_bytes": peaks, "left_out": {}}


def train_steps(config: Any, steps: int) -> list[float]:
    """Seconds of each step, after `WARM_UP`; the one place that calls what lies under `fdkernels train`."""
    from fdkernels.segmentation.console import quiet_lightning
    from fdkernels.segmentation.module import SegmentationModule
    from fdkernels.segmentation.profiling import StepClock
    from fdkernels.segmentation.trainer import make_trainer

    torch.manual_seed(0)
    module = SegmentationModule.from_config(config)
    if module.criterion is not None:
        module.criterion.target = -100.0
        module.criterion.activate()
    images, mask = nuclei(config.batch_size, config.size)
    batches = [{"image": images / 2, "mask": mask}] * (WARM_UP + steps)
    clock = StepClock()
    with quiet_lightning():
        trainer = make_trainer(config, [clock], max_epochs=1)
        loaders = [torch.utils.data.DataLoader(part, batch_size=None) for part in (batches, batches[:1])]
        trainer.fit(module, *loaders)
    return clock.fits[-1][WARM_UP:]


def jobs(arguments: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Name, mode and work of all that the command line asks for, what needs no compiler first."""
    batch, side, width = arguments.batch, arguments.side, arguments.base_channels
    if arguments.presets is not None:
        from fdkernels.segmentation.presets import TABLE_2

        changes = {"size": side, "batch_size": batch, "base_channels": width}
        for mode in arguments.modes or ["eager"]:
            for preset in arguments.presets or [f"{dataset}-{model}" for dataset, model in TABLE_2]:
                work = (preset, mode, arguments.device, arguments.steps, changes)
                yield preset, mode, lambda work=work: run_preset(*work)
        return
    usual, budget = SIZES[arguments.device], arguments.budget
    budget = BUDGETS[arguments.device] if budget is None else budget
    size = (batch or usual[0], side or usual[1], width or usual[2])
    for mode in arguments.modes or MODES:
        for network in arguments.networks:
            case = StepCase(network, mode, arguments.device, *size)
            yield network, mode, lambda case=case: run_case(case, budget)


def main(options: Sequence[str] | None = None) -> int:
    """Measure, and write FILE after each entry; the exit status is 1 if a contender was wrong."""
    arguments = _parse(options)
    if arguments.presets is not None and arguments.device == "cpu" and arguments.side is None:
        print("There is no GPU. At real size a step takes minutes on a CPU: give --side, such as 64.")
        return 0
    begin = time.monotonic()
    head = cases.header(["python", "-m", "benchmarks.steps", *sys.argv[1:]], arguments.device)
    kind = "steps" if arguments.presets is None else "training"
    if arguments.device == "cuda" and kind == "steps":
        torch.backends.cudnn.benchmark = True
    entries: list[dict[str, Any]] = []
    wrong = 0
    for name, mode, work in jobs(arguments):
        if arguments.time_limit is not None and time.monotonic() - begin > arguments.time_limit:
            print(f"the time limit of {arguments.time_limit:g} s has passed: {name} {mode} and what follows")
            break
        reason = compile_reason(arguments.device) if "compiled" in mode else None
        if reason is not None:
            print(f"{name} {mode}: {reason}")
            continue
        try:
            entries.append(work())
        except torch.OutOfMemoryError as error:
            print(f"{name} {mode}: {str(error).splitlines()[0]}")
        except AssertionError as error:
            wrong = 1
            print(error)
        else:
            cases.write_results(arguments.output, head, entries, kind)
            ratios = "  ".join(f"{k} {ratio['median']:.3f}" for k, ratio in entries[-1]["ratios"].items())
            milliseconds = 1e3 * entries[-1]["seconds"][WITHOUT]["median"]
            print(f"{name:24} {mode:27} {milliseconds:8.1f} ms  {ratios}", flush=True)
        torch.compiler.reset()
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    return wrong


def _parse(options: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE", help="the JSON to write")
    add("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    add("--networks", nargs="+", choices=models.names(), default=models.names())
    add("--presets", nargs="*", metavar="PRESET", help="trainings; without names the nine pairs of Table 2")
    add("--modes", nargs="+", choices=MODES, help="default: all; of presets eager")
    add("--batch", type=int, help="images of a step")
    add("--side", type=int, help="their side in pixels, a multiple of 16")
    add("--base-channels", type=int, help="width of the first level")
    add("--steps", type=int, default=10, help="timed steps of a preset")
    add("--budget", type=float, metavar="SECONDS", help="of timing, for each network and mode")
    add("--time-limit", type=float, metavar="SECONDS", help="begin nothing after this time")
    arguments = parser.parse_args(options)
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
