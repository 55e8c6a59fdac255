"""What an experiment's numbers show and what they do not, in plain words, by rules."""

from __future__ import annotations

from collections.abc import Sequence

from fdkernels.segmentation.report.arms import Compared, compared, corrected
from fdkernels.segmentation.report.experiment import Difference, Experiment, over_seeds
from fdkernels.segmentation.report.own_words import own_sentences
from fdkernels.segmentation.report.page import interval_text, number
from fdkernels.segmentation.report.statistics import correlation, correlation_interval
from fdkernels.segmentation.report.words import (
    FEW_PATIENTS,
    FEW_SEEDS,
    counted,
    listed,
    of_alpha,
    of_state,
    of_training,
)

# Arms whose difference is told in words; the table has all.
MOST_TOLD = 6
LEVEL = 0.05


def summary_of(experiment: Experiment) -> str:
    """Sum up an experiment."""
    scored = [one.run for one in experiment.runs if one.arm in experiment.arms]
    sentences: list[str] = []
    own = own_sentences(experiment)
    if not experiment.rows:
        sentences += own or [f"The experiment {experiment.title} has no scores of samples."]
    else:
        sentences += _of_differences(experiment)
        if experiment.name == "correlation":
            sentences += _of_correlation(experiment)
        sentences += [*own, *_of_numbers(experiment)]
    sentences += _of_progress(experiment)
    sentences += [*of_alpha(scored), *of_training(scored)]
    return " ".join(sentences)


def _of_differences(experiment: Experiment) -> list[str]:
    found = [one for one in compared(experiment) if one.by_score["dice"] is not None]
    overall = [one for one in found if one.chosen == "all"]
    if not overall:
        only = listed(experiment.arms)
        return [f"Only {only} of {experiment.title} has scores, so that there is nothing to compare yet."]
    sentences = [_told(one) for one in overall[:MOST_TOLD]]
    if len(overall) > MOST_TOLD:
        sentences.append(f"The table has {counted(len(overall) - MOST_TOLD, 'further arm')}.")
    sentences += _of_worst_off(found)
    if "before" in experiment.pairs.values():
        sentences.append(
            "After phase two the network has also trained for longer, so that a difference to before it is "
            "not the effect of the loss: that is what the experiment ablation is for."
        )
    drawn = [gain for one in found for gain in one.by_score.values() if gain is not None and gain.ends]
    if len(drawn) > 1:
        clear = sum(gain.excludes_zero for gain in drawn)
        verb = "excludes" if clear < 2 else "exclude"
        sentences.append(
            f"Of the {len(drawn)} intervals of differences in the table {clear or 'none'} {verb} 0; of "
            "twenty intervals one does so by chance where there is no difference at all, and they are not "
            "corrected for their number."
        )
    tested = corrected(experiment).values()
    if tested:
        below = sum(p < LEVEL for p in tested)
        verb = "has" if below < 2 else "have"
        sentences.append(
            f"Of the {counted(len(tested), 'test')}, which are corrected, {below or 'none'} {verb} p below "
            f"{LEVEL}."
        )
    return sentences


def _told(one: Compared) -> str:
    gain = one.by_score["dice"]
    assert gain is not None  # the caller leaves the others out
    against = f"Over all samples Dice under {one.arm} differs from that under {one.baseline} by "
    amount = f"{number(gain.mean, 2, signed=True)} points"
    if gain.ends is None:
        return (
            f"{against}{amount}; with fewer than two patients there is no interval, and this shows nothing."
        )
    return f"{against}{amount} (95 % interval {interval_text(gain.ends, 2)}): {_meaning(gain)}."


def _meaning(gain: Difference) -> str:
    if gain.excludes_zero:
        better = "higher" if gain.mean > 0 else "lower"
        return f"the interval excludes 0, and Dice is {better} by more than these patients and seeds vary"
    return "the interval includes 0, so that these numbers show neither a gain nor a loss"


def _of_worst_off(found: Sequence[Compared]) -> list[str]:
    """Say for which arms the worst-off differ though all samples together do not, or the other way."""
    by_arm = {(one.arm, one.chosen): one.by_score["dice"] for one in found}
    sentences = []
    for arm in list(dict.fromkeys(one.arm for one in found))[:MOST_TOLD]:
        worst = by_arm.get((arm, "worst_off"))
        if worst is not None and worst.ends is not None:
            verb = "excludes" if worst.excludes_zero else "includes"
            sentences.append(
                f"For the worst-off samples under {arm} it is {number(worst.mean, 2, signed=True)} points, "
                f"and the interval ({interval_text(worst.ends, 2)}) {verb} 0."
            )
    return sentences


def _of_correlation(experiment: Experiment) -> list[str]:
    sentences = []
    for arm in experiment.arms[:MOST_TOLD]:
        rows = over_seeds(experiment.of_arm(arm))
        negative, positive, total = [], [], 0
        for layer in experiment.layers:
            kept = [row for row in rows if layer in row.losses]
            x, y = [row.losses[layer] for row in kept], [row.dice for row in kept]
            if correlation(x, y) is None:
                continue
            total += 1
            ends = correlation_interval(x, y, [row.patient for row in kept])
            if ends is not None and ends[1] < 0:
                negative.append(layer)
            elif ends is not None and ends[0] > 0:
                positive.append(layer)
        unclear = total - len(negative) - len(positive)
        sentences.append(
            f"Under {arm} the interval of the correlation of Dice and L_fd lies below 0 in {len(negative)} "
            f"of {counted(total, 'layer')}, above 0 in {len(positive)}, and holds 0 in {unclear}."
        )
    sentences.append(
        "The paper expects it below 0. A correlation over samples does not say that lowering L_fd raises "
        "Dice: images that are hard may have both."
    )
    return sentences


def _of_numbers(experiment: Experiment) -> list[str]:
    patients = len({row.patient for row in experiment.rows})
    seeds = len({row.seed for row in experiment.rows})
    images = len({row.sample for row in experiment.rows})
    counts = [counted(images, "image"), counted(patients, "patient"), counted(seeds, "seed")]
    sentences = [f"The numbers rest on {counts[0]} of {counts[1]} and {counts[2]}."]
    if patients == 1:
        sentences.append("One patient says nothing of others.")
    elif patients < FEW_PATIENTS:
        sentences.append(
            f"{patients} patients are few: others may give another result, and intervals from so few are too "
            "narrow."
        )
    if seeds == 1:
        sentences.append("With one seed the intervals do not hold how much a training varies by chance.")
    elif seeds < FEW_SEEDS:
        sentences.append("Two seeds hardly say how much a training varies by chance.")
    return sentences


def _of_progress(experiment: Experiment) -> list[str]:
    """Say how many of the planned runs are finished, and which of those begun are not."""
    runs = [one.run for one in experiment.runs]
    state = experiment.summary.get("state")
    finished, total = (state.get(name) if isinstance(state, dict) else None for name in ("finished", "total"))
    if not isinstance(finished, int) or not isinstance(total, int):
        return of_state(runs, experiment.unread)
    sentences = of_state([], experiment.unread)
    if finished < total:
        sentences.append(
            f"The experiment is not finished: the numbers are those of {finished} of {counted(total, 'run')}."
        )
    return sentences


__all__ = ["summary_of"]
