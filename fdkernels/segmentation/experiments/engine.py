"""An experiment from its options to its results, resumable at any moment.

The folder of an experiment:

    scores.csv       a row a test image of each finished run: Dice, IoU, L_fd of each layer
    summary.json     settings, versions, seconds a run, how far it is, and once it is finished the results
    runs/ARM/seedS/foldF/
        ...          a run as `fdkernels train` writes it
        scores.json  its scores, written last: a run with it is finished
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fdkernels.segmentation.config import FOLDS, TrainingConfig, check_processes
from fdkernels.segmentation.data import cores, default_workers
from fdkernels.segmentation.experiments.display import Board
from fdkernels.segmentation.experiments.folder import check_folder, taken, write_scores, write_summary
from fdkernels.segmentation.experiments.plan import Arm, Experiment, PlannedRun, Study, run_key
from fdkernels.segmentation.experiments.registry import EXPERIMENTS
from fdkernels.segmentation.experiments.reuse import with_trained
from fdkernels.segmentation.experiments.running import read_scores
from fdkernels.segmentation.experiments.workers import carry_out_all
from fdkernels.segmentation.fields import FieldError, one_of
from fdkernels.segmentation.run_data import RunData, find_data, split_data
from fdkernels.segmentation.runfiles import remove_unfinished
from fdkernels.segmentation.saved_runs import check_split, versions
from fdkernels.segmentation.signals import ending_on_signals
from fdkernels.segmentation.terminal import terminal
from fdkernels.segmentation.trainer import check_possible

# More processes than that fill the memory rather than the cores, with networks of the published width.
_MOST_JOBS = 4
_MOST_SEEDS = 1000


def run_experiment(
    name: str,
    config: TrainingConfig,
    *,
    seeds: int = 3,
    folds: int = FOLDS,
    jobs: int | None = 1,
    resume: bool = False,
    reuse: Sequence[str | Path] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Carry out an experiment; return the content of summary.json.

    Each arm is trained for each seed (`config.seed` and those after it, which also decide on the split) and
    fold, and goes on from the first phase of its seed and fold, which is trained once. The numbers do not
    depend on `jobs`, nor on how often the experiment was broken off.

    Args:
        name: of `EXPERIMENTS`.
        config: the options of a run; `output` is the folder of the experiment.
        seeds: how many.
        folds: how many of the five of a cross-validation.
        jobs: how many runs side by side, each in a process of its own where there are several; None for one
            a GPU, or on CPUs one a core up to 4.
        resume: go on with the experiment that the folder holds.
        reuse: folders of other experiments. What they have trained with the same options, images and versions
            from the same first phase is taken from there; the summary names it.
        progress: show how far it is.

    Raises:
        ValueError: an option is out of its range or of no use in the experiment, the data cannot be used, or
            the folder holds something else.
        RuntimeError: a run has failed.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment must be {one_of(EXPERIMENTS)}, got {name}")
    experiment, output = EXPERIMENTS[name], Path(config.output)
    config = _checked(experiment, config, seeds, folds)
    jobs = _jobs(config) if jobs is None else jobs
    if jobs < 1:
        raise FieldError("jobs", f"must be at least 1, got {jobs}")
    check_processes("jobs", jobs)
    study = Study(output, config, range(config.seed, config.seed + seeds), range(1, folds + 1))
    described = {
        "experiment": name,
        "settings": config.as_json(),
        "seeds": list(study.seeds),
        "folds": list(study.folds),
    }
    with ending_on_signals():
        # Before the data are read, which may take minutes; and again once nobody else can write.
        check_folder(output, described, resume)
        notes: list[str] = []
        if experiment.trains:
            study, notes = _planned(experiment, study, jobs)
            study = dataclasses.replace(study, runs=with_trained(study.runs, [Path(one) for one in reuse]))
        with taken(output):
            check_folder(output, described, resume)
            return _carry_out(experiment, study, described, notes, jobs, progress)


def _checked(experiment: Experiment, config: TrainingConfig, seeds: int, folds: int) -> TrainingConfig:
    """Refuse options that an experiment cannot be made of; fill in what the data set's preset gives."""
    for field, value, most in (("seeds", seeds, _MOST_SEEDS), ("folds", folds, FOLDS)):
        if type(value) is not int or not 1 <= value <= most:
            raise FieldError(field, f"must be an integer from 1 to {most}, got {value}")
    if config.fold is not None:
        raise FieldError("fold", f"is set for each run; choose by folds, got {config.fold}")
    if not experiment.trains:
        return config.resolved()
    given = config.as_json()
    for field in ("epochs_warm", "epochs_active"):
        if given[field] < 1:
            raise FieldError(
                field, f"must be at least 1 in an experiment, which trains both phases, got {given[field]}"
            )
    for field, only in (("devices", "1"), ("num_nodes", 1)):
        if given[field] != only:
            raise FieldError(
                field, f"must be {only} in an experiment, which spreads whole runs, got {given[field]}"
            )
    default = {field.name: field.default for field in dataclasses.fields(TrainingConfig)}
    for field in experiment.sets:
        if given[field] != default[field]:
            raise FieldError(
                field,
                f"is set for each arm by experiment {experiment.name}; leave it out, got {given[field]}",
            )
    if experiment.needs_second_data and config.novel_dataset is None:
        raise ValueError(
            f"experiment {experiment.name} adds images of a second data set: novel_dataset and novel_data "
            "must name it, got neither"
        )
    return config.resolved()


def _jobs(config: TrainingConfig) -> int:
    """Choose how many runs to carry out side by side."""
    on_gpu = config.accelerator not in ("cpu", "mps") and torch.cuda.is_available()
    return torch.cuda.device_count() if on_gpu else min(cores(), _MOST_JOBS)


