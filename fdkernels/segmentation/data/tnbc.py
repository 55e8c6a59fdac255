"""Triple-negative breast cancer nuclei (Naylor et al. 2018) in the layout of its download.

    Slide_01/01_1.png   image, 512x512, RGBA or RGB
    GT_01/01_1.png      mask of the same name, 0 or 255

The number of the folder is the patient. Gaps in the numbering and subsets are fine, and patches without
a nucleus are kept.

References:
    Naylor, Lae, Reyal, Walter: "Segmentation of Nuclei in Histopathology Images by Deep
    Regression of the Distance Map", IEEE TMI 38(2), 2019, doi:10.1109/TMI.2018.2865709.
"""

from __future__ import annotations

from pathlib import Path

from fdkernels.segmentation.data.samples import FoundSamples, SegmentationSample
from fdkernels.segmentation.data.scan import (
    by_name,
    checked,
    data_folder,
    files,
    folders,
    inner_folder,
    layout_error,
    natural,
    paired,
)

_OUTER = "TNBC_NucleiSegmentation"
_IMAGES, _MASKS = "Slide_", "GT_"


def _patients(root: Path) -> list[str]:
    named = {
        folder.name.removeprefix(prefix)
        for folder in folders(root)
        for prefix in (_IMAGES, _MASKS)
        if folder.name.startswith(prefix)
    }
    return sorted(named, key=natural)


def find(root: str | Path, on_problem: str = "refuse") -> FoundSamples:
    """Find the images with their masks, sorted by number, and read each pair once.

    Args:
        root: the folder that contains Slide_XX and GT_XX, or its parent.
        on_problem: "refuse" or "skip", see `Find`.

    Raises:
        ValueError: `on_problem` is unknown, `root` has another layout, no image is usable, or there
            are problems and `on_problem` is "refuse".
    """
    root = data_folder(root, on_problem)
    inner = inner_folder(root, _OUTER, lambda folder: bool(_patients(folder)))
    if inner is None:
        raise layout_error(root, "TNBC", "Slide_01/01_1.png, GT_01/01_1.png", "no Slide_ and no GT_ folder")
    samples: list[SegmentationSample] = []
    problems: list[str] = []
    for patient in _patients(inner):
        images = by_name(files(inner / f"{_IMAGES}{patient}"), problems)
        masks = by_name(files(inner / f"{_MASKS}{patient}"), problems)
        if not images and not masks:
            problems.append(f"{inner / (_IMAGES + patient)} and {_MASKS}{patient} contain no image")
        samples += paired(images, masks, patient, problems)
    return checked(inner, samples, problems, on_problem, may_be_empty=lambda sample: True)


__all__ = ["find"]
