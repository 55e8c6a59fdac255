"""torch dataset that reads samples from disk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fdkernels.segmentation.data.augment import random_symmetry
from fdkernels.segmentation.data.decoded import DecodedPairs
from fdkernels.segmentation.data.reading import load_pair, read_image, read_mask
from fdkernels.segmentation.data.samples import SegmentationSample

_DECODED = DecodedPairs()  # of this process, for all data sets and runs in it


class SegmentationDataset(Dataset[dict[str, Tensor]]):
    """Items {"image": float32 [3, H, W] in [0, 1], "mask": float32 [1, H, W] of 0 and 1}.

    Construction reads no file. To join several with `torch.utils.data.ConcatDataset`, give each a
    `domain` and all the same `size`; images of different sizes do not fit into one batch.

    Args:
        samples: the samples. Decoded and resized ones are kept in memory, up to 256 MiB a process; a file
            that has changed is read again.
        size: side in pixels of the square that image (bilinear) and mask (where its foreground covers
            at least half of a pixel, see `resize_mask`) are resized to, whatever their aspect ratio; None
            keeps the size of the file.
        augment: draw one of the eight symmetries of the square for each item, from torch's
            global generator.
        domain: index of this data set among several pooled ones; items then also have "domain", an
            int64 scalar that the loss takes (1 is novel).

    Raises:
        ValueError: `samples` is empty or `size` is below 1; on access, a file cannot be read or a
            mask has another size than its image.

    References:
        Section A.4 for the resizing to a square.
    """

    def __init__(
        self,
        samples: Sequence[SegmentationSample],
        size: int | None = None,
        augment: bool = False,
        domain: int | None = None,
    ) -> None:
        if not samples:
            raise ValueError("samples must contain at least one sample, got none")
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}")
        self.samples = tuple(samples)
        self.size = size
        self.augment = augment
        self.domain = domain

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pixels, truth = _DECODED.pair(self.samples[index], self.size)
        if self.augment:
            pixels, truth = random_symmetry(pixels, truth)
        item = {
            "image": pixels.to(torch.float32).div(255).contiguous(),
            "mask": truth.to(torch.float32).contiguous(),
        }
        if self.domain is not None:
            item["domain"] = torch.tensor(self.domain, dtype=torch.int64, device="cpu")
        return item


__all__ = ["SegmentationDataset", "SegmentationSample", "load_pair", "read_image", "read_mask"]
