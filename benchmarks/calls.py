"""Times calls of the loss beside floors and peers: `python -m benchmarks.calls --set core --results FILE`.

pytest-benchmark times the op; the others are timed in turn between its rounds, so that drift of the machine
meets all alike. Everyone is compared with the truth first: a wrong result has no speed.
"""

from __future__ import annotations

import functools
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import cases, peers
from benchmarks.cases import Case
from benchmarks.counts import kernel_launches, peak_bytes

# A case that is measured in fewer variants is measured in the first ones, which differ most.
VARIANTS = (
    (torch.float32, "contiguous"),
    (torch.bfloat16, "channels_last"),
    (torch.float32, "channels_last"),
    (torch.bfloat16, "contiguous"),
)
# Names, and in how many of the variants. The most important first: on a GPU a time limit cuts off the end.
_CORE = {
    **dict.fromkeys(("enc1-256", "pyramid-256", "pyramid-32"), 4),
    **dict.fromkeys(("enc1-128", "enc3-256", "bottleneck-256", "deep-256"), 2),
    **dict.fromkeys(("bool-256", "uint8-256", "int64-256", "soft-256", "ignore-256"), 1),
    **dict.fromkeys(("shuffle-256", "pooled-256", "released-256"), 1),
    "volume-64": 2,
    "unet-256": 1,
}
_CUDA_CORE = {"unet-512": 4, "nucleisegnet-512": 2, "enc1-512": 4} | {
    name: count for name, count in _CORE.items() if name not in ("enc1-256", "enc1-128")
}
_FULL = (
    *("unet-512", "unet-256", "nucleisegnet-512", "nucleisegnet-256"),
    *("enc1-512", "enc2-512", "enc1-256", "enc2-256", "enc3-256", "enc4-256", "bottleneck-256", "enc1-128"),
    *("pyramid-256", "deep-256", "pyramid-32"),
    *(f"{kind}-256" for kind in (*cases.MASK_KINDS, *cases.EXCHANGES)),
    *("released-256", "volume-64", "volumes-64"),
)
# For a GPU that is lent for minutes.
_BRIEF = {
    **dict.fromkeys(("unet-512", "pyramid-32", "enc1-512"), 2),
    **dict.fromkeys(("nucleisegnet-256", "ignore-256", "released-256", "volume-64"), 1),
}
_BRIEF_MIB = (1, 8, 64, 512, 4096)
# MiB of the largest map of the series by size; what does not fit a GPU is left out, with the reason.
_LARGEST_MIB = {"cpu": 512, "cuda": 2**15}
SETS = ("core", "scaling", "full", "brief", "quick")

Functions = Mapping[str, Callable[[], object]]
Samples = dict[str, list[float]]  # seconds of each round, by name

# Seconds of timing for each mode of a case. A GPU's times scatter less, and a lent one is short of time.
BUDGETS, QUICK_BUDGET = {"cpu": 0.4, "cuda": 0.15}, 0.05
MIN_ROUNDS, MAX_ROUNDS = 7, 200
# A GPU clock that is hardly too slow, for a pause of at least the time that is asked for.
_CLOCK_HZ = 3e9
# Bytes that a case needs at once, over those of the features. What does not fit a GPU says so itself.
_PEAK_FACTORS = {"cpu": 7.0, "cuda": 2.6}

MEMORY = Path("/proc/meminfo")
_BEGIN = time.monotonic()
_ENTRIES: list[dict[str, Any]] = []
_READY: dict[Case, Setup] = {}


