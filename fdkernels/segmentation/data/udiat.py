"""UDIAT dataset B (Yap et al. 2017): breast ultrasound with one lesion an image.

    original/000001.png   image, grey
    GT/000001.png         mask of the same name, white lesion on black

The folder itself or the folder `BUS` in it. Patients are not given, so each image is its own.

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
    """Every image of the folder with its mask, in the order of the numbers, each read once.

    Args:
        root: the folder that holds original and GT, or the one around it.
        on_problem: "refuse" or "skip", as in `DatasetPreset`.

    Raises:
        ValueError: `root` is no such folder; or there are problems and they are refused.
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
