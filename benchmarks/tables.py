"""The tables of the page: measurements of a device as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.results import CaseResult, DeviceResults, Measurement, Spread
from benchmarks.shortfalls import FORWARD, PEERS, STEP, TAP, Shortfall, bytes_moved, memory_share

NONE = "–"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def floors_table(results: DeviceResults) -> str:
    """Times over those of the floors, and the rate at which forward reads."""
    header = [
        "case", "MiB", "forward", "forward kernel", "backward kernel, fresh", "backward kernel, warm",
        "forward+backward", "forward reads", "of the copy rate",
    ]  # fmt: skip
    columns = (
        (FORWARD, "op/floor"),
        ("kernel forward", "kernel/floor"),
        ("kernel backward", "kernel/floor"),
        ("kernel backward, warm", "kernel/floor"),
        (STEP, "op/floor"),
    )
    copy_rate = results.copy_rate
    rows = []
    for case in results.listed:
        cells = [_ratio(case.modes.get(mode), key) for mode, key in columns]
        rate = _read_rate(case)
        share = None if rate is None or not copy_rate else rate / copy_rate
        rows.append([
            label(case),
            f"{case.feature_bytes / 2**20:.3g}",
            *cells,
            NONE if rate is None else f"{rate / 1e9:.3g} GB/s",
            NONE if share is None else f"{share:.0%}",
        ])  # fmt: skip
    return table(header, rows)


def peers_table(results: DeviceResults, mode: str, host: bool = False) -> str:
    """Milliseconds of everyone, and how many times the op's time each peer takes."""
    names = [
        name
        for name in _contenders(results, mode)
        if name != "op" and not name.startswith("single") and name != "floor"
    ]
    header = ["case", "op, ms", *(f"`{name}`" for name in names)]
    rows = []
    for case in results.listed:
        measurement = case.modes.get(mode)
        if measurement is None:
            continue
        seconds = measurement.host_seconds if host else measurement.seconds
        ratios = measurement.host_ratios if host else measurement.ratios
        cells = [
            f"{_ms(seconds[name])} ({spread_text(ratios[f'{name}/op'])}×)" if name in seconds else NONE
            for name in names
        ]
        rows.append([label(case), _ms(seconds["op"]), *cells])
    return table(header, rows)


def pyramids_table(results: DeviceResults) -> str:
    """One call for all layers beside one call a layer."""
    header = [
        "case", "layers", "forward, ms", "single calls", "forward+backward, ms", "single calls"
    ]  # fmt: skip
    rows = []
    for case in results.listed:
        if len(case.layers) == 1:
            continue
        cells = []
        for mode in (FORWARD, STEP):
            measurement = case.modes.get(mode)
            if measurement is None:
                cells += [NONE, NONE]
                continue
            singles = _ms(measurement.seconds["single calls"])
            factor = spread_text(measurement.ratios["single calls/op"])
            cells += [_ms(measurement.seconds["op"]), f"{singles} ({factor}×)"]
        rows.append([label(case), str(len(case.layers)), *cells])
    return table(header, rows) if rows else ""


def scaling_table(results: DeviceResults) -> str:
    """The series by size: bytes moved over time as a share of the copy rate, of the op and of its peers."""
    names = ("op", "floor", *PEERS)
    rate = results.copy_rate
    rows = []
    for case in results.cases:
        if not case.name.startswith("scaling") or not rate:
            continue
        cells = []
        for mode in (FORWARD, STEP):
            for name in names:
                seconds = case.modes[mode].seconds.get(name) if mode in case.modes else None
                share = None if seconds is None else bytes_moved(case, mode) / seconds.median / rate
                cells.append(NONE if share is None else f"{share:.0%}")
        rows.append([f"{case.feature_bytes / 2**20:g}", *cells])
    header = ["MiB", *(f"{mode}: `{name}`" for mode in (FORWARD, STEP) for name in names)]
    return table(header, rows) if rows else ""