class Options:
    """The command line options of this file, as a plugin of pytest."""

    def pytest_addoption(self, parser: pytest.Parser) -> None:
        add = parser.getgroup("fdkernels").addoption
        add("--set", default="core,scaling", help=f"cases, separated by commas: {', '.join(SETS)}")
        add("--device", choices=("cpu", "cuda"), help="default: the CPU and, where there is one, the GPU")
        add("--results", type=Path, metavar="FILE", help="the JSON, written after each measurement")
        add("--time-limit", type=float, metavar="SECONDS", help="start no case after this time")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every mode of every case."""
    option = metafunc.config.getoption
    devices = [option("--device")] if option("--device") else ["cpu", *["cuda"] * torch.cuda.is_available()]
    chosen = [case for device in devices for case in chosen_cases(device, option("--set").split(","))]
    pairs = [(case, mode) for case in chosen for mode in modes(case)]
    metafunc.parametrize(("case", "mode"), pairs, ids=[f"{case.id}-{mode}" for case, mode in pairs])


def test_call(case: Case, mode: str, benchmark: Any, pytestconfig: pytest.Config) -> None:
    option = pytestconfig.getoption
    limit, results, quick = option("--time-limit"), option("--results"), option("--set") == "quick"
    if limit is not None and time.monotonic() - _BEGIN > limit:
        pytest.skip(f"the time limit of {limit:g} s has passed")
    entry = _ready(case).measure(benchmark, mode, QUICK_BUDGET if quick else BUDGETS[case.device])
    if entry is not None:
        _ENTRIES.append(entry)
    if _ENTRIES and results is not None:
        command = ["python", "-m", "benchmarks.calls", *sys.argv[1:]]
        cases.write_results(results, cases.header(command, option("--device") or "all", quick), _ENTRIES)


def _ready(case: Case) -> Setup:
    """The setup of a case, which all of its modes share."""
    if case not in _READY:
        _READY.clear()
        torch.compiler.reset()
        if case.device == "cuda":
            torch.cuda.empty_cache()
        reason = does_not_fit(case)
        if reason is not None:
            pytest.skip(f"too little memory: {reason}")
        _READY[case] = Setup(case)
    return _READY[case]


def modes(case: Case) -> list[str]:
    """What of a case is timed; the kernels alone where the mask changes nothing about them."""
    alone = ["kernel forward", "kernel backward", "tap"] if case.is_plain else []
    # The memory that a GPU's allocator gives is warm.
    warm = ["kernel backward, warm"] if case.is_plain and case.device == "cpu" else []
    return ["forward", "forward+backward", *alone, *warm]


class Setup:
    """One case, compared with the truth before anything of it is timed.

    `losses` are the forwards of the contenders by name, `steps` their forward and backward into a fresh
    gradient; `left_out` says why one is missing.
    """

    def __init__(self, case: Case, compiled: bool = True) -> None:
        self.case = case
        self.inputs = cases.make_inputs(case)
        self.truth = peers.Truth(case, self.inputs)
        self.floors = peers.Floors(self.inputs.layers)
        reason = peers.compile_reason(case.device) if compiled else "not asked for"
        self.left_out = {"compiled": reason} if reason else {}
        self.losses = peers.contenders(case, self.inputs, compiled=reason is None)
        self.errors: dict[str, dict[str, float]] = {}
        for name, loss in list(self.losses.items()):
            try:
                self.errors[name] = dict(zip(("loss", "gradient"), self.truth.errors(loss), strict=True))
            except torch.OutOfMemoryError:
                del self.losses[name]
                self.left_out[name] = f"too little memory for {case.name}"
        self.steps = {name: functools.partial(self._step, loss) for name, loss in self.losses.items()}

    def functions(self, mode: str) -> Functions:
        """Who is timed in a mode, by name, first the one of this package; AssertionError if one is wrong."""
        for name, errors in self.errors.items():
            for (what, error), bound in zip(errors.items(), peers.bounds(self.case, name), strict=True):
                self._require(f"{what} of {name}", error, bound)
        if mode == "forward":
            return {**self.losses, "floor": self.floors.forward}
        if mode == "forward+backward":
            return {**self.steps, "floor": self.floors.forward_backward}
        if mode == "tap":
            return {"tap": self.tapped.tap, "separate": self.tapped.separate, "floor": self.tapped.floor}
        function, floor = {
            "kernel forward": (self.kernels.forward, self.floors.forward),
            "kernel backward": (self.kernels.backward, self.floors.backward),
            "kernel backward, warm": (self.kernels.warm, self.floors.warm),
        }[mode]
        return {"kernel": function, "floor": floor}

    @functools.cached_property
    def kernels(self) -> cases.Kernels:
        """The kernels alone, compared with the truth."""
        truth, bound = self.truth, peers.OP_BOUNDS[self.case.dtype][1]
        buffers = self.floors.buffers if self.case.device == "cpu" else []
        kernels = cases.kernels_of(self.case, self.inputs, truth.grad_sums, buffers)
        self._require("kernel forward", truth.sums_error(kernels.forward()), peers.SUMS_BOUND)
        self._require("kernel backward", truth.gradient_error(kernels.backward()), bound)
        if kernels.warm is not None:
            kernels.warm()
            self._require("kernel backward, warm", truth.gradient_error(buffers), bound)
        return kernels

    @functools.cached_property
    def tapped(self) -> peers.Tapped:
        """`tap` and what it replaces, compared with the truth."""
        tapped = peers.Tapped(self.case, self.inputs, self.truth)
        bound = peers.OP_BOUNDS[self.case.dtype][1]
        # A gradient of its own is rounded, and so is its sum with the one that arrives.
        for name, function, limit in (("tap", tapped.tap, bound), ("separate", tapped.separate, 2 * bound)):
            function()
            grads = [layer.grad for layer in self.inputs.layers]
            self._require(f"gradient of {name}", self.truth.gradient_error(grads, tapped.upstream), limit)
        return tapped

    def measure(self, benchmark: Any, mode: str, budget: float) -> dict[str, Any] | None:
        """Time a mode, its first function by pytest-benchmark; the entry of the results, None if that is off.

        Ratios are those of the first to the floor and of the others to the first.
        """
        case, functions = self.case, self.functions(mode)
        first = next(iter(functions))
        pairs = [(name, first) for name in functions if name not in (first, "floor")] + [(first, "floor")]
        benchmark.group = mode
        peaks = {}
        for name, function in functions.items():
            peers.clear_gradients(self.inputs.layers)
            peaks[name] = peak_bytes(function, case.device)
        samples = host_samples(benchmark, functions, case.device, budget)
        if not samples:
            return None
        seconds, ratios = summarize(samples, pairs)
        entry: dict[str, Any] = {
            "mode": mode,
            "case": case.name,
            "dtype": cases.dtype_name(case.dtype),
            "layout": case.layout,
            "device": case.device,
            "layers": ["x".join(map(str, shape)) for shape in case.layers],
            "mask": "x".join(map(str, case.mask_size)),
            "feature_bytes": case.feature_bytes,
            "backend": cases.auto_backend(case.device),
            "rounds": len(samples[first]),
            "seconds": seconds,
            "ratios": ratios,
            "peak_bytes": peaks,
            "errors": {name: self.errors[name] for name in functions if name in self.errors},
            "left_out": self.left_out,
        }
        if case.device == "cuda":
            medians = {name: times["median"] for name, times in seconds.items()}
            on_device = device_samples(functions, medians, budget)
            entry["device_seconds"], entry["device_ratios"] = summarize(on_device, pairs)
            entry["launches"] = {name: kernel_launches(function) for name, function in functions.items()}
        peers.clear_gradients(self.inputs.layers)
        return entry

    def _step(self, loss: Callable[[], Tensor]) -> None:
        peers.clear_gradients(self.inputs.layers)
        loss().backward()

    def _require(self, what: str, error: float, bound: float) -> None:
        peers.clear_gradients(self.inputs.layers)
        if not error <= bound:  # NaN is not
            raise AssertionError(
                f"{what} is wrong for {self.case.id}, so nothing is timed: its error is {error:.2g}, "
                f"at most {bound:.2g} was expected"
            )


def host_samples(benchmark: Any, functions: Functions, device: str, budget: float) -> Samples:
    """Seconds of calls, in rounds: each function once untimed and once timed, as in a loop that trains.

    What others did before is not its own: they emptied the caches, and in a virtual machine the memory that
    it freed seconds ago has gone back to the host, to come again page by page. Each round begins with the
    next of them; pytest-benchmark times the first, and its setup the others.
    """
    measured, *others = functions

    def call(name: str) -> None:
        functions[name]()  # what it returns is freed within the call
        if device == "cuda":
            torch.cuda.synchronize()

    def seconds_of(name: str) -> float:
        start = time.perf_counter()
        call(name)
        return time.perf_counter() - start

    def setup() -> None:
        others.append(others.pop(0))
        for name in others:
            call(name)
            samples[name].append(seconds_of(name))
        call(measured)

    seconds = sum(2 * min(seconds_of(name), seconds_of(name)) for name in functions)
    samples: Samples = {name: [] for name in others}
    rounds = _rounds(budget, seconds)
    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(call, args=(measured,), setup=setup, rounds=rounds)
    finally:
        gc.enable()
    return {} if benchmark.disabled else {measured: list(benchmark.stats.stats.data), **samples}


def _rounds(budget: float, seconds: float) -> int:
    return min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget / seconds)))


def device_samples(functions: Functions, host_seconds: Mapping[str, float], budget: float) -> Samples:
    """Times on a GPU from the first to the last of a call's kernels, in turn, without waits for the host.

    The GPU is kept busy until the host has queued the whole call, so that the time is what its kernels take
    when a training loop runs ahead of the GPU. None of the functions may wait for the GPU.
    """
    samples: Samples = {name: [] for name in functions}
    order = list(functions)
    for _ in range(_rounds(budget, sum(4 * host_seconds[name] + 1e-4 for name in functions))):
        order.append(order.pop(0))
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            functions[name]()
            pause = int((2 * host_seconds[name] + 1e-4) * _CLOCK_HZ)
            torch.cuda._sleep(pause)  # noqa: SLF001 - torch has no public kernel that only waits
            start.record()
            functions[name]()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(start.elapsed_time(end) / 1e3)
    return samples


def quartiles(values: Iterable[float]) -> dict[str, float]:
    """Median and quartiles, in five digits."""
    q1, middle, q3 = (float(f"{x:.5g}") for x in statistics.quantiles(list(values), n=4, method="inclusive"))
    return {"median": middle, "q1": q1, "q3": q3}


def summarize(
    samples: Samples, pairs: Iterable[tuple[str, str]]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Quartiles of the seconds, and of the ratio of each pair within a round under the key `a/b`."""
    times = {name: quartiles(values) for name, values in samples.items()}
    ratios = {
        f"{above}/{below}": quartiles(a / b for a, b in zip(samples[above], samples[below], strict=True))
        for above, below in pairs
    }
    return times, ratios


