"""Samples on the disk, their check, and the torch dataset that reads them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fdkernels.segmentation.data.augment import random_symmetry

_LISTED_PROBLEMS = 20


@dataclass(frozen=True)
class SegmentationSample:
    """One image with its truth, as files.

    Attributes:
        image: the image file.
        masks: one or more mask files; the foreground is their union.
        patient: who the image is of. Splits never separate the images of one patient.
    """

    image: Path
    masks: tuple[Path, ...]
    patient: str


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what Pillow raises on a broken, foreign or overly large file into a ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (
        OSError,
        SyntaxError,  # Pillow's word for a broken PNG
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_image(path: Path) -> Image.Image:
    """The image at `path` as 8-bit RGB; an alpha channel is dropped, a palette is resolved.

    Raises:
        ValueError: the file cannot be read, is larger than Pillow's limit against decompression
            bombs, or holds more than 8 bits a channel.
    """
    with _readable(path), Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{path} must have 8 bits a channel, got mode {image.mode}")
        return image.convert("RGB")


def read_mask(path: Path) -> np.ndarray:
    """The mask at `path` as bool [H, W], True where it is not 0.

    Raises:
        ValueError: the file cannot be read, or holds grey values other than two (0 and one more).
    """
    with _readable(path), Image.open(path) as image:
        values = np.array(image.convert("L"))  # [H, W]
    grey = np.unique(values)
    if grey[grey > 0].size > 1:
        raise ValueError(
            f"{path} must hold 0 for background and one other value for foreground, "
            f"got {grey.size} grey values between {grey[0]} and {grey[-1]}"
        )
    return values > 0


def load_pair(sample: SegmentationSample) -> tuple[Image.Image, Image.Image]:
    """Image (RGB) and mask (L, 0 or 255, the union of the sample's masks), of one size.

    Raises:
        ValueError: a file cannot be read, or a mask has another size than the image.
    """
    image = read_image(sample.image)
    union = np.zeros((image.height, image.width), dtype=bool)  # [H, W]
    for path in sample.masks:
        mask = read_mask(path)  # [H, W]
        if mask.shape != union.shape:
            raise ValueError(
                f"{path} must have the size of its image {sample.image.name}, "
                f"{image.width}x{image.height}, got {mask.shape[1]}x{mask.shape[0]}"
            )
        union |= mask
    return image, Image.fromarray(union.astype(np.uint8) * 255)


def raise_problems(root: Path, problems: Sequence[str]) -> None:
    """Raises one ValueError that lists `problems`, if there are any."""
    if not problems:
        return
    listed = [f"  {problem}" for problem in problems[:_LISTED_PROBLEMS]]
    if len(problems) > _LISTED_PROBLEMS:
        listed.append(f"  and {len(problems) - _LISTED_PROBLEMS} more")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise ValueError(f"{root} cannot be used, {count}:\n" + "\n".join(listed))


def unreadable(samples: Sequence[SegmentationSample]) -> list[str]:
    """One sentence for each sample whose files cannot be decoded or do not fit each other.

    Reads every file whole: a truncated one shows only then, and had better show before the first
    epoch than during it.
    """
    problems = []
    for sample in samples:
        try:
            load_pair(sample)
        except ValueError as error:
            problems.append(str(error))
    return problems


class SegmentationDataset(Dataset[dict[str, Tensor]]):
    """Items {"image": float32 [3, H, W] in [0, 1], "mask": float32 [1, H, W] of 0 and 1}.

    Args:
        samples: what to read; each item is read from the disk anew.
        size: side in pixels of the square that image (bilinear) and mask (nearest) are resized
            to; None keeps the size of the file.
        augment: draw one of the eight symmetries of the square for each item, from torch's
            global generator.

    Raises:
        ValueError: `samples` is empty or `size` is below 1.
    """

    def __init__(
        self, samples: Sequence[SegmentationSample], size: int | None = None, augment: bool = False
    ) -> None:
        if not samples:
            raise ValueError("samples must hold at least one sample, got none")
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}")
        self.samples = tuple(samples)
        self.size = size
        self.augment = augment

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, mask = load_pair(self.samples[index])
        if self.size is not None and image.size != (self.size, self.size):
            side = (self.size, self.size)
            image = image.resize(side, Image.Resampling.BILINEAR)
            mask = mask.resize(side, Image.Resampling.NEAREST)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, H, W]
        truth = torch.from_numpy(np.array(mask)).unsqueeze(0)  # [1, H, W]
        if self.augment:
            pixels, truth = random_symmetry(pixels, truth)
        return {
            "image": pixels.to(torch.float32).div(255).contiguous(),
            "mask": truth.gt(0).to(torch.float32).contiguous(),
        }


__all__ = [
    "SegmentationDataset",
    "SegmentationSample",
    "load_pair",
    "raise_problems",
    "read_image",
    "read_mask",
    "unreadable",
]
