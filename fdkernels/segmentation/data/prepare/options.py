"""Validated options of `prepare`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

MaskPolarity = Literal["auto", "dark", "light"]
AnnotationEvidence = Literal["both", "tag", "pixels", "none"]
OnProblem = Literal["refuse", "skip"]
Grouping = Literal["patient-id", "file"]
Outlines = Literal["refuse", "fill", "keep"]
WithoutPatientId = Literal["refuse", "separate"]

# Shorter keys can be found by brute force.
_LEAST_KEY_BYTES = 16


class Box(NamedTuple):
    """Rectangle of an image in pixels: columns x0 to x1 and rows y0 to y1, ends exclusive."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def area(self) -> int:
        """Number of pixels inside; 0 for an empty or inverted box."""
        return max(self.x1 - self.x0, 0) * max(self.y1 - self.y0, 0)

    @property
    def slices(self) -> tuple[slice, slice]:
        """Row and column slices that crop an array [H, W, ...]."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)


@dataclass(frozen=True)
class PrepareOptions:
    """Options of `prepare`.

    Attributes:
        crop: region of every frame to keep, instead of the detected ultrasound region.
        mask_polarity: "dark" (lesion dark on light), "light" (light on dark), or "auto": the value of
            at least two thirds of the mask's border pixels is background.
        annotations: evidence that excludes a frame as annotated: "tag" (BurnedInAnnotation is YES),
            "pixels" (marks detected inside the crop), "both" for either, or "none".
        force: files (STEM) and frames (STEM_frameN) to keep even if they are annotated.
        exclude: files and frames to exclude.
        on_problem: on unusable input, "refuse" the whole run or "skip" that input.
        group_by: images that share the first part of their names: those of one "patient-id" or of
            one "file".
        outlines: what to do about masks drawn as an outline that is not filled: "refuse", "fill", or
            "keep" where lesions are rings or lines.
        patients: the patient of a file by its name, with or without suffix, or its path in the folder;
            goes before its Patient ID. See `read_patients`.
        without_patient_id: what to do about several files without Patient ID: "refuse", or take each
            for another patient, "separate".
        hash_key: secret key for hashed names, at least 16 bytes; None for running numbers.

    Raises:
        ValueError: an option has an unknown value, the crop is empty, a frame is both forced and
            excluded, or the key has fewer than 16 bytes.
    """

    crop: Box | None = None
    mask_polarity: MaskPolarity = "auto"
    annotations: AnnotationEvidence = "both"
    force: frozenset[str] = frozenset()
    exclude: frozenset[str] = frozenset()
    on_problem: OnProblem = "refuse"
    group_by: Grouping = "patient-id"
    outlines: Outlines = "refuse"
    patients: Mapping[str, str] = field(default_factory=dict)
    without_patient_id: WithoutPatientId = "refuse"
    hash_key: bytes | None = None

    def __post_init__(self) -> None:
        _check_choice("mask_polarity", self.mask_polarity, get_args(MaskPolarity))
        _check_choice("annotations", self.annotations, get_args(AnnotationEvidence))
        _check_choice("on_problem", self.on_problem, get_args(OnProblem))
        _check_choice("group_by", self.group_by, get_args(Grouping))
        _check_choice("outlines", self.outlines, get_args(Outlines))
        _check_choice("without_patient_id", self.without_patient_id, get_args(WithoutPatientId))
        if self.patients and self.group_by == "file":
            raise ValueError('patients must not be given where group_by is "file", got both')
        if self.crop is not None and (min(self.crop) < 0 or self.crop.area == 0):
            raise ValueError(
                f"crop must be x0,y0,x1,y1 with 0 <= x0 < x1 and 0 <= y0 < y1, got {_text(self.crop)}"
            )
        both = sorted(self.force & self.exclude)
        if both:
            raise ValueError(f"force and exclude must not name the same frame, got {both[0]} in both")
        if self.hash_key is not None and len(self.hash_key) < _LEAST_KEY_BYTES:
            raise ValueError(
                f"hash_key must have at least {_LEAST_KEY_BYTES} bytes, got {len(self.hash_key)}"
            )


def parse_crop(text: str) -> Box:
    """Parse "x0,y0,x1,y1" to a box.

    Raises:
        ValueError: `text` is not four comma-separated integers.
    """
    try:
        return Box(*(int(part) for part in text.split(",")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"crop must be four integers x0,y0,x1,y1, got {text!r}") from error


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _text(box: Box) -> str:
    return ",".join(map(str, box))


__all__ = ["Box", "PrepareOptions", "parse_crop"]
