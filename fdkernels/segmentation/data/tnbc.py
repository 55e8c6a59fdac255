"""Triple-negative breast cancer nuclei (Naylor et al. 2018) in the layout of its download.

    Slide_01/01_1.png   image, 512x512, RGBA or RGB
    GT_01/01_1.png      mask of the same name, 0 or 255

The number of the folder is the patient; patients and images are taken from the disk, so that
gaps in the numbering and subsets are fine.

References:
    Naylor, Lae, Reyal, Walter: "Segmentation of Nuclei in Histopathology Images by Deep
    Regression of the Distance Map", IEEE TMI 38(2), 2019, doi:10.1109/TMI.2018.2865709.
"""

from __future__ import annotations

import re
from pathlib import Path

from fdkernels.segmentation.data.dataset import SegmentationSample, raise_problems, unreadable

_IMAGES, _MASKS = "Slide_", "GT_"


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorting key under which 01_2 comes before 01_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _patients(root: Path, prefix: str) -> set[str]:
    return {
        folder.name.removeprefix(prefix)
        for folder in root.iterdir()
        if folder.is_dir() and folder.name.startswith(prefix)
    }


def _pictures(folder: Path) -> set[str]:
    """Names of the PNG files of a folder, without the hidden ones some systems leave there."""
    if not folder.is_dir():
        return set()
    return {
        file.name
        for file in folder.iterdir()
        if file.suffix.lower() == ".png" and not file.name.startswith(".")
    }


def find_samples(root: str | Path) -> list[SegmentationSample]:
    """Every image of the folder with its mask, in the order of the numbers, each read once.

    Args:
        root: the folder that holds Slide_XX and GT_XX.

    Raises:
        ValueError: `root` is no such folder; or images without a mask, masks without an image,
            files that cannot be read or that differ in size, all of them in one list.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"data must be a folder, got {root}, which is none")
    patients = sorted(_patients(root, _IMAGES) | _patients(root, _MASKS), key=_natural)
    if not patients:
        raise ValueError(
            f"data must be a folder in the TNBC layout (Slide_01/01_1.png, GT_01/01_1.png), "
            f"got {root}, which holds no Slide_ and no GT_ folder"
        )
    samples, problems = [], []
    for patient in patients:
        images, masks = root / f"{_IMAGES}{patient}", root / f"{_MASKS}{patient}"
        image_names, mask_names = _pictures(images), _pictures(masks)
        if not image_names | mask_names:
            problems.append(f"{images} and {masks} hold no PNG file")
        for name in sorted(image_names | mask_names, key=_natural):
            if name not in mask_names:
                problems.append(f"{images / name} has no mask {masks / name}")
            elif name not in image_names:
                problems.append(f"{masks / name} has no image {images / name}")
            else:
                samples.append(SegmentationSample(images / name, (masks / name,), patient))
    raise_problems(root, problems + unreadable(samples))
    return samples


__all__ = ["find_samples"]