def tap_table(results: DeviceResults) -> str:
    """`tap` beside a separate op, where the network sends a gradient to the same features."""
    rows = []
    for case in results.listed:
        measurement = case.modes.get(TAP)
        if measurement is not None:
            rows.append(
                [
                    label(case),
                    _ms(measurement.seconds["tap"]),
                    _ms(measurement.seconds["separate"]),
                    f"{spread_text(measurement.ratios['separate/tap'])}×",
                    _ratio(measurement, "tap/floor"),
                ]
            )
    header = ["case", "`tap`, ms", "separate, ms", "separate over `tap`", "`tap` over its floor"]
    return table(header, rows) if rows else ""


def ops_table(results: DeviceResults) -> str:
    """Ops that each contender dispatches; what a compiled graph or a custom op does inside is not seen."""
    names = [
        name
        for name in _contenders(results, STEP)
        if any(name in case.modes[STEP].ops for case in results.listed if STEP in case.modes)
    ]
    rows = []
    for case in results.listed:
        cells = []
        for mode in (FORWARD, STEP):
            counts = case.modes[mode].ops if mode in case.modes else {}
            cells += [str(counts.get(name, NONE)) for name in names]
        rows.append([label(case), *cells])
    header = ["case", *(f"{mode}: `{name}`" for mode in (FORWARD, STEP) for name in names)]
    return table(header, rows) if names else ""


def memory_table(results: DeviceResults) -> str:
    """Peak memory beside inputs and gradients, as a share of the features."""
    header = ["case", "MiB"]
    header += [f"{mode}: `{name}`" for mode in (FORWARD, STEP) for name in ("op", *PEERS)]
    rows = []
    for case in results.listed:
        cells = []
        for mode in (FORWARD, STEP):
            for name in ("op", *PEERS):
                measurement = case.modes.get(mode)
                share = measurement and memory_share(case, measurement, name, mode)
                cells.append(NONE if share is None else _percent(share))
        rows.append([label(case), f"{case.feature_bytes / 2**20:.3g}", *cells])
    return table(header, rows)


def launches_table(results: DeviceResults) -> str:
    """Kernels, copies and fills that each contender has the GPU do."""
    names = [name for name in _contenders(results, STEP) if name != "floor"]
    header = ["case", *(f"{mode}: `{name}`" for mode in (FORWARD, STEP) for name in names)]
    rows = []
    for case in results.listed:
        cells = []
        for mode in (FORWARD, STEP):
            counts = case.modes[mode].launches if mode in case.modes else {}
            cells += [str(counts.get(name, NONE)) for name in names]
        rows.append([label(case), *cells])
    return table(header, rows)


def shortfalls_table(shortfalls: Sequence[Shortfall]) -> str:
    """One line for each number that is not as it should be, with the bytes that it has to move."""
    header = ["case", "mode", "measured", "MiB moved"]
    rows = [
        [label(s.case), s.mode, s.measured, f"{bytes_moved(s.case, s.mode) / 2**20:.3g}"] for s in shortfalls
    ]
    return table(header, rows)


def label(case: CaseResult) -> str:
    """`enc1-256` float32 contiguous."""
    return f"`{case.name}` {case.dtype} {case.layout}"


def _contenders(results: DeviceResults, mode: str) -> list[str]:
    """The names of all contenders of a mode, each once, in the order in which they were measured."""
    return list(
        dict.fromkeys(
            name for case in results.listed if mode in case.modes for name in case.modes[mode].seconds
        )
    )


def _read_rate(case: CaseResult) -> float | None:
    if FORWARD not in case.modes:
        return None
    return case.feature_bytes / case.modes[FORWARD].seconds["op"].median


def _ratio(measurement: Measurement | None, key: str) -> str:
    if measurement is None:
        return NONE
    ratio = measurement.ratios[key]
    return f"{ratio.median:.2f} [{ratio.q1:.2f}–{ratio.q3:.2f}]"


def _ms(seconds: Spread) -> str:
    return f"{seconds.median * 1e3:.3g}"


def spread_text(ratio: Spread, decimals: int | None = None) -> str:
    """Median and quartiles, in three digits or to so many decimals."""
    form = ".3g" if decimals is None else f".{decimals}f"
    return f"{ratio.median:{form}} [{ratio.q1:{form}}–{ratio.q3:{form}}]"


def width_text(base_channels: int | None) -> str:
    """The width of a network."""
    return "published width" if base_channels is None else f"{base_channels} base channels"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"
