"""What a training run is made of, as it is written beside the run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fdkernels import models
from fdkernels.segmentation.data import DATASETS

PHASES = ("warm", "active")
FOLDS = 5

# What stands in config.json beside the configuration, for whoever reads the run later.
_RECORDED = frozenset({"versions"})


@dataclass(frozen=True)
class TrainingConfig:
    """Every choice of a run; the defaults are the paper's where it states one.

    Attributes:
        dataset: name of the data set, whose preset gives `size` and `lr` where they are None.
        data: its folder.
        output: folder of the run.
        model, base_channels: as `fdkernels.models.create` takes them.
        size: side in pixels that images are resized to.
        batch_size: images a step on each device (with `accumulate`: each part of a step).
        epochs_warm: epochs of the first phase, with every alpha at 0.
        epochs_active: epochs of the second, with the loss acting.
        lr: Adam's learning rate for the network.
        alpha_lr: Adam's learning rate for the layers' weights alpha.
        alpha_target: the loss of a layer at which "ascent" stops raising its alpha; None sets it
            by what the layers reach in the first phase (`phase.alpha_target`).
        fd_loss: False trains the same two phases on the segmentation objective alone.
        alpha_rule, convention, exchange, backend: as `fdkernels.FeatureDiscrepancyLoss` takes
            them; exchange "pooled" needs a second data set.
        fold: 1 to 5 trains on that fold of a cross-validation, "all" on one after the other; None
            on one split 70-20-10.
        on_problem: what to do about files that cannot be used, "refuse" or "skip".
        novel_dataset, novel_data: a second data set and its folder, whose images are added to
            those trained on; validation and test stay those of `dataset`.
        novel_images: how many of them, drawn by the seed; None for all.
        seed: of the split, the initial weights, the order of the images and their augmentation.
        workers: processes that read images; None chooses by the number of images.
        accelerator, devices, num_nodes, strategy, precision: as Lightning's Trainer takes them.
        sync_batchnorm: whether batch norm takes its statistics over all devices; None does so
            where several GPUs train, so that they equal one GPU with the whole batch.
        channels_last: keep images and features in torch's channels_last memory format.
        compile: run the network through `torch.compile`.
        accumulate: batches whose gradients make one step of the optimizer.
        tensorboard: write TensorBoard's files beside the CSV files.
        limit_batches: at most so many batches an epoch, of each part; for trying things out.
    """

    dataset: str
    data: str
    output: str
    model: str = "unet"
    base_channels: int | None = None
    size: int | None = None
    batch_size: int = 4
    epochs_warm: int = 100
    epochs_active: int = 75
    lr: float | None = None
    alpha_lr: float = 1e-3
    alpha_target: float | None = None
    fd_loss: bool = True
    alpha_rule: str = "ascent"
    convention: str = "paper"
    exchange: str = "none"
    backend: str = "auto"
    fold: int | str | None = None
    on_problem: str = "refuse"
    novel_dataset: str | None = None
    novel_data: str | None = None
    novel_images: int | None = None
    seed: int = 0
    workers: int | None = None
    accelerator: str = "auto"
    devices: str = "1"
    num_nodes: int = 1
    strategy: str = "auto"
    sync_batchnorm: bool | None = None
    precision: str = "32-true"
    channels_last: bool = False
    compile: bool = False
    accumulate: int = 1
    tensorboard: bool = True
    limit_batches: int | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.epochs_warm + self.epochs_active == 0:
            raise ValueError("epochs_warm and epochs_active must not both be 0")
        if self._needs_target and self.alpha_target is None and self.epochs_warm == 0:
            raise ValueError(
                "alpha_target must be given where epochs_warm is 0, since it is otherwise set by "
                "the first phase"
            )
        if self.model not in models.names():
            raise ValueError(f"model must be one of {', '.join(models.names())}, got {self.model}")
        if self.fold not in (None, "all", *range(1, FOLDS + 1)):
            raise ValueError(f"fold must be 1 to {FOLDS}, or all, got {self.fold}")
        if self.on_problem not in ("refuse", "skip"):
            raise ValueError(f'on_problem must be "refuse" or "skip", got "{self.on_problem}"')
        self._check_exchange()

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
        if self.exchange not in ("none", "shuffle", "pooled"):
            raise ValueError(f'exchange must be "none", "shuffle" or "pooled", got "{self.exchange}"')
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
        """Whether samples of a batch are paired with each other."""
        return self.fd_loss and self.exchange != "none"

    @property
    def _needs_target(self) -> bool:
        return self.fd_loss and self.alpha_rule == "ascent"

    def epochs(self, phase: str) -> int:
        """Epochs of the phase of that name."""
        return {"warm": self.epochs_warm, "active": self.epochs_active}[phase]

    def resolved(self) -> TrainingConfig:
        """The same with size and learning rate taken from the data set's preset where None.

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
        """Every field by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TrainingConfig:
        """The configuration that `as_json` gave, from what config.json holds.

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


__all__ = ["FOLDS", "PHASES", "TrainingConfig"]
