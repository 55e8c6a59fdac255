"""Times of several functions, taken in turn, so that what the machine does meanwhile meets all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

Functions = Mapping[str, Callable[[], object]]
Samples = dict[str, list[float]]  # seconds of each round, by name

MIN_ROUNDS, MAX_ROUNDS = 7, 200
# A call that took longer finds nothing of the last one in a cache, and needs none before it that is not
# timed.
_WARM_SECONDS = 0.02
# A GPU clock that is hardly too slow, for a pause of at least the time that is asked for.
_CLOCK_HZ = 3e9


class Rounds:
    """Rounds in which each function is called once untimed, as others emptied the caches, and once timed.

    One of them, `measured`, is timed by pytest-benchmark: `before` is its setup, which times the others.
    """

    def __init__(self, functions: Functions, measured: str, device: str) -> None:
        self.functions = dict(functions)
        self.measured = measured
        self.device = device
        self.samples: Samples = {name: [] for name in functions if name != measured}
        self.seconds = {name: min(self.time(name) for _ in range(2)) for name in functions}
        self._order = list(self.samples)

    def run(self, benchmark: Any, budget: float) -> Samples:
        """Have pytest-benchmark do as many rounds as fit into `budget` seconds; the times of all."""
        round_seconds = sum(
            seconds * (1 if seconds > _WARM_SECONDS else 2) for seconds in self.seconds.values()
        )
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget / round_seconds)))
        gc.collect()
        gc.disable()
        try:
            benchmark.pedantic(self.measured_call, setup=self.before, rounds=rounds)
        finally:
            gc.enable()
        if benchmark.disabled:
            return {}
        return {self.measured: list(benchmark.stats.stats.data), **self.samples}

    def before(self) -> None:
        """Time the others, each round beginning with the next of them, and warm what is measured."""
        self._order.append(self._order.pop(0))
        for name in self._order:
            self._warm(name)
            self.samples[name].append(self.time(name))
        self._warm(self.measured)

    def measured_call(self) -> None:
        """What pytest-benchmark times."""
        self.call(self.measured)

    def time(self, name: str) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        self.call(name)
        return time.perf_counter() - start

    def call(self, name: str) -> None:
        """One call to its end; what it returns is gone by then."""
        self.functions[name]()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _warm(self, name: str) -> None:
        if self.seconds[name] <= _WARM_SECONDS:
            self.call(name)


def device_samples(functions: Functions, host_seconds: Mapping[str, float], budget: float) -> Samples:
    """Times on a GPU from the first to the last of a call's kernels, in turn, without waits for the host.

    The GPU is kept busy until the host has queued the whole call, so that the time is what its kernels take
    when a training loop runs ahead of the GPU. None of the functions may wait for the GPU.
    """
    round_seconds = sum(4 * host_seconds[name] + 1e-4 for name in functions)
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget / round_seconds)))
    samples: Samples = {name: [] for name in functions}
    order = list(functions)
    for _ in range(rounds):
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
    """Median and quartiles, rounded to what they mean."""
    ordered = list(values)
    low, middle, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return {"median": _rounded(middle), "q1": _rounded(low), "q3": _rounded(high)}


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


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
