"""Training steps of one network that differ in how, and whether, they compute the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.peers import PeerMask, plain
from fdkernels import FeatureDiscrepancyLoss, FeatureTaps, models
from fdkernels.segmentation.objective import SegmentationLoss

MODES = ("eager", "amp", "channels_last", "compiled", "amp channels_last compiled")
WITHOUT, OP, TAP, PLAIN = "without", "op", "tap", "plain"
CONTENDERS = (WITHOUT, OP, TAP, PLAIN)
ALPHA = 0.1


@dataclass(frozen=True)
class StepCase:
    """A network in training.

    Args:
        network: a name of `fdkernels.models`.
        mode: one of `MODES`: amp is autocast to bfloat16.
        device: `"cpu"` or `"cuda"`.
        batch, side: the images, [batch, 3, side, side].
        base_channels: width of the first level; None is the published one.
    """

    network: str
    mode: str
    device: str
    batch: int
    side: int
    base_channels: int | None

    @property
    def id(self) -> str:
        """Such as `unet amp cpu`."""
        return f"{self.network} {self.mode} {self.device}"

    @property
    def compiled(self) -> bool:
        """Whether model and loss are one compiled graph."""
        return "compiled" in self.mode


class Outcome(NamedTuple):
    """What a first step must give alike, however the loss is computed.

    Attributes:
        loss: the sum of all losses.
        gradients: of every parameter of the network, flattened into one, float32.
    """

    loss: float
    gradients: Tensor


class Step:
    """Forward, segmentation loss, the loss on all nine taps, backward, Adam.

    Args:
        case: the network and how it runs.
        contender: `"without"` the loss; the `"op"`; `"tap"`, whose backward is part of the network's own;
            `"plain"`, the loss written in torch within the step, which a compiler can fuse with the layers.
    """

    def __init__(self, case: StepCase, contender: str) -> None:
        self.case, self.contender = case, contender
        torch.manual_seed(0)
        model = models.create(case.network, base_channels=case.base_channels).to(case.device)
        if "channels_last" in case.mode:
            model = model.to(memory_format=torch.channels_last)
        self.model = model
        self.objective = SegmentationLoss()
        self.criterion = FeatureDiscrepancyLoss(len(model.tap_names), alpha_init=ALPHA).to(case.device)
        parameters = [*model.parameters(), *self.criterion.parameters()]
        # A small rate: a network that soon has nothing to learn would be another one in the last round.
        self.optimizer = torch.optim.Adam(parameters, lr=1e-5)
        self.taps: FeatureTaps | None = None
        if contender != WITHOUT:
            options = {"fused": True} if contender == TAP else {}
            self.taps = FeatureTaps(model, model.tap_names, **options)
        self.images, self.mask = _batch(case)
        self.peer_mask = PeerMask(self.mask, None)
        self.total: Callable[[], Tensor] = self._total
        if case.compiled:
            self.total = torch.compile(self._total, fullgraph=True, dynamic=False)

    def __call__(self) -> None:
        """One step."""
        self.backward()
        self.optimizer.step()

    def backward(self) -> Tensor:
        """Everything but the optimizer; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.total()
        loss.backward()
        if self.taps is not None:
            self.taps.clear()
        return loss

    def outcome(self) -> Outcome:
        """The numbers of a step that changes no weights."""
        # Running statistics of batch norm move; no contender reads them in training.
        loss = self.backward().item()
        gradients = [parameter.grad.flatten().float() for parameter in self.model.parameters()]
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(loss, torch.cat(gradients))

    def close(self) -> None:
        """Take the hooks away."""
        if self.taps is not None:
            self.taps.close()

    def _total(self) -> Tensor:
        half = "amp" in self.case.mode
        with torch.autocast(self.case.device, torch.bfloat16) if half else nullcontext():
            logits = self.model(self.images)
        loss = self.objective(logits, self.mask)
        if self.contender == PLAIN:
            return loss + self._plain()
        if self.contender == WITHOUT:
            return loss
        features = self.taps if self.contender == TAP else self.taps.features
        return loss + self.criterion(features, self.mask)

    def _plain(self) -> Tensor:
        weighted = []
        for alpha, layer in zip(self.criterion.alpha.unbind(), self.taps.features, strict=True):
            mask = PeerMask(self.peer_mask.fg.to(layer.dtype), None)
            weighted.append(alpha.detach() * plain([layer], mask))
        return torch.stack(weighted).sum()


def unavailable(contender: str) -> str | None:
    """Why this version has no such contender, or None."""
    if contender == TAP and "fused" not in inspect.signature(FeatureTaps).parameters:
        return "this version has no FeatureTaps(fused=True)"
    return None


def disagreement(got: Outcome, expected: Outcome) -> tuple[float, float]:
    """|loss - expected| / max(1, |expected|), and ‖gradients - expected‖ / ‖expected‖."""
    loss = abs(got.loss - expected.loss) / max(1.0, abs(expected.loss))
    norm = torch.linalg.vector_norm(expected.gradients)
    return loss, (torch.linalg.vector_norm(got.gradients - expected.gradients) / norm).item()


def count_parameters(module: nn.Module) -> int:
    """How many numbers a network trains."""
    return sum(parameter.numel() for parameter in module.parameters())


def _batch(case: StepCase) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] and masks [N, 1, H, W] of round nuclei, float32."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((case.batch, 3, case.side, case.side), generator=generator)
    rows = torch.arange(case.side).view(-1, 1)
    columns = torch.arange(case.side).view(1, -1)
    phase = torch.rand((case.batch, 2, 1, 1), generator=generator) * 6
    wave = torch.sin(rows / 8 + phase[:, :1]) * torch.sin(columns / 8 + phase[:, 1:])  # [N, 1, H, W]
    mask = (wave > 0.3).float()
    images = images + mask
    if "channels_last" in case.mode:
        images = images.to(memory_format=torch.channels_last)
    return images.to(case.device), mask.to(case.device)
