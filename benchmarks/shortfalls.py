"""Where the op is slower than something else or misses a figure to reach, found in the measurements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.results import CaseResult, DeviceResults, Measurement

PEERS = ("eager", "compiled", "bmm")
FORWARD, STEP, BACKWARD_KERNEL, TAP = "forward", "forward+backward", "kernel backward", "tap"

# The figures to reach.
FLOOR_LIMIT = 1.10
EAGER_FACTOR = 4.0
BEST_FACTOR = 3.0
SMALL_PYRAMIDS, SMALL_PYRAMID_FACTOR = ("pyramid-32", "deep-256"), 3.0
MEMORY_LIMIT = 0.01

# What keeps a figure from being reached is written down by these keys, in reasons.md.
FIGURES = {
    "floor forward": f"forward over `sum`, for maps beyond the cache, at most {FLOOR_LIMIT:.2f}",
    "floor forward+backward": f"forward and backward over both floors, likewise, at most {FLOOR_LIMIT:.2f}",
    "floor kernel backward": f"the backward kernel over `fill_`, likewise, at most {FLOOR_LIMIT:.2f}",
    "eager": f"`eager` over the op, at least {EAGER_FACTOR:g}",
    "channels_last": f"the best peer over the op, channels_last, at least {BEST_FACTOR:g}",
    "in the cache": f"the best peer over the op, maps that fit the cache, at least {BEST_FACTOR:g}",
    "small pyramid": f"single calls over one call, small layers, at least {SMALL_PYRAMID_FACTOR:g}",
    "memory": f"peak memory beyond the gradient, below {MEMORY_LIMIT:.0%} of the features' bytes",
    "slower small": "slower than a peer, maps that fit the cache",
    "slower large": "slower than a peer, maps that do not fit the cache",
}


class Shortfall(NamedTuple):
    """A number that is not as it should be.

    Attributes:
        case: whose.
        mode: `"forward"` and so on.
        key: the figure, one of `FIGURES`.
        measured: the number, with what it is made of.
        severity: how far off it is, as a factor; 1 is just so.
    """

    case: CaseResult
    mode: str
    key: str
    measured: str
    severity: float


def losses(results: DeviceResults) -> list[Shortfall]:
    """Every case in which something else takes less time than the op, the worst first."""
    found = [
        _loss(case, mode, name, measurement, results.fits_cache(case))
        for case in results.cases
        for mode, measurement in case.modes.items()
        for name in (*PEERS, "single calls")
        if (factor := _factor(measurement, name)) is not None and factor < 1
    ]
    return _worst_first(found)


def missed_figures(results: DeviceResults) -> list[Shortfall]:
    """Every figure that is not reached, the worst first."""
    found = [
        shortfall
        for case in results.cases
        for shortfall in (
            *(_floors(case) if results.beyond_cache(case) else ()),
            *_factors(case, results.fits_cache(case)),
            *_memory(case),
        )
    ]
    return _worst_first(found)


def best_peer(measurement: Measurement) -> tuple[str, float] | None:
    """The fastest of the peers, and its time over the op's."""
    factors = [(name, factor) for name in PEERS if (factor := _factor(measurement, name)) is not None]
    return min(factors, key=lambda pair: pair[1], default=None)


def memory_share(case: CaseResult, measurement: Measurement, name: str, mode: str) -> float | None:
    """Peak memory over the features' bytes, beyond the gradient that backward has to write."""
    if name not in measurement.peak_bytes:
        return None
    gradient = case.feature_bytes if mode == STEP else 0
    return (measurement.peak_bytes[name] - gradient) / case.feature_bytes


def bytes_moved(case: CaseResult, mode: str) -> int:
    """The bytes of features and gradients that a mode has to move, whoever computes it."""
    transfers = {STEP: 2, TAP: 3}
    return case.feature_bytes * transfers.get(mode, 1)


def _factor(measurement: Measurement, name: str) -> float | None:
    ratio = measurement.ratios.get(f"{name}/op")
    return None if ratio is None else ratio.median


def _loss(case: CaseResult, mode: str, name: str, measurement: Measurement, fits_cache: bool) -> Shortfall:
    ratio = measurement.ratios[f"{name}/op"]
    times = (
        f"{measurement.seconds['op'].median * 1e3:.3g} ms against "
        f"{measurement.seconds[name].median * 1e3:.3g} ms"
    )
    noise = ", within the noise" if ratio.q3 >= 1 else ""
    return Shortfall(
        case,
        mode,
        "slower small" if fits_cache else "slower large",
        f"{1 / ratio.median:.2f} times the time of `{name}` ({times}{noise})",
        1 / ratio.median,
    )


def _floors(case: CaseResult) -> Iterator[Shortfall]:
    for mode, key in ((FORWARD, "op/floor"), (STEP, "op/floor"), (BACKWARD_KERNEL, "kernel/floor")):
        if mode in case.modes and case.modes[mode].ratios[key].median > FLOOR_LIMIT:
            ratio = case.modes[mode].ratios[key].median
            yield Shortfall(case, mode, f"floor {mode}", f"{ratio:.2f}", ratio / FLOOR_LIMIT)


def _factors(case: CaseResult, fits_cache: bool) -> Iterator[Shortfall]:
    measurement = case.modes.get(STEP)
    if measurement is None:
        return
    aims = [("eager", "eager", _factor(measurement, "eager"), EAGER_FACTOR)]
    best = best_peer(measurement)
    if best is not None and (case.layout == "channels_last" or fits_cache):
        where = "channels_last" if case.layout == "channels_last" else "in the cache"
        aims.append((best[0], where, best[1], BEST_FACTOR))
    if case.name in SMALL_PYRAMIDS:
        aims.append(
            ("single calls", "small pyramid", _factor(measurement, "single calls"), SMALL_PYRAMID_FACTOR)
        )
    for name, key, factor, aim in aims:
        if factor is not None and factor < aim:
            yield Shortfall(case, STEP, key, f"{factor:.2f} (`{name}`)", aim / factor)


def _memory(case: CaseResult) -> Iterator[Shortfall]:
    for mode in (FORWARD, STEP):
        if mode in case.modes:
            share = memory_share(case, case.modes[mode], "op", mode)
            if share is not None and share >= MEMORY_LIMIT:
                yield Shortfall(case, mode, "memory", f"{share:.1%}", share / MEMORY_LIMIT)


def _worst_first(found: list[Shortfall]) -> list[Shortfall]:
    return sorted(found, key=lambda shortfall: -shortfall.severity)
