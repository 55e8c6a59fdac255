"""US-TNBC (the paper's section A.5): ultrasound of triple-negative breast cancer.

    images/NAME.png   image, about 721x570, cropped so that no annotation remains
    masks/NAME.png    mask of the same name, white lesion on black

`fdkernels prepare` writes this layout from DICOM files and drawn masks. It names pairs
patientGROUP_IMAGE, where GROUP identifies the patient; an image with any other name counts as its own
patient.

References:
    Section A.5 and figure 10.
"""

from __future__ import annotations

import re
from pathlib import Path

from fdkernels.segmentation.data.samples import FoundSamples
from fdkernels.segmentation.data.scan import by_name, checked, data_folder, files, layout_error, paired

_IMAGES, _MASKS = "images", "masks"
_PREPARED = re.compile(r"(?P<patient>patient[^_]+)_.+")


def patient_of(name: str) -> str:
    """Return the patient from a name given by `fdkernels prepare`, or the name itself if it is another."""
    prepared = _PREPARED.fullmatch(name)
    return name if prepared is None else prepared["patient"]


def find(root: str | Path, on_problem: str = "refuse") -> FoundSamples:
    """Find the images with their masks, in natural order of the names, and read each pair once.

    Args:
        root: the folder that contains images and masks.
        on_problem: "refuse" or "skip", see `Find`.

    Raises:
        ValueError: `on_problem` is unknown, `root` has another layout, no image is usable, or there
            are problems and `on_problem` is "refuse".
    """
    root = data_folder(root, on_problem)
    if not (root / _IMAGES).is_dir():
        raise layout_error(root, "US-TNBC", "images/NAME.png, masks/NAME.png", "no folder images")
    problems: list[str] = []
    images = by_name(files(root / _IMAGES), problems)
    masks = by_name(files(root / _MASKS), problems)
    samples = paired(images, masks, patient_of, problems)
    return checked(root, samples, problems, on_problem)


__all__ = ["find", "patient_of"]
