"""UDIAT dataset B (Yap et al. 2017): breast ultrasound with one lesion per image.

    original/000001.png   image, grey
    GT/000001.png         mask of the same name, white lesion on black

These folders may be in the given folder or in its subfolder `BUS`. Patients are not given, so each image
counts as its own patient.

References:
    Yap et al.: "Automated Breast Ultrasound Lesions Detection Using Convolutional Neural
    Networks", IEEE JBHI 22(4), 2018, doi:10.1109/JBHI.2017.2731873.
"""

from __future__ import annotations

from pathlib import Path

from fdkernels.segmentation.data.samples import FoundSamples
from fdkernels.segmentation.data.scan import (
    by_name,
    checked,
    data_folder,
    files,
    inner_folder,
    layout_error,
    paired,
)

_OUTER, _IMAGES, _MASKS = "BUS", "original", "GT"


def find(root: str | Path, on_problem: str = "refuse") -> FoundSamples:
    """Find the images with their masks, sorted by number, and read each pair once.

    Args:
        root: the folder that contains original and GT, or its parent.
        on_problem: "refuse" or "skip", see `Find`.

    Raises:
        ValueError: `on_problem` is unknown, `root` has another layout, no image is usable, or there
            are problems and `on_problem` is "refuse".
    """
    root = data_folder(root, on_problem)
    inner = inner_folder(root, _OUTER, lambda folder: (folder / _IMAGES).is_dir())
    if inner is None:
        raise layout_error(
            root, "UDIAT dataset B", "original/000001.png, GT/000001.png", "no folder original"
        )
    problems: list[str] = []
    images = by_name(files(inner / _IMAGES), problems)
    masks = by_name(files(inner / _MASKS), problems)
    samples = paired(images, masks, lambda name: name, problems)
    return checked(inner, samples, problems, on_problem)


__all__ = ["find"]
