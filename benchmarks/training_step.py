"""A step of training by each contender: the loss as the op, fused, or in plain torch, and no loss."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import PeerMask, plain
from fdkernels import FeatureDiscrepancyLoss, FeatureTaps, fuse_norms, models
from fdkernels.segmentation.objective import SegmentationLoss

WITHOUT, OP, TAP, FREE, NORMS, PLAIN = CONTENDERS = ("without", "op", "tap", "free", "norms", "plain")
LOSSLESS = (WITHOUT, NORMS)
NETWORK_COMPILED = "network compiled"
ALPHA = 0.1


@dataclasses.dataclass(frozen=True)
class StepCase:
    """A network in training.

    Args:
        network: a name of `fdkernels.models`.
        mode: one of `MODES`: amp is autocast to bfloat16, compiled is model and loss in one graph, network
            compiled the model alone.
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
    def record(self) -> dict[str, Any]:
        """The case as the results name it."""
        images = f"{self.batch}x3x{self.side}x{self.side}"
        known = {"network": self.network, "mode": self.mode, "device": self.device, "images": images}
        return known | {"base_channels": self.base_channels}


class Step:
    """Forward, segmentation loss, the loss on all nine taps, backward, Adam.

    Args:
        case: the network and how it runs.
        contender: `"without"` the loss; the `"op"`; `"tap"`, whose backward is part of the network's own;
            `"free"`, which has fused normalisations and the mask before the forward, too, and takes the sums
            alone of a compiled network; `"norms"`, fused without the loss; `"plain"`, the loss written in
            torch within the step, which a compiler can fuse with the layers.
    """

    def __init__(self, case: StepCase, contender: str) -> None:
        self.case, self.contender = case, contender
        torch.manual_seed(0)
        self.model = models.create(case.network, base_channels=case.base_channels).to(case.device)
        if "channels_last" in case.mode:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.objective = SegmentationLoss()
        names = self.model.tap_names
        self.criterion = FeatureDiscrepancyLoss(len(names), alpha_init=ALPHA).to(case.device)
        parameters = [*self.model.parameters(), *self.criterion.parameters()]
        # A small rate: a network that soon has nothing to learn would be another one in the last round.
        self.optimizer = torch.optim.Adam(parameters, lr=1e-5)
        self.taps: FeatureTaps | None = None
        if contender in (FREE, NORMS):
            fuse_norms(self.model)
        if contender not in LOSSLESS:
            self.taps = FeatureTaps(self.model, names, fused=contender in (TAP, FREE))
        self.images, self.mask = nuclei(case.batch, case.side)
        if "channels_last" in case.mode:
            self.images = self.images.to(memory_format=torch.channels_last)
        self.images, self.mask = self.images.to(case.device), self.mask.to(case.device)
        self.total: Callable[[], Tensor] = self._total
        self.network: Callable[[Tensor], Tensor] = self.model
        if NETWORK_COMPILED in case.mode:
            self.network = torch.compile(self.model, fullgraph=True, dynamic=False)
        elif "compiled" in case.mode:
            self.total = torch.compile(self._total, fullgraph=True, dynamic=False)

    def __call__(self) -> None:
        """One step."""
        self.backward()
        self.optimizer.step()

    def backward(self) -> Tensor:
        """Everything but the optimizer; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.total()
        if self.taps is not None:
            self.taps.clear()  # as the trainers do, so that backward frees features as it goes
        loss.backward()
        return loss

    def outcome(self) -> tuple[float, Tensor]:
        """Loss and gradients, [parameters], of a step that changes no weights."""
        # Running statistics of batch norm move; no contender reads them in training.
        loss = self.backward().item()
        gradients = [parameter.grad.flatten().double() for parameter in self.model.parameters()]
        self.optimizer.zero_grad(set_to_none=True)
        return loss, torch.cat(gradients)

    def close(self) -> None:
        """Take the hooks away."""
        if self.taps is not None:
            self.taps.close()

    def _total(self) -> Tensor:
        half = "amp" in self.case.mode
        with torch.autocast(self.case.device, torch.bfloat16) if half else contextlib.nullcontext():
            if self.contender == FREE:
                with self.taps.mask(self.mask, sums_only=True):
                    logits = self.network(self.images)
            else:
                logits = self.network(self.images)
        loss = self.objective(logits, self.mask)
        if self.taps is None:
            return loss
        if self.contender != PLAIN:
            return loss + self.criterion(self.taps, self.mask)
        for alpha, layer in zip(self.criterion.alpha.unbind(), self.taps.features, strict=True):
            loss = loss + alpha.detach() * plain([layer], PeerMask(self.mask.to(layer.dtype), None))
        self.taps.clear()  # or a compiled graph would put them out
        return loss


def nuclei(batch: int, side: int) -> tuple[Tensor, Tensor]:
    """Noise with round nuclei, [N, 3, H, W], and their masks, [N, 1, H, W], float32."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((batch, 3, side, side), generator=generator)
    rows, columns = torch.arange(side).view(-1, 1) / 8, torch.arange(side) / 8
    phase = torch.rand((batch, 2, 1, 1), generator=generator) * 6
    mask = (torch.sin(rows + phase[:, :1]) * torch.sin(columns + phase[:, 1:]) > 0.3).float()
    return images + mask, mask