def chosen_cases(device: str, sets: Iterable[str] = ("full",)) -> list[Case]:
    """The cases of some sets on a device, each once, in the order to run them.

    Raises ValueError if no set has that name.

    `core` is what a user meets, in ten minutes on two cores; `scaling` one map from 1 MiB to the largest that
    fits; `full` every name in every dtype and layout; `brief` a minute or two on a GPU; `quick` two cases, to
    see that it runs.
    """
    chosen = {}
    for name in sets:
        if name not in SETS:
            raise ValueError(f"set must be one of {', '.join(SETS)}, got {name!r}")
        chosen |= {case.id: case for case in _of_set(name, device) if case.id not in chosen}
    if device == "cpu":
        # Holes that small maps leave in the heap may take a large one, with pages that are there already or
        # without, by luck: three times the time for whoever has none.
        return sorted(chosen.values(), key=lambda case: case.feature_bytes, reverse=True)
    return list(chosen.values())


def _of_set(name: str, device: str) -> list[Case]:
    counts = {
        "core": _CUDA_CORE if device == "cuda" else _CORE,
        "scaling": {f"scaling-{2**power}": 1 for power in range(_LARGEST_MIB[device].bit_length())},
        "full": dict.fromkeys(_FULL, len(VARIANTS)),
        "brief": _BRIEF | {f"scaling-{mib}": 1 for mib in _BRIEF_MIB},
        "quick": {"enc1-128": 1, "pyramid-32": 1},
    }[name]
    return [
        cases.named_case(case, *variant, device)
        for index, variant in enumerate(VARIANTS)
        for case, count in counts.items()
        if index < count
    ]


def does_not_fit(case: Case) -> str | None:
    """Why the device lacks the memory for a case, or None."""
    needed = _PEAK_FACTORS[case.device] * case.feature_bytes
    if case.device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        text = MEMORY.read_text("ascii") if MEMORY.is_file() else ""
        found = re.search(r"MemAvailable: +(\d+)", text)
        free = int(found[1]) * 1024 if found else needed
    if free >= needed:
        return None
    return f"{needed / 2**30:.3g} GiB are needed for {case.name}, {free / 2**30:.3g} GiB are free"


def main() -> None:
    """Run this file under pytest-benchmark."""
    defaults = ["-q", "-p", "no:cacheprovider", "--benchmark-only", "--benchmark-group-by=group"]
    defaults += ["--benchmark-sort=name", "--benchmark-columns=median,iqr,rounds"]
    sys.exit(pytest.main([__file__, *defaults, *sys.argv[1:]], plugins=[Options()]))


if __name__ == "__main__":
    main()
