"""Samples of a data set as files, and the result of a scan for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from fdkernels.segmentation.data.foreground import parse_mask_values


@dataclass(frozen=True)
class ReadingRules:
    """What the files of a data set do not say themselves.

    Attributes:
        mask_values: stored values that are foreground, such as "1", "1,2" or "128-255", see `read_mask`;
            None to conclude from each mask.
        image_bits: how many bits 16-bit images use, 9 to 16; None for what each file says.

    Raises:
        ValueError: a rule is none of these.
    """

    mask_values: str | None = None
    image_bits: int | None = None

    def __post_init__(self) -> None:
        if self.mask_values is not None:
            parse_mask_values(self.mask_values)
        if self.image_bits is not None and not 9 <= self.image_bits <= 16:
            raise ValueError(f"image_bits must be 9 to 16, got {self.image_bits}")

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give these rules to every sample that is made inside, by whatever function finds it."""
        before = _RULES.set(self)
        try:
            yield
        finally:
            _RULES.reset(before)


_RULES = ContextVar("_RULES", default=ReadingRules())  # noqa: B039 - immutable


@dataclass(frozen=True)
class SegmentationSample:
    """Files of one image and its ground truth.

    Attributes:
        image: the image file.
        masks: one or more mask files; the foreground is their union. Each is an image of the size
            of `image`, or an ImageScope `.xml` with polygons.
        patient: the patient shown. Splits never separate the images of one patient. If patients
            are unknown it is the image's own id, so splits are by image.
        rules: how to read the files where they do not say it themselves; those of `ReadingRules.applied`.
    """

    image: Path
    masks: tuple[Path, ...]
    patient: str
    rules: ReadingRules = field(default_factory=_RULES.get)


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


__all__ = ["FoundSamples", "ReadingRules", "SegmentationSample"]
