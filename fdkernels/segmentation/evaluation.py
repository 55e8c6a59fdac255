"""Evaluate a run: every sample's scores as a table file, their summary, prediction masks.

`evaluate` writes one folder. Tables are replaced; masks and overlays of earlier calls stay beside the new:

    samples.csv      one row a sample and phase: Dice to precision, foreground share, L_fd by layer
    summary.json     worst-off, best-off and all samples; folds; Dice against L_fd
    baseline.csv     the same rows of the run that is compared against
    masks/PHASE/     predictions as PNG, 0 or 255, at the size of the image
    overlays/PHASE/  predictions over the image, errors in red
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

import fdkernels
from fdkernels.segmentation.config import PHASES, TrainingConfig, check_processes
from fdkernels.segmentation.data import DATASETS, ReadingRules
from fdkernels.segmentation.data.reading import load_pair
from fdkernels.segmentation.fields import check_field
from fdkernels.segmentation.prediction_masks import (
    keep_pictures,
    png_names,
    predicted_mask,
    write_errors,
    write_mask,
)
from fdkernels.segmentation.runfiles import read_json, replacing_folder, write_json
from fdkernels.segmentation.sample_table import write_samples
from fdkernels.segmentation.saved_runs import SavedRun, find_runs, load_network
from fdkernels.segmentation.scoring import Candidate, SampleScores, score
from fdkernels.segmentation.summary import of_phase
from fdkernels.segmentation.terminal import terminal

PICTURES = ("masks", "overlays")
CONTENTS = ("samples.csv", "summary.json", "baseline.csv", *PICTURES)


@dataclass(frozen=True)
class EvaluationOptions:
    """How to evaluate a run or weights.

    Attributes:
        output: folder to write; None writes nothing.
        masks: write prediction masks.
        overlays: write predictions over their images.
        augmented: also score the seven other symmetries of each image, as further rows.
        worst_off: number of worst-off samples; None takes the share of Table 1 (`worst_off_count`).
        batch_size: images a step; the numbers do not depend on it.
        workers: processes that read images; None chooses by their number.
        device: a torch device, or "auto" for the GPU if there is one.
        progress: show a live line.
    """

    output: Path | None = None
    masks: bool = False
    overlays: bool = False
    augmented: bool = False
    worst_off: int | None = None
    batch_size: int = 4
    workers: int | None = None
    device: str = "auto"
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "workers"):
            check_field(TrainingConfig, name, getattr(self, name))
        check_processes("workers", self.workers or 0)
        if self.output is None and (self.masks or self.overlays):
            raise ValueError("output must name a folder where masks or overlays are asked for, got None")

    def torch_device(self) -> torch.device:
        """Choose the device.

        Raises:
            ValueError: torch knows no such device, or it is not available.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
            reason = str(error).splitlines()[0]
            raise ValueError(f"device {self.device} cannot be used: {reason}") from error
        return device


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        samples: one entry a sample, phase (and symmetry).
        baseline: the same of the baseline run; empty without one.
        summary: the content of summary.json.
    """

    samples: tuple[SampleScores, ...]
    baseline: tuple[SampleScores, ...]
    summary: dict[str, Any]


def evaluate(
    run: str | Path,
    *,
    phases: Sequence[str] | None = None,
    part: str = "test",
    data: str | Path | None = None,
    against: str | Path | None = None,
    options: EvaluationOptions | None = None,
) -> Evaluation:
    """Score the best networks of a run on a part of its data, image by image.

    A folder that holds fold-1, fold-2 and so on is evaluated as a whole: each fold on its own part,
    their samples together in one table, and means over the folds beside it.

    Args:
        run: the run's folder.
        phases: "warm", "active" or both; None takes the finished ones.
        part: "train", "validation" or "test".
        data: folder of the data, if it has moved.
        against: another run on the same split, the baseline. The worst-off and best-off samples
            are then chosen by the mean Dice of both runs, so that both are compared on the same
            samples and neither gains from the choice; the differences are run minus baseline, as in
            Table 2, with their 95 % intervals. L_fd is in the run's convention for both.
        options: how to evaluate.

    Raises:
        ValueError: there is no run, it has not finished a given phase, its data has moved, files are
            missing or cannot be used, the two runs are not split alike, a network puts out NaN, or the
            output holds masks of another run.
    """
    options = options or EvaluationOptions()
    runs = find_runs(run)
    phases = _phases(run, runs, phases)
    candidates = _candidates(runs, phases, part, data)
    others = [] if against is None else _candidates(find_runs(against), phases, part, data)
    if against is not None:
        _check_alike(run, candidates, against, others)
        convention = candidates[0].convention
        others = [dataclasses.replace(one, convention=convention) for one in others]
    config = runs[0].config
    described = {
        "run": str(run),
        "baseline": None if against is None else str(against),
        "model": config.model,
        "fd_loss": config.fd_loss,
        "part": part,
    }
    root = runs[0].data(data)
    return _evaluate(candidates, others, described, config.dataset, root, options)


def evaluate_weights(
    weights: str | Path,
    *,
    model: str,
    dataset: str,
    data: str | Path,
    base_channels: int | None = None,
    size: int | None = None,
    convention: str = "paper",
    on_problem: str = "refuse",
    rules: ReadingRules | None = None,
    options: EvaluationOptions | None = None,
) -> Evaluation:
    """Score weights that belong to no run on every image of a data set.

    Args:
        weights: a safetensors file.
        model, base_channels: as `fdkernels.models.create` takes them.
        dataset: name of the data set, whose preset gives `size` where it is None.
        data: its folder.
        size: side in pixels that images are resized to.
        convention: the convention of L_fd.
        on_problem: what to do about files that cannot be used: "refuse", or "skip", which lists them
            under "skipped" in the summary.
        rules: how to read files that do not say it themselves.
        options: how to evaluate.

    Raises:
        ValueError: the weights are missing, not safetensors or do not fit; or the data set or its
            files cannot be used.
    """
    options = options or EvaluationOptions()
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset}")
    given = {"size": size, "base_channels": base_channels, "convention": convention, "on_problem": on_problem}
    for name, value in given.items():
        check_field(TrainingConfig, name, value)
    load_network(weights, model, base_channels)  # before the images are read, which may take long
    found = DATASETS[dataset].samples(data, on_problem, rules)
    root = Path(data)
    candidate = Candidate(
        load=lambda: load_network(weights, model, base_channels),
        samples=found.samples,
        names=[_relative(sample.image, root) for sample in found.samples],
        size=DATASETS[dataset].size if size is None else size,
        convention=convention,
        phase="weights",
    )
    described = {
        "weights": str(weights),
        "baseline": None,
        "model": model,
        "part": "all",
        "skipped": list(found.skipped),
    }
    return _evaluate([candidate], [], described, dataset, root, options)


def _relative(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _phases(run: str | Path, runs: Sequence[SavedRun], asked: Sequence[str] | None) -> list[str]:
    """Choose the phases to evaluate, in their order: those asked for, or those that a fold has finished."""
    if asked is not None:
        if unknown := [phase for phase in asked if phase not in PHASES]:
            raise ValueError(f"phases must be of {', '.join(PHASES)}, got {unknown[0]}")
        return [phase for phase in PHASES if phase in asked]
    finished = [phase for phase in PHASES if any(phase in one.finished_phases() for one in runs)]
    if not finished:
        raise ValueError(
            f"run {run} has not finished a phase yet: there is no warm/result.json and no active/result.json"
        )
    return finished


def _candidates(
    runs: Sequence[SavedRun], phases: Sequence[str], part: str, data: str | Path | None
) -> list[Candidate]:
    """List the networks of each phase and fold; each is loaded once, so that errors show before the work."""
    found = []
    for phase in phases:
        for one in runs:
            one.load_network(phase)
            samples, names = one.part(part, data)
            found.append(
                Candidate(
                    load=_loader(one, phase),
                    samples=samples,
                    names=names,
                    size=one.config.size,
                    convention=one.config.convention,
                    phase=phase,
                    fold=one.fold,
                )
            )
    return found


def _loader(run: SavedRun, phase: str) -> Callable[[], Any]:
    return lambda: run.load_network(phase)


def _check_alike(
    run: str | Path, candidates: Sequence[Candidate], against: str | Path, others: Sequence[Candidate]
) -> None:
    """Refuse two runs that were not split alike, or see their images at other sizes."""

    def images(part: Sequence[Candidate]) -> set[tuple[int, str]]:
        return {(one.fold or 0, name) for one in part for name in one.names}

    ours, theirs = images(candidates), images(others)
    if ours != theirs:
        _, name = min(ours ^ theirs)
        raise ValueError(
            f"against must be a run on the same split as {run}, got {against}, where "
            f"{len(ours ^ theirs)} of the images are not in the same part, {name} among them"
        )
    size, other = candidates[0].size, others[0].size
    if size != other:
        raise ValueError(f"against must be a run at the size of {run}, {size}, got {against}, at {other}")


def _evaluate(
    candidates: Sequence[Candidate],
    others: Sequence[Candidate],
    described: dict[str, Any],
    dataset: str,
    data: Path,
    options: EvaluationOptions,
) -> Evaluation:
    device = options.torch_device()
    folder: AbstractContextManager[Path | None] = nullcontext()
    if options.output is not None:
        _check_pictures(options.output, described)
        folder = replacing_folder(options.output, CONTENTS)
    with folder as output, Progress(disable=not _is_shown(options), transient=True) as progress:
        total = sum(len(one.samples) for one in (*candidates, *others))
        task = progress.add_task("evaluating", total=total)

        def rows(part: Sequence[Candidate], predictions: Path | None) -> tuple[SampleScores, ...]:
            return tuple(
                row
                for one in part
                for row in score(
                    one,
                    device=device,
                    batch_size=options.batch_size,
                    workers=options.workers,
                    augmented=options.augmented,
                    keep=None if predictions is None else _prediction_writer(one, predictions, options),
                    advance=lambda images: progress.advance(task, images),
                )
            )

        kept = output if options.masks or options.overlays else None
        samples, baseline = rows(candidates, kept), rows(others, None)
        evaluation = Evaluation(
            samples,
            baseline,
            {
                "fdkernels": fdkernels.__version__,
                **described,
                "dataset": dataset,
                "data": str(data),
                "size": candidates[0].size,
                "convention": candidates[0].convention,
                "augmented": options.augmented,
                "phases": {
                    phase: of_phase(
                        [row for row in samples if row.phase == phase],
                        [row for row in baseline if row.phase == phase],
                        DATASETS.get(dataset),
                        options.worst_off,
                    )
                    for phase in dict.fromkeys(one.phase for one in candidates)
                },
            },
        )
        if output is not None:
            write_samples(output / "samples.csv", samples)
            if baseline:
                write_samples(output / "baseline.csv", baseline)
            write_json(output / "summary.json", evaluation.summary)
            if options.output is not None:
                keep_pictures(options.output, output)
    return evaluation


def _check_pictures(output: Path, described: Mapping[str, Any]) -> None:
    """Refuse a folder with masks or overlays of another run or other weights, which would stay there."""
    pictures = [name for name in PICTURES if (output / name).exists()]
    if not pictures or not (output / "summary.json").exists():
        return
    before = read_json(output / "summary.json")
    theirs, ours = (str(one.get("run") or one.get("weights")) for one in (before, described))
    # A run that has moved has taken the evaluation inside it along.
    if not (Path(theirs).resolve() == Path(ours).resolve() or _is_inside(output, Path(ours))):
        raise ValueError(
            f"output {output} holds {pictures[0]} of {theirs}, which would stay beside those of {ours}; name "
            "another folder, or move that one away"
        )


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _is_shown(options: EvaluationOptions) -> bool:
    return options.progress and terminal().is_terminal


def _prediction_writer(
    candidate: Candidate, output: Path, options: EvaluationOptions
) -> Callable[[int, Tensor], None]:
    """Make the function that writes the prediction on sample `index`, given its logits [1, H, W]."""
    names = png_names(candidate.names)
    place = Path(candidate.phase if candidate.fold is None else f"{candidate.phase}/fold-{candidate.fold}")

    def write(index: int, logits: Tensor) -> None:
        image, truth = load_pair(candidate.samples[index])
        predicted = predicted_mask(logits, image.height, image.width)
        if options.masks:
            write_mask(output / "masks" / place / names[index], predicted)
        if options.overlays:
            pixels, foreground = np.asarray(image) / 255, np.asarray(truth) > 0
            write_errors(output / "overlays" / place / names[index], pixels, predicted, foreground)

    return write


__all__ = ["Evaluation", "EvaluationOptions", "evaluate", "evaluate_weights", "write_samples"]
