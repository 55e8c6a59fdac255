"""What the results of single experiments show, in plain words: simulations, bounds, and inflated features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fdkernels.segmentation.report.experiment import Experiment
from fdkernels.segmentation.report.words import counted


def own_sentences(experiment: Experiment) -> list[str]:
    """Say what results show that scores do not; nothing where they are not there or of another form."""
    stated = experiment.summary.get("results")
    results = stated if isinstance(stated, Mapping) else {}
    found = []
    for make in (_of_simulations, _of_bound, _of_features):
        try:
            found += list(make(experiment, results))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # of another version; the tables show it
    return found


def _of_simulations(experiment: Experiment, results: Mapping[str, Any]) -> Iterator[str]:
    """Say for how many estimates the interval holds what example 3 states."""
    simulations = results.get("simulations", [])
    estimates = [
        of[what]
        for one in simulations
        for of in one["distributions"].values()
        for what in ("slope", "variance")
    ]
    if not estimates:
        return
    hold = sum(one["interval"][0] <= one["stated"] <= one["interval"][1] for one in estimates)
    ends = [one["independence"]["interval"] for one in simulations]
    independent = sum(low <= 0 <= high for low, high in ends)
    yield (
        f"Of {len(estimates)} slopes and variances that were estimated by simulation, the 95 % interval of "
        f"{hold} holds the stated one; about one of twenty misses it by chance."
    )
    yield (
        f"The partial correlation of X and Y given Z has 0 in its interval in {independent} of "
        f"{counted(len(ends), 'simulation')}."
    )
    yield "This checks the formulas of the example, and says nothing of images."


def _of_bound(experiment: Experiment, results: Mapping[str, Any]) -> Iterator[str]:
    """Say how often the inequalities of the lemmas hold."""
    for lemma, by_arm in results.get("lemmas", {}).items():
        for arm, layers in by_arm.items():
            total = sum(one["samples"] for one in layers.values())
            stated, derived = (
                sum(one[name] for one in layers.values()) for name in ("holds", "holds_derived")
            )
            yield (
                f"Under {arm} the inequality of {lemma.replace('lemma', 'lemma ')} holds with the k that is "
                f"stated for {stated} of {total} samples and layers, and with the k that its proof gives for "
                f"{derived}."
            )


def _of_features(experiment: Experiment, results: Mapping[str, Any]) -> Iterator[str]:
    """Say whether features have only become larger: L_fd falls with their scale alone."""
    features = results.get("features", {})
    for arm, baseline in experiment.pairs.items():
        ours, theirs = features.get(arm), features.get(baseline)
        if not ours or not theirs:
            continue
        larger, apart = (
            sum(ours[layer][name] > theirs[layer][name] for layer in ours)
            for name in ("norm", "relative_discrepancy")
        )
        yield (
            f"Under {arm} the features are larger than under {baseline} in {larger} of {len(ours)} layers, "
            f"and the discrepancy relative to their size is larger in {apart}; L_fd falls by the first alone "
            "as well, which separates nothing."
        )


__all__ = ["own_sentences"]
