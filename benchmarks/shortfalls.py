"""Where the op is slower than something else or misses a figure to reach, found in the measurements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.results import CaseResult, DeviceResults, Measurement

PEERS = ("eager", "compiled", "bmm")
FORWARD, STEP, BACKWARD_KERNEL = "forward", "forward+backward", "kernel backward"

# The figures to reach, in the words of the page.
FLOOR_LIMIT = 1.10
EAGER_FACTOR = 4.0
BEST_FACTOR = 3.0
SMALL_PYRAMID, SMALL_PYRAMID_FACTOR = "pyramid-32", 3.0
MEMORY_LIMIT = 0.01


class Shortfall(NamedTuple):
    """A number that is not as it should be.

    Attributes:
        case: whose.
        mode: `"forward"` and so on.
        what: the claim that does not hold, as a noun: "time of the op over its floor".
        measured: the number, with what it is made of.
        aim: what it should be.
        severity: how far off it is, as a factor; 1 is just so.
    """

    case: CaseResult
    mode: str
    what: str
    measured: str
    aim: str
    severity: float


def losses(results: DeviceResults) -> list[Shortfall]:
    """Every case in which something else takes less time than the op, the worst first."""
    found = [
        _loss(case, mode, name, measurement)
        for case in results.cases
        for mode, measurement in case.modes.items()
        for name in (*PEERS, "single calls")
        if _factor(measurement, name) is not None and _factor(measurement, name) < 1
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


def _factor(measurement: Measurement, name: str) -> float | None:
    ratio = measurement.ratios.get(f"{name}/op")
    return None if ratio is None else ratio.median


def _loss(case: CaseResult, mode: str, name: str, measurement: Measurement) -> Shortfall:
    ratio = measurement.ratios[f"{name}/op"]
    times = (
        f"{measurement.seconds['op'].median * 1e3:.3g} ms against "
        f"{measurement.seconds[name].median * 1e3:.3g} ms"
    )
    noise = ", within the noise" if ratio.q3 >= 1 else ""
    return Shortfall(
        case,
        mode,
        f"slower than `{name}`",
        f"{1 / ratio.median:.2f} times its time ({times}{noise})",
        "≤ 1",
        1 / ratio.median,
    )


def _floors(case: CaseResult) -> Iterator[Shortfall]:
    for mode, key in ((FORWARD, "op/floor"), (STEP, "op/floor"), (BACKWARD_KERNEL, "kernel/floor")):
        if mode in case.modes and case.modes[mode].ratios[key].median > FLOOR_LIMIT:
            ratio = case.modes[mode].ratios[key].median
            yield Shortfall(
                case,
                mode,
                "time over that of the floor, beyond the cache",
                f"{ratio:.2f}",
                f"≤ {FLOOR_LIMIT:.2f}",
                ratio / FLOOR_LIMIT,
            )


def _factors(case: CaseResult, fits_cache: bool) -> Iterator[Shortfall]:
    measurement = case.modes.get(STEP)
    if measurement is None:
        return
    aims = [("eager", "time of `eager` over the op's", _factor(measurement, "eager"), EAGER_FACTOR)]
    best = best_peer(measurement)
    if best is not None and (case.layout == "channels_last" or fits_cache):
        where = "channels_last" if case.layout == "channels_last" else "in the cache"
        aims.append((best[0], f"time of the best peer over the op's, {where}", best[1], BEST_FACTOR))
    if case.name == SMALL_PYRAMID:
        factor = _factor(measurement, "single calls")
        what = "time of `single calls` over the op's, small layers"
        aims.append(("single calls", what, factor, SMALL_PYRAMID_FACTOR))
    for name, what, factor, aim in aims:
        if factor is not None and factor < aim:
            yield Shortfall(case, STEP, what, f"{factor:.2f} (`{name}`)", f"≥ {aim:g}", aim / factor)


def _memory(case: CaseResult) -> Iterator[Shortfall]:
    for mode in (FORWARD, STEP):
        if mode in case.modes:
            share = memory_share(case, case.modes[mode], "op", mode)
            if share is not None and share >= MEMORY_LIMIT:
                what = "peak memory beyond the gradient, of the features' bytes"
                yield Shortfall(
                    case, mode, what, f"{share:.1%}", f"< {MEMORY_LIMIT:.0%}", share / MEMORY_LIMIT
                )


def _worst_first(found: list[Shortfall]) -> list[Shortfall]:
    return sorted(found, key=lambda shortfall: -shortfall.severity)
