"""The configuration of a training run; config.json beside the run holds it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fdkernels import models
from fdkernels.alpha import ALPHA_RULES
from fdkernels.backend import BACKENDS
from fdkernels.conventions import CONVENTIONS, EXCHANGES
from fdkernels.models.blocks import SIZE_DIVISOR
from fdkernels.segmentation.data import DATASETS, ReadingRules, cores
from fdkernels.segmentation.data.foreground import parse_mask_values
from fdkernels.segmentation.fields import FieldError, check_fields, one_of, option

PHASES = ("warm", "active")
FOLDS = 5
# What a run has whose config.json is older than a field: it goes on as it began.
EARLIER = {"fuse": False}
ON_PROBLEM = ("refuse", "skip")

# Keys of config.json beside those of the configuration, for whoever reads the run later.
_RECORDED = frozenset({"versions"})


# Absurd numbers are refused before anything starts, as some would bring the machine to a halt; the bounds
# are far beyond what anybody trains with.
_SIZE: dict[str, Any] = {"at_least": 2 * SIZE_DIVISOR, "at_most": 4096, "multiple_of": SIZE_DIVISOR}
_RATE: dict[str, Any] = {"above": 0, "at_most": 10}
_NAME: dict[str, Any] = {"pattern": r"[A-Za-z0-9][\w.-]{0,99}", "meaning": "a name of letters, digits and -"}
# Without the characters that no path holds.
_FOLDER: dict[str, Any] = {
    "pattern": r"[^\x00\ud800-\udc7f\udd00-\udfff]*",
    "meaning": "the path of a folder",
}
_VALUES: dict[str, Any] = {
    "pattern": r"[0-9 ,-]{1,200}",
    "meaning": 'values of the mask such as "1", "1,2" or "128-255"',
}
# Ranks that Lightning forks or spawns from one process are left out: nothing here is tested with them.
_STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
_PRECISIONS = (
    *("32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true"),
    *("32", "bf16", "16", "64"),
)


def check_processes(field: str, count: int) -> None:
    """Refuse more processes than this machine bears: each takes hundreds of MiB and waits for the others.

    Args:
        field: that asks for them, for the message.
        count: how many.

    Raises:
        FieldError: there are more than four a core.
    """
    most = 4 * cores()
    if count > most:
        raise FieldError(field, f"must be at most {most} on this machine with {cores()} cores, got {count}")


@dataclass(frozen=True)
class TrainingConfig:
    """Every choice of a run; the defaults are the paper's where it states one.

    Each field is declared with its meaning. Those of a network, of the loss and of Lightning's Trainer
    (`accelerator`, `devices`, `num_nodes`, `strategy`, `precision`) take what `fdkernels.models.create`,
    `fdkernels.FeatureDiscrepancyLoss` and Lightning take.

    Raises:
        ValueError: a number is out of its range, a name is unknown, or fields do not go together.
    """

    dataset: str = option(f"Data set: {one_of(DATASETS)}, which is your own images/ and masks/.", **_NAME)
    data: str = option("Folder of the data set.", **_FOLDER)
    output: str = option("Folder of the run, such as runs/first.", **_FOLDER)
    model: str = option(f"Network: {one_of(models.names())}.", "unet", choices=tuple(models.names()))
    base_channels: int | None = option(
        "Width of the first level.", None, shown="as published", at_least=1, at_most=512
    )
    size: int | None = option(
        f"Side in pixels that images are resized to, a multiple of {SIZE_DIVISOR}.",
        None,
        shown="that of the data set",
        **_SIZE,
    )
    batch_size: int = option("Images a batch and device.", 4, at_least=1, at_most=4096)
    accumulate: int = option(
        "Batches whose gradients make one step of the optimizer.", 1, at_least=1, at_most=10_000
    )
    epochs_warm: int = option("Epochs of phase one, every alpha at 0.", 100, at_least=0, at_most=100_000)
    epochs_active: int = option("Epochs of phase two, the loss acting.", 75, at_least=0, at_most=100_000)
    lr: float | None = option(
        "Adam's learning rate for the network.", None, shown="that of the data set", **_RATE
    )
    alpha_lr: float = option("Adam's learning rate for alpha.", 1e-3, **_RATE)
    alpha_target: float | None = option(
        "Layer loss at which ascent stops raising alpha.",
        None,
        shown="set by the first steps of phase two",
        at_least=-1000,
        at_most=1000,
    )
    alpha_max: float = option("Greatest alpha of ascent, and the end of ramp.", 1.0, above=0, at_most=1000)
    alpha_rule: str = option(f"How alpha moves: {one_of(ALPHA_RULES)}.", "ascent", choices=ALPHA_RULES)
    convention: str = option(
        f"Reading of the paper: {one_of(CONVENTIONS)}.", "paper", choices=tuple(CONVENTIONS)
    )
    exchange: str = option(
        f"Cross-sample term: {one_of(EXCHANGES)}; pooled needs a second data set.",
        "none",
        choices=tuple(EXCHANGES),
    )
    fd_loss: bool = option("Train with the loss, or the same two phases without.", True)
    backend: str = option(
        f"Backend of the loss: {one_of(('auto', *BACKENDS))}.", "auto", choices=("auto", *BACKENDS)
    )
    fold: int | str | None = option(
        f"1 to {FOLDS}: train on that fold of a cross-validation; all: on each, one after the other.",
        None,
        shown="one split 70-20-10",
        choices=(*range(1, FOLDS + 1), "all"),
    )
    on_problem: str = option(
        "Files that cannot be used: refuse the run, or skip them.", "refuse", choices=ON_PROBLEM
    )
    mask_values: str | None = option(
        "Stored values of masks that are foreground, such as 1, 1,2 or 128-255; the others are background.",
        None,
        shown="what is not 0, or above half of white; labels are refused",
        **_VALUES,
    )
    image_bits: int | None = option(
        "How many bits 16-bit images use, 9 to 16.", None, shown="what the files say", at_least=9, at_most=16
    )
    novel_dataset: str | None = option(
        "Second data set; its images are added to the training set, not to validation and test.",
        None,
        **_NAME,
    )
    novel_data: str | None = option("Folder of the second data set.", None, **_FOLDER)
    novel_mask_values: str | None = option(
        "mask_values of the second data set.", None, shown="as for the first without mask_values", **_VALUES
    )
    novel_images: int | None = option(
        "Number of its images, drawn by the seed.", None, shown="all", at_least=1, at_most=10**7
    )
    # numpy takes no larger seed.
    seed: int = option("Seed of split, weights, order and augmentation.", 0, at_least=0, at_most=2**32 - 1)
    workers: int | None = option(
        "Processes that read images.",
        None,
        shown="by the number of images",
        at_least=0,
        at_most=1024,
    )
    accelerator: str = option(
        "cpu, cuda, mps or auto.", "auto", choices=("auto", "cpu", "cuda", "gpu", "mps")
    )
    devices: str = option(
        "How many devices, their numbers (0,2), or auto.",
        "1",
        pattern=r"auto|-1|[1-9][0-9]{0,2}|[0-9]{1,3},|[0-9]{1,3}(,[0-9]{1,3})+",
        meaning='a text with their number, such as "2", their numbers, such as "0,2", or "auto"',
    )
    num_nodes: int = option("Hosts that train together.", 1, at_least=1, at_most=1024)
    strategy: str = option(
        "As Lightning names it; auto is ddp on several devices.", "auto", choices=_STRATEGIES
    )
    sync_batchnorm: bool | None = option(
        "Batch norm over the samples of all devices, so that they equal one with the whole batch.",
        None,
        shown="on GPUs",
    )
    precision: str = option("32-true, bf16-mixed or 16-mixed.", "32-true", choices=_PRECISIONS)
    channels_last: bool = option("Keep images and features in the channels_last format.", False)
    compile: bool = option("Run the network and its loss through torch.compile.", False)
    fuse: bool = option("Normalise, activate and compute the loss in shared passes, without compile.", True)
    tensorboard: bool = option("Write logs for TensorBoard beside the CSV files.", True)
    limit_batches: int | None = option(
        "At most so many batches an epoch, of each part, to try things out.",
        None,
        shown="all",
        at_least=1,
        at_most=10**7,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.epochs_warm + self.epochs_active == 0:
            raise ValueError("epochs_warm and epochs_active must not both be 0")
        self._check_exchange()
        if self.novel_mask_values is not None:
            parse_mask_values(self.novel_mask_values, "novel_mask_values")
        _ = self.rules  # raises ValueError where one is out of its range

    def _check_exchange(self) -> None:
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
                raise FieldError(field, f"must be {one_of(DATASETS)}, got {name!r}")
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
            ValueError: a field is unknown, missing, or holds what it cannot; the message names it.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - set(known) - _RECORDED):
            raise ValueError(
                f"unknown fields: {', '.join(unknown)}; a run of a newer version needs that version"
            )
        missing = [
            name
            for name, field in known.items()
            if field.default is dataclasses.MISSING and name not in fields
        ]
        if missing:
            raise ValueError(f"missing fields: {', '.join(missing)}")
        return cls(**{**EARLIER, **{name: value for name, value in fields.items() if name in known}})


__all__ = ["EARLIER", "FOLDS", "ON_PROBLEM", "PHASES", "TrainingConfig", "check_processes"]