def _planned(experiment: Experiment, study: Study, jobs: int) -> tuple[Study, list[str]]:
    """Plan all runs of a study, and say what a user should know before they start."""
    config = study.config
    check_possible(config)
    base, novel = find_data(config)
    if experiment.least_samples > len(base.samples):
        raise ValueError(
            f"experiment {experiment.name} needs at least {experiment.least_samples} images, got "
            f"{len(base.samples)} in {config.data}"
        )
    arms = experiment.arms(config, 0 if novel is None else len(novel.samples))
    runs: list[PlannedRun] = []
    splits: dict[tuple[int, Any], dict[int | None, RunData]] = {}
    for seed in study.seeds:
        for fold in study.folds:
            for arm in arms:
                own = dataclasses.replace(
                    config,
                    **arm.config(config),
                    seed=seed,
                    fold=fold,
                    output=str(study.output / "runs" / run_key(arm.name, seed, fold)),
                )
                place = (seed, (own.novel_dataset, own.novel_images))
                if place not in splits:
                    used = None if own.novel_dataset is None else novel
                    splits[place] = split_data(dataclasses.replace(own, fold="all"), base, used)
                data = splits[place][fold]
                own = dataclasses.replace(own, workers=_workers(own, data, jobs))
                runs.append(PlannedRun(arm, seed, fold, own, data, _source(arm, seed, fold)))
    check_arms(config, arms)
    data = next(iter(splits.values()))[1]
    notes = [*(f"Left out: {each}" for each in data.skipped), *data.notes, *_shortages(experiment, runs)]
    return dataclasses.replace(study, runs=runs), notes


def check_arms(config: TrainingConfig, arms: Sequence[Arm]) -> None:
    """Refuse an arm that the network, the loss or the machine would refuse once it is trained."""
    for arm in arms:
        try:
            check_possible(dataclasses.replace(config, **arm.config(config)))
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"arm {arm.name} is not possible: {error}") from error


def _source(arm: Arm, seed: int, fold: int) -> str | None:
    return None if arm.goes_on_from is None else run_key(arm.goes_on_from, seed, fold)


def _workers(config: TrainingConfig, data: RunData, jobs: int) -> int:
    """Choose the processes that read images; runs side by side share the cores."""
    if config.workers is not None:
        return config.workers
    wanted = default_workers(len(data.split.train) + len(data.novel))
    return wanted if jobs == 1 else min(wanted, max(0, cores() // jobs - 1))


def _shortages(experiment: Experiment, runs: Sequence[PlannedRun]) -> list[str]:
    """Say what the results will lack, and refuse an experiment that would have none.

    Raises:
        ValueError: there are fewer test images than the results need.
    """
    tested = {
        sample.image: sample.patient for run in runs if run.arm.scored for sample in run.data.split.test
    }
    if len(tested) < experiment.least_samples:
        raise ValueError(
            f"experiment {experiment.name} needs at least {experiment.least_samples} test images, got "
            f"{len(tested)} in the folds that are asked for; raise folds"
        )
    if len(set(tested.values())) < 2:
        return ["All test images are of one patient, so that there will be no intervals; raise --folds."]
    return []


def _carry_out(
    experiment: Experiment,
    study: Study,
    described: Mapping[str, Any],
    notes: Sequence[str],
    jobs: int,
    progress: bool,
) -> dict[str, Any]:
    """Carry out what is left of an experiment, and keep its tables up to date."""
    if progress:
        for note in notes:
            terminal(stderr=True).print(note, soft_wrap=True)
    summary: dict[str, Any] = {
        **described,
        "notes": list(notes),
        "arms": [arm.name for arm in study.arms()],
        "arm_settings": {run.arm.name: dict(run.arm.changes) for run in study.runs},
        "versions": {**versions(), "scipy": metadata.version("scipy")},
    }
    remove_unfinished(study.output)
    finished = {run.key for run in study.runs if run.marker.exists()}
    for run in study.runs:
        if run.key in finished:
            check_split(run.config, run.data.as_json(run.config))
    scores = {run.key: read_scores(run) for run in study.runs if run.key in finished}

    def collect(results: Mapping[str, Any] | None = None) -> tuple[Study, dict[str, Any]]:
        """Write both tables from the finished runs; return the study with their rows, and the summary."""
        done = [run for run in study.runs if run.key in scores]
        rows = [row for run in done for row in scores[run.key].rows]
        write_scores(study.output / "scores.csv", experiment.name, rows)
        content = {
            **summary,
            "state": {"finished": len(done), "total": len(study.runs)},
            "seconds": {run.key: scores[run.key].seconds for run in done},
            "failed": {run.key: scores[run.key].failed for run in done if scores[run.key].failed},
            "reused": {run.key: scores[run.key].trained_in for run in done if scores[run.key].trained_in},
            "results": dict(results or {}),
        }
        write_summary(study.output, content)
        measured = {run.key: scores[run.key].measured for run in done}
        left = [run for run in done if not scores[run.key].failed]
        return dataclasses.replace(study, runs=left, rows=rows, measured=measured), content

    def note_finished(run: PlannedRun) -> None:
        scores[run.key] = read_scores(run)
        board.finished(run)
        if scores[run.key].failed:
            board.console.print(f"Left out: run {run.key}, since {scores[run.key].failed}", soft_wrap=True)
        collect()

    collect()
    with Board(experiment.name, study.runs, finished, shown=progress) as board:
        carry_out_all(experiment, study.runs, jobs=jobs, trained=board.trained, finished=note_finished)
    whole, _ = collect()
    return collect(experiment.results(whole))[1]


__all__ = ["check_arms", "run_experiment"]
