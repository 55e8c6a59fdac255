"""The results of an experiment as tables at the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fdkernels.segmentation.console import SCORE_TITLES, SET_TITLES


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """Show the comparisons of arms, a table a pair, where an experiment has them.

    Args:
        summary: the content of summary.json of a finished experiment.
    """
    comparisons = summary["results"].get("comparisons", [])
    pairs = dict.fromkeys((one["arm"], one["baseline"]) for one in comparisons)
    return [_table(summary, comparisons, arm, baseline) for arm, baseline in pairs]


def _table(
    summary: Mapping[str, Any], comparisons: Sequence[Mapping[str, Any]], arm: str, baseline: str
) -> Table:
    results = summary["results"]
    tested = sum(one["p"] is not None for one in comparisons)
    table = Table(
        title=f"{summary['experiment']}: {summary['settings']['model']} on {summary['settings']['dataset']}, "
        f"{arm} against {baseline}; {len(summary['seeds'])} seeds, {len(summary['folds'])} folds",
        caption="In brackets: 95 % interval, bootstrap over patients with the seeds as blocks. p: Wilcoxon, "
        f"corrected for {tested} comparisons (Holm). r: rank-biserial. "
        f"Worst off: {results['worst_off_rule']}.",
    )
    table.add_column("samples")
    for heading in ("", baseline, arm, "difference", "p", "r"):
        table.add_column(heading, justify="right")
    for one in comparisons:
        if (one["arm"], one["baseline"]) != (arm, baseline):
            continue
        before, after = (results["means"][name][one["set"]][one["score"]] for name in (baseline, arm))
        ends = one["interval"]
        spread = "" if ends is None else f"\n[{_number(ends[0], '+')}, {_number(ends[1], '+')}]"
        table.add_row(
            f"{SET_TITLES[one['set']]} ({results['samples'][one['set']]})",
            SCORE_TITLES[one["score"]],
            _number(before),
            _number(after),
            _number(one["mean"], "+") + spread,
            _number(one["p_holm"]),
            _number(one["rank_biserial"], "+"),
        )
    return table


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.4f}"


__all__ = ["tables"]
