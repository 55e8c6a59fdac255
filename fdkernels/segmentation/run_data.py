"""The images of a run: found in their folders, split, and loaded in batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from fdkernels.segmentation.batches import Ranks, evaluation_loader, training_loader
from fdkernels.segmentation.config import FOLDS, TrainingConfig
from fdkernels.segmentation.data import (
    DATASETS,
    FoundSamples,
    SegmentationSample,
    Split,
    default_workers,
    split_folds,
    split_samples,
)
from fdkernels.segmentation.novel_data import check_apart, draw_novel


@dataclass(frozen=True)
class RunData:
    """The images of a run.

    Attributes:
        split: what to train, validate and test on.
        novel: images of a second data set, added to the training set.
        skipped: a sentence on each file that was left out, and on each part of the data that is not there.
        notes: a sentence on each thing besides that a user should know.
    """

    split: Split
    novel: tuple[SegmentationSample, ...] = ()
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self, config: TrainingConfig) -> dict[str, Any]:
        """Give the content of split.json: seed, fold, the parts with relative paths, and skipped files."""
        parts = self.split.as_json(config.data)
        described = {"seed": config.seed, "fold": config.fold, **parts, "skipped": list(self.skipped)}
        if config.novel_data is not None:
            described["novel"] = Split(self.novel, (), ()).as_json(config.novel_data)["train"]
        return described


def find_data(config: TrainingConfig) -> tuple[FoundSamples, FoundSamples | None]:
    """Find the samples of the data set and of the second data set, None without one.

    Raises:
        ValueError: a folder cannot be used, or the two data sets share images.
    """
    base = DATASETS[config.dataset].samples(config.data, config.on_problem, config.rules)
    if config.novel_dataset is None or config.novel_data is None:
        return base, None
    novel = DATASETS[config.novel_dataset].samples(config.novel_data, config.on_problem, config.novel_rules)
    check_apart(base.samples, novel.samples)
    return base, novel


def split_data(
    config: TrainingConfig, base: FoundSamples, novel: FoundSamples | None
) -> dict[int | None, RunData]:
    """Split the samples into the runs that the configuration asks for, by fold (None without folds).

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
    notes = (*base.notes, *(() if novel is None else novel.notes))
    return {fold: RunData(split, added, skipped, notes) for fold, split in splits.items()}


class RunLoaders(LightningDataModule):
    """The loaders of one phase. Lightning asks for them once it knows the rank and the epoch.

    Args:
        config: size, batch size, workers and exchange.
        data: the images.
        seed: with the epoch, decides on the batches and their augmentation.
    """

    def __init__(self, config: TrainingConfig, data: RunData, seed: int) -> None:
        super().__init__()
        self.config = config
        self.data = data
        self.seed = seed

    def train_dataloader(self) -> DataLoader[Any]:
        config, split, novel = self.config, self.data.split, self.data.novel
        images = len(split.train) + len(novel)
        epoch = 0
        if self.trainer is not None:
            # Lightning tells the sampler its epoch only after workers have begun to read the first batches.
            epoch = self.trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        return training_loader(
            split.train,
            novel,
            size=config.size,
            batch_size=config.batch_size,
            workers=default_workers(images) if config.workers is None else config.workers,
            seed=self.seed,
            ranks=self._ranks,
            pairs=config.exchange != "none",
            epoch=epoch,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluation(self.data.split.validation)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation(self.data.split.test)

    def _evaluation(self, samples: tuple[SegmentationSample, ...]) -> DataLoader[Any]:
        config = self.config
        return evaluation_loader(
            samples, size=config.size, batch_size=config.batch_size, workers=0, ranks=self._ranks
        )

    @property
    def _ranks(self) -> Ranks:
        return Ranks() if self.trainer is None else Ranks(self.trainer.global_rank, self.trainer.world_size)


__all__ = ["RunData", "RunLoaders", "find_data", "split_data"]
