"""What a training run is made of, as it is written beside the run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fdkernels import models
from fdkernels.segmentation.data import DATASETS

PHASES = ("warm", "active")


@dataclass(frozen=True)
class TrainingConfig:
    """Every choice of a run; the defaults are the paper's where it states one.

    Attributes:
        dataset: name of the data set, whose preset gives `size` and `lr` where they are None.
        data: its folder.
        output: folder of the run.
        model, base_channels: as `fdkernels.models.create` takes them.
        size: side in pixels that images are resized to.
        batch_size: images a step.
        epochs_warm: epochs of the first phase, with every alpha at 0.
        epochs_active: epochs of the second, with the loss acting.
        lr: Adam's learning rate for the network.
        alpha_lr: Adam's learning rate for the layers' weights alpha.
        alpha_target: the loss of a layer at which "ascent" stops raising its alpha; None sets it
            by what the layers reach in the first phase (`protocol.alpha_target`).
        fd_loss: False trains the same two phases on the segmentation objective alone.
        alpha_rule, convention, exchange, backend: as `fdkernels.FeatureDiscrepancyLoss` takes
            them; exchange "none" or "shuffle", since "pooled" takes two data sets.
        seed: of the split, the initial weights, the order of the images and their augmentation.
        workers: processes that read images; None chooses by the number of images.
        accelerator, precision: as Lightning's Trainer takes them.
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
    seed: int = 0
    workers: int | None = None
    accelerator: str = "auto"
    precision: str = "32-true"
    limit_batches: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "size", "base_channels", "limit_batches"):
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
        if self.epochs_warm + self.epochs_active == 0:
            raise ValueError("epochs_warm and epochs_active must not both be 0")
        if self._needs_target and self.alpha_target is None and self.epochs_warm == 0:
            raise ValueError(
                "alpha_target must be given where epochs_warm is 0, since it is otherwise set by "
                "the first phase"
            )
        if self.model not in models.names():
            raise ValueError(f"model must be one of {', '.join(models.names())}, got {self.model}")
        if self.exchange not in ("none", "shuffle"):
            raise ValueError(
                f'exchange must be "none" or "shuffle" where one data set is trained on, '
                f'got "{self.exchange}"'
            )
        if self.exchanges and self.batch_size < 2:
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
            ValueError: the data set is unknown.
        """
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {self.dataset}")
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
        """The configuration that `as_json` gave.

        Raises:
            ValueError: a field is unknown or missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"the configuration has unknown fields: {', '.join(unknown)}")
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"the configuration is incomplete: {error}") from error


__all__ = ["PHASES", "TrainingConfig"]
