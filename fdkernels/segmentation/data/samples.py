"""Samples of a data set as files, and the result of a scan for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SegmentationSample:
    """Files of one image and its ground truth.

    Attributes:
        image: the image file.
        masks: one or more mask files; the foreground is their union. Each is an image of the size
            of `image`, or an ImageScope `.xml` with polygons.
        patient: the patient shown. Splits never separate the images of one patient. If patients
            are unknown it is the image's own id, so splits are by image.
    """

    image: Path
    masks: tuple[Path, ...]
    patient: str


@dataclass(frozen=True)
class FoundSamples:
    """Result of a scan.

    Attributes:
        samples: every usable image, in natural order of the names.
        skipped: one sentence per problem that led to skipped files, if `on_problem` is "skip", and
            per part of the data set that is not there, such as a class.
        notes: one sentence on each thing that leaves nothing out but that a user should know.
    """

    samples: tuple[SegmentationSample, ...]
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


__all__ = ["FoundSamples", "SegmentationSample"]
