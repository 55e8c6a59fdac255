"""US-TNBC (the paper's section A.5): ultrasound of triple-negative breast cancer.

    images/NAME.png   image, about 721x570, cropped free of markings
    masks/NAME.png    mask of the same name, white lesion on black

This is also what `fdkernels prepare` makes of DICOM files and drawn masks. It names pairs
patientGROUP_IMAGE, in which GROUP stands for the patient; under any other name an image is its own
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
    """The patient in a name that `fdkernels prepare` gave; any other name is its own patient."""
    prepared = _PREPARED.fullmatch(name)
    return name if prepared is None else prepared["patient"]


def find(root: str | Path, on_problem: str = "refuse") -> FoundSamples:
    """Every image of the folder with its mask, in natural order of the names, each read once.

    Args:
        root: the folder that holds images and masks.
        on_problem: "refuse" or "skip", as in `DatasetPreset`.

    Raises:
        ValueError: `root` is no such folder; or there are problems and they are refused.
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
