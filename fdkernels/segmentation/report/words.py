"""What the numbers show and what they do not, in plain words, by rules."""

from __future__ import annotations

from collections.abc import Sequence

from fdkernels.segmentation.report.page import number
from fdkernels.segmentation.report.runs import ReportedRun, RunGroup

# Below these the report says that there are few.
FEW_PATIENTS = 20
FEW_SEEDS = 3
# Validation Dice that was still rising has its best epoch in this last share of the phase.
LATE = 0.05


def counted(count: int, noun: str) -> str:
    """Write a number of things: 1 seed, 3 seeds."""
    plural = noun if count == 1 else f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count} {plural}"


def listed(words: Sequence[str], most: int = 4) -> str:
    """Join words to a list; those after `most` are counted."""
    if len(words) > most + 1:
        return f"{', '.join(words[:most])} and {len(words) - most} more"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def of_state(runs: Sequence[ReportedRun], left_out: int = 0) -> list[str]:
    """Say which runs are not finished or could not be read."""
    unfinished = [run.title for run in runs if not run.finished]
    total = len(runs) + left_out
    sentences = []
    if unfinished:
        are = "is not finished" if len(unfinished) == 1 else "are not finished"
        sentences.append(
            f"{len(unfinished)} of {counted(total, 'run')} {are} ({listed(unfinished)}), so that this page "
            "is not the last word on them."
        )
    if left_out:
        sentences.append(f"{counted(left_out, 'run')} could not be read and {_is_are(left_out)} left out.")
    return sentences


def _is_are(count: int) -> str:
    return "is" if count == 1 else "are"


def of_alpha(runs: Sequence[ReportedRun]) -> list[str]:
    """Say where alpha is stuck at a bound, where the loss does nothing or no longer grows."""
    with_loss = [run for run in runs if run.final_alpha()]
    all_zero, at_most, some_zero = [], [], []
    for run in with_loss:
        final, stuck = run.final_alpha(), run.stuck_alpha()
        zero = [layer for layer, bound in stuck.items() if bound == 0]
        if len(zero) == len(final):
            all_zero.append(run.title)
        elif zero:
            some_zero.append(f"{run.title} ({listed(zero)})")
        if len(stuck) - len(zero) == len(final):
            at_most.append(run.title)
    sentences = []
    if all_zero:
        sentences.append(
            f"Every α is 0 at the end of {listed(all_zero)}: there the loss did nothing, and these runs say "
            "nothing of its effect."
        )
    if some_zero:
        sentences.append(
            f"α is 0 at the end in some layers, where the loss no longer acts: {listed(some_zero)}."
        )
    if at_most:
        sentences.append(
            f"Every α has reached its upper bound in {listed(at_most)}: the bound and not the training has "
            "set how much the loss weighs."
        )
    return sentences


def still_rising(run: ReportedRun) -> bool:
    """Tell whether the best epoch of the last finished phase is at its very end."""
    if run.last is None:
        return False
    result = run.results[run.last]
    return bool(result["epochs"] - result["best_epoch"] < max(1, LATE * result["epochs"]))


def of_training(runs: Sequence[ReportedRun]) -> list[str]:
    """Say which runs had not stopped improving."""
    rising = [run.title for run in runs if still_rising(run)]
    if not rising:
        return []
    verb = "was" if len(rising) == 1 else "were"
    sentence = (
        f"The best epoch is among the last of the phase in {listed(rising)}, which {verb} perhaps still "
        "improving; a longer training may give other numbers."
    )
    return [sentence]


def of_groups(groups: Sequence[RunGroup]) -> str:
    """Sum up runs of `fdkernels train`."""
    runs = [run for group in groups for run in group.runs]
    left_out = sum(len(group.problems) for group in groups)
    sentences = []
    if len(groups) == 1:
        sentences += _of_one(groups[0])
    else:
        done = [run for run in runs if run.last is not None]
        sentences.append(
            f"This page shows {counted(len(groups), 'training')} of {counted(len(runs), 'run')} in all; "
            f"{counted(len(done), 'run')} of them have test scores, which the first table lists."
        )
        sentences.append(
            "It lists the trainings one by one and tests no difference between them: fdkernels evaluate "
            "--against compares two on the same images, and fdkernels experiment ablation trains with and "
            "without the loss."
        )
    sentences += [*of_state(runs, left_out), *of_alpha(runs), *of_training(runs)]
    return " ".join(sentences)


def _of_one(group: RunGroup) -> list[str]:
    tested = [run for run in group.runs if run.last is not None]
    if not tested:
        return [f"No phase of {group.title} is finished, so that there are no test scores yet."]
    sentences = []
    if len(tested) == 1:
        (run,) = tested
        test = run.results[str(run.last)]["test"]
        sentences.append(
            f"The best epoch of the last finished phase of {run.title} has a Dice of {number(test['dice'])} "
            f"and an IoU of {number(test['iou'])} in the mean over "
            f"{counted(int(test['images']), 'test image')}."
        )
        fewest = "One run on one split does not say"
    else:
        scores = [run.results[str(run.last)]["test"]["dice"] for run in tested]
        sentences.append(
            f"Over {counted(len(tested), 'fold')} test Dice is {number(sum(scores) / len(scores))} in the "
            f"mean, from {number(min(scores))} to {number(max(scores))}."
        )
        fewest = "Folds of one seed do not say"
    config = tested[0].saved.config
    sentences.append(f"{fewest} how much these numbers vary with the seed.")
    if config.fd_loss and not config.epochs("warm"):
        sentences.append("Nor do they say what the loss does, for which runs without it are needed.")
    elif config.fd_loss:
        sentences.append(
            "Nor do they say what the loss does: phase two also trains longer than phase one, and only runs "
            "without the loss and with equal steps (fdkernels experiment ablation) tell the two apart."
        )
    else:
        sentences.append("The loss was not used.")
    return sentences


__all__ = [
    "FEW_PATIENTS",
    "FEW_SEEDS",
    "counted",
    "listed",
    "of_alpha",
    "of_groups",
    "of_state",
    "of_training",
    "still_rising",
]
