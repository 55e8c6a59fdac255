"""The paper's training protocol: data found and split, then one run or one for each fold.

References:
    Sections 3.1, 4 and A.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback
from rich.console import Console

from fdkernels.segmentation.config import FOLDS, TrainingConfig
from fdkernels.segmentation.data import DATASETS, FoundSamples, Split, split_folds, split_samples
from fdkernels.segmentation.folds import run_folds
from fdkernels.segmentation.phase import RunData
from fdkernels.segmentation.pooling import check_apart, draw_novel
from fdkernels.segmentation.run import run_phases
from fdkernels.segmentation.runfiles import is_first_process


def find_data(config: TrainingConfig) -> tuple[FoundSamples, FoundSamples | None]:
    """What the folders of the data sets hold, the second of them if there is one.

    Raises:
        ValueError: a folder cannot be used, or the two hold the same images.
    """
    base = DATASETS[config.dataset].find(config.data, on_problem=config.on_problem)
    if config.novel_dataset is None or config.novel_data is None:
        return base, None
    novel = DATASETS[config.novel_dataset].find(config.novel_data, on_problem=config.on_problem)
    check_apart(base.samples, novel.samples)
    return base, novel


def split_data(
    config: TrainingConfig, base: FoundSamples, novel: FoundSamples | None
) -> dict[int | None, RunData]:
    """The images of each run that the configuration asks for, by fold (None without folds).

    Raises:
        ValueError: there are too few patients, or fewer novel images than asked for.
    """
    if config.fold is None:
        splits: dict[int | None, Split] = {None: split_samples(base.samples, seed=config.seed)}
    else:
        folds = enumerate(split_folds(base.samples, FOLDS, seed=config.seed), start=1)
        splits = {fold: split for fold, split in folds if config.fold in (fold, "all")}
    added = () if novel is None else draw_novel(novel, config.novel_images, config.seed)
    skipped = (*base.skipped, *(() if novel is None else novel.skipped))
    return {fold: RunData(split, added, skipped) for fold, split in splits.items()}


def train(
    config: TrainingConfig,
    *,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains on a named data set; returns what metrics.json holds, or folds.json with fold "all".

    Args:
        config: the run; size and learning rate come from the data set's preset where None.
        callbacks, resume, progress: as in `run_phases`.

    Raises:
        ValueError: the data cannot be used or split, and as `run_phases`.
        RuntimeError: as `run_phases`.
    """
    config = config.resolved()
    runs = split_data(config, *find_data(config))
    if progress and is_first_process():
        for sentence in next(iter(runs.values())).skipped:
            Console(stderr=True).print(f"Left out: {sentence}", highlight=False, markup=False)
    if config.fold == "all":
        return run_folds(config, runs, callbacks=callbacks, resume=resume, progress=progress)
    (data,) = runs.values()
    return run_phases(config, data, callbacks=callbacks, resume=resume, progress=progress)


__all__ = ["find_data", "split_data", "train"]
