"""What a data set consists of: samples on the disk, and what a search for them found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SegmentationSample:
    """One image with its truth, as files.

    Attributes:
        image: the image file.
        masks: one or more files with the truth; the foreground is their union. Each is an image,
            or polygons in an ImageScope `.xml`, whose size is that of `image`.
        patient: who the image is of. Splits never separate the images of one patient. Where
            patients are unknown it is the image's own id, so that a split is one by image.
    """

    image: Path
    masks: tuple[Path, ...]
    patient: str


@dataclass(frozen=True)
class FoundSamples:
    """What a folder holds.

    Attributes:
        samples: every image that can be used, in natural order of the names.
        skipped: one sentence for each problem for which files were left out; empty unless that was
            asked for.
    """

    samples: tuple[SegmentationSample, ...]
    skipped: tuple[str, ...] = ()


__all__ = ["FoundSamples", "SegmentationSample"]
