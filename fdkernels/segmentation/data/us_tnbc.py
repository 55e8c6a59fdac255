"""US-TNBC (the paper's section A.5): ultrasound of triple-negative breast cancer.

    images/NAME.png   image, about 721x570, cropped so that no annotation remains
    masks/NAME.png    mask of the same name, white lesion on black

`fdkernels prepare` writes this layout from DICOM files and drawn masks. It names pairs patientGROUP_IMAGE,
where GROUP identifies the patient. Everything is as in `folder`, the data set for images of one's own.

References:
    Section A.5 and figure 10.
"""

from __future__ import annotations

from pathlib import Path

from fdkernels.segmentation.data import folder
from fdkernels.segmentation.data.folder import patient_of
from fdkernels.segmentation.data.samples import FoundSamples


def find(root: str | Path, on_problem: str = "refuse") -> FoundSamples:
    """Find the images with their masks, in natural order of the names, and read each pair once.

    Args:
        root: the folder that contains images and masks, or one around it.
        on_problem: "refuse" or "skip", see `Find`.

    Raises:
        ValueError: `on_problem` is unknown, `root` has another layout, no image is usable, or there
            are problems and `on_problem` is "refuse".
    """
    return folder.find(root, on_problem, title="US-TNBC")


__all__ = ["find", "patient_of"]
