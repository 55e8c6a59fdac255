"""The configuration of a training run; config.json beside the run holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fdkernels import models
from fdkernels.alpha import ALPHA_RULES
from fdkernels.backend import BACKENDS
from fdkernels.conventions import CONVENTIONS, EXCHANGES
from fdkernels.segmentation.data import DATASETS, ReadingRules
from fdkernels.segmentation.data.foreground import parse_mask_values

PHASES = ("warm", "active")
FOLDS = 5
ON_PROBLEM = ("refuse", "skip")

# Keys of config.json beside those of the configuration, for whoever reads the run later.
_RECORDED = frozenset({"versions"})


def one_of(names: Iterable[str]) -> str:
    """List names in a sentence: "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _option(text: str, default: Any = dataclasses.MISSING, *, shown: str | None = None) -> Any:
    """Declare a field with its meaning, which is also the help of its option on the command line.

    Args:
        text: the meaning, one clause.
        default: of the field; without one it must be given.
        shown: what the help shows in place of the default None.
    """
    return dataclasses.field(default=default, metadata={"help": text, "shown": shown})


@dataclass(frozen=True)
class TrainingConfig:
    """Every choice of a run; the defaults are the paper's where it states one.

    Each field is declared with its meaning. Those of a network, of the loss and of Lightning's Trainer
    (`accelerator`, `devices`, `num_nodes`, `strategy`, `precision`) take what `fdkernels.models.create`,
    `fdkernels.FeatureDiscrepancyLoss` and Lightning take.

    Raises:
        ValueError: a number is out of its range, a name is unknown, or fields do not go together.
    """

    dataset: str = _option(f"Data set: {one_of(DATASETS)}, which is your own images/ and masks/.")
    data: str = _option("Folder of the data set.")
    output: str = _option("Folder of the run, such as runs/first.")
    model: str = _option(f"Network: {one_of(models.names())}.", "unet")
    base_channels: int | None = _option("Width of the first level.", None, shown="as published")
    size: int | None = _option(
        "Side in pixels that images are resized to.", None, shown="that of the data set"
    )
    batch_size: int = _option("Images a batch and device.", 4)
    accumulate: int = _option("Batches whose gradients make one step of the optimizer.", 1)
    epochs_warm: int = _option("Epochs of phase one, every alpha at 0.", 100)
    epochs_active: int = _option("Epochs of phase two, the loss acting.", 75)
    lr: float | None = _option("Adam's learning rate for the network.", None, shown="that of the data set")
    alpha_lr: float = _option("Adam's learning rate for alpha.", 1e-3)
    alpha_target: float | None = _option(
        "Layer loss at which ascent stops raising alpha.", None, shown="set by the first steps of phase two"
    )
    alpha_rule: str = _option(f"How alpha moves: {one_of(ALPHA_RULES)}.", "ascent")
    convention: str = _option(f"Reading of the paper: {one_of(CONVENTIONS)}.", "paper")
    exchange: str = _option(
        f"Cross-sample term: {one_of(EXCHANGES)}; pooled needs a second data set.", "none"
    )
    fd_loss: bool = _option("Train with the loss, or the same two phases without.", True)
    backend: str = _option(f"Backend of the loss: {one_of(('auto', *BACKENDS))}.", "auto")
    fold: int | str | None = _option(
        f"1 to {FOLDS}: train on that fold of a cross-validation; all: on each, one after the other.",
        None,
        shown="one split 70-20-10",
    )
    on_problem: str = _option("Files that cannot be used: refuse the run, or skip them.", "refuse")
    mask_values: str | None = _option(
        "Stored values of masks that are foreground, such as 1, 1,2 or 128-255; the others are background.",
        None,
        shown="what is not 0, or above half of white; labels are refused",
    )
    image_bits: int | None = _option(
        "How many bits 16-bit images use, 9 to 16.", None, shown="what the files say"
    )
    novel_dataset: str | None = _option(
        "Second data set; its images are added to the training set, not to validation and test.", None
    )
    novel_data: str | None = _option("Folder of the second data set.", None)
    novel_mask_values: str | None = _option(
        "mask_values of the second data set.", None, shown="as for the first without mask_values"
    )
    novel_images: int | None = _option("Number of its images, drawn by the seed.", None, shown="all")
    seed: int = _option("Seed of split, weights, order and augmentation.", 0)
    workers: int | None = _option("Processes that read images.", None, shown="by the number of images")
    accelerator: str = _option("cpu, cuda, mps or auto.", "auto")
    devices: str = _option("How many devices, their numbers (0,2), or auto.", "1")
    num_nodes: int = _option("Hosts that train together.", 1)
    strategy: str = _option("As Lightning names it; auto is ddp on several devices.", "auto")
    sync_batchnorm: bool | None = _option(
        "Batch norm over the samples of all devices, so that they equal one with the whole batch.",
        None,
        shown="on GPUs",
    )
    precision: str = _option("32-true, bf16-mixed or 16-mixed.", "32-true")
    channels_last: bool = _option("Keep images and features in the channels_last format.", False)
    compile: bool = _option("Run the network through torch.compile.", False)
    tensorboard: bool = _option("Write logs for TensorBoard beside the CSV files.", True)
    limit_batches: int | None = _option(
        "At most so many batches an epoch, of each part, to try things out.", None, shown="all"
    )

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.epochs_warm + self.epochs_active == 0:
            raise ValueError("epochs_warm and epochs_active must not both be 0")
        if self.model not in models.names():
            raise ValueError(f"model must be one of {', '.join(models.names())}, got {self.model}")
        if self.fold not in (None, "all", *range(1, FOLDS + 1)):
            raise ValueError(f"fold must be 1 to {FOLDS}, or all, got {self.fold}")
        if self.on_problem not in ON_PROBLEM:
            raise ValueError(f'on_problem must be "refuse" or "skip", got "{self.on_problem}"')
        self._check_exchange()
        if self.novel_mask_values is not None:
            parse_mask_values(self.novel_mask_values, "novel_mask_values")
        _ = self.rules  # raises ValueError where one is out of its range

    def _check_numbers(self) -> None:
        for name in (
            *("batch_size", "size", "base_channels", "limit_batches"),
            *("novel_images", "num_nodes", "accumulate"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("epochs_warm", "epochs_active", "seed", "workers"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        for name in ("lr", "alpha_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def _check_exchange(self) -> None:
        if self.exchange not in EXCHANGES:
            names = one_of(f'"{name}"' for name in EXCHANGES)
            raise ValueError(f'exchange must be {names}, got "{self.exchange}"')
        if (self.novel_dataset is None) != (self.novel_data is None):
            raise ValueError(
                "novel_dataset and novel_data must be given together, the name of the second data set "
                f"and its folder, got {self.novel_dataset} and {self.novel_data}"
            )
        if self.novel_images is not None and self.novel_dataset is None:
            raise ValueError(
                f"novel_images counts images of novel_dataset, which must be given with it, got "
                f"{self.novel_images} and no novel_dataset"
            )
        if self.novel_mask_values is not None and self.novel_dataset is None:
            raise ValueError(
                "novel_mask_values names values of novel_dataset, which must be given with it, got "
                f"{self.novel_mask_values} and no novel_dataset"
            )
        if self.exchange == "pooled" and self.fd_loss and self.novel_dataset is None:
            raise ValueError(
                'exchange="pooled" pairs images of two data sets: novel_dataset and novel_data must '
                "name the second"
            )
        if self.exchanges and self.batch_size < 2 and self.devices == "1" and self.num_nodes == 1:
            raise ValueError(
                f"batch_size must be at least 2 with exchange={self.exchange}, which pairs the "
                f"samples of a batch, got {self.batch_size}"
            )

    @property
    def exchanges(self) -> bool:
        """Whether the loss pairs the samples of a batch."""
        return self.fd_loss and self.exchange != "none"

    @property
    def rules(self) -> ReadingRules:
        """How to read the files of the data set."""
        return ReadingRules(self.mask_values, self.image_bits)

    @property
    def novel_rules(self) -> ReadingRules:
        """How to read the files of the second data set."""
        return ReadingRules(self.novel_mask_values, self.image_bits)

    def epochs(self, phase: str) -> int:
        """Give the epochs of a phase, "warm" or "active"."""
        return {"warm": self.epochs_warm, "active": self.epochs_active}[phase]

    def resolved(self) -> TrainingConfig:
        """Fill in size and learning rate from the data set's preset where None.

        Raises:
            ValueError: a data set is unknown.
        """
        for field in ("dataset", "novel_dataset"):
            name = getattr(self, field)
            if name is not None and name not in DATASETS:
                raise ValueError(f"{field} must be one of {', '.join(DATASETS)}, got {name}")
        preset = DATASETS[self.dataset]
        return dataclasses.replace(
            self,
            size=preset.size if self.size is None else self.size,
            lr=preset.lr if self.lr is None else self.lr,
        )

    def as_json(self) -> dict[str, Any]:
        """Give every field by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TrainingConfig:
        """Read the configuration from the content of config.json.

        Raises:
            ValueError: a field is unknown or missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known - _RECORDED):
            raise ValueError(f"the configuration has unknown fields: {', '.join(unknown)}")
        try:
            return cls(**{name: value for name, value in fields.items() if name in known})
        except TypeError as error:
            raise ValueError(f"the configuration is incomplete: {error}") from error


__all__ = ["FOLDS", "ON_PROBLEM", "PHASES", "TrainingConfig", "one_of"]
