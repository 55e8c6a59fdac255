"""Synthetic run folders in the layout that training writes, with random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from fdkernels import models
from fdkernels.segmentation.config import PHASES, TrainingConfig
from fdkernels.segmentation.data import DATASETS, SegmentationDataset
from fdkernels.segmentation.data.splits import Split
from fdkernels.segmentation.runfiles import write_json, write_weights


def write_made_up_run(
    folder: Path, data: Path, *, seed: int = 0, test: slice = slice(2, 7), phases=PHASES, **changes
) -> Path:
    """Write config.json, split.json and the phases' weights; return `folder`.

    The samples of `data` are split in order: those in `test` are the test part, the first is the
    validation part, the others are the training part.
    """
    config = TrainingConfig(
        dataset="tnbc", data=str(data), output=str(folder), base_channels=2, size=32, lr=1e-3, **changes
    )
    samples = DATASETS["tnbc"].find(data).samples
    tested = tuple(samples[test])
    trained = tuple(sample for sample in samples[1:] if sample not in tested)
    split = Split(train=trained, test=tested, validation=(samples[0],))
    write_json(folder / "config.json", dataclasses.asdict(config))
    write_json(folder / "split.json", {"seed": 0, **split.as_json(data)})
    torch.manual_seed(seed)
    pixels = SegmentationDataset(samples, size=config.size)
    images = torch.stack([pixels[index]["image"] for index in range(len(samples))])  # [N, 3, H, W]
    for phase in phases:
        network = models.create(config.model, base_channels=config.base_channels)
        _settle(network, images)
        write_weights(folder / phase / "best.safetensors", network.state_dict())
        write_json(folder / phase / "result.json", {})
    return folder


def _settle(network: torch.nn.Module, images: torch.Tensor) -> None:
    """Fit batch norm's statistics to the images, and shift the logits so that 0 is in a gap of them.

    No logit is then so close to 0 that rounding decides its sign.
    """
    with torch.no_grad():
        for _ in range(20):
            network.train()(images)
        *_, last = (module for module in network.modules() if isinstance(module, torch.nn.Conv2d))
        logits = network.eval()(images).flatten().sort().values
        middle = logits[len(logits) // 4 : -len(logits) // 4]
        gap = int(middle.diff().argmax())
        last.bias -= (middle[gap] + middle[gap + 1]) / 2
