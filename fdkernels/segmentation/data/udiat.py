"""UDIAT dataset B (Yap et al. 2017): breast ultrasound with one lesion per image.

    original/000001.png   image, grey
    GT/000001.png         mask of the same name, white lesion on black

These folders may be in the given folder or in its subfolder `BUS`, or in a folder for each class, benign and
malignant. Patients are not given, so each image counts as its own patient.

References:
    Yap et al.: "Automated Breast Ultrasound Lesions Detection Using Convolutional Neural
    Networks", IEEE JBHI 22(4), 2018, doi:10.1109/JBHI.2017.2731873.
"""

from __future__ import annotations

from pathlib import Path

from fdkernels.segmentation.data.layout import child, layout_error, level, roles
from fdkernels.segmentation.data.pairs import listed, paired
from fdkernels.segmentation.data.samples import FoundSamples, SegmentationSample
from fdkernels.segmentation.data.scan import checked, data_folder

_OUTER = ("BUS", "Dataset B")
_IMAGES, _MASKS = "original", "GT"
_CLASSES = ("benign", "malignant")


def _whole(folder: Path) -> bool:
    return None not in roles(folder, _IMAGES, _MASKS)


def _parts(folder: Path) -> list[Path]:
    """List the folders that hold images and masks: the folder itself, or those of the classes."""
    classes = (child(folder, name) for name in _CLASSES)
    return [folder] if _whole(folder) else [part for part in classes if part is not None and _whole(part)]


def find(root: str | Path, on_problem: str = "refuse") -> FoundSamples:
    """Find the images with their masks, sorted by number, and read each pair once.

    Args:
        root: the folder that contains original and GT, or one around it.
        on_problem: "refuse" or "skip", see `Find`.

    Raises:
        ValueError: `on_problem` is unknown, `root` has another layout, no image is usable, or there
            are problems and `on_problem` is "refuse".
    """
    root = data_folder(root, on_problem)

    def official(folder: Path) -> bool:
        named = child(folder, _IMAGES), child(folder, _MASKS)
        return None not in named or any(part != folder for part in _parts(folder))

    inner = level(root, official, *_OUTER) or level(root, lambda folder: bool(_parts(folder)), *_OUTER)
    if inner is None:
        there = zip((_IMAGES, _MASKS), roles(root, _IMAGES, _MASKS), strict=True)
        raise layout_error(
            root,
            "UDIAT dataset B",
            "original/000001.png, GT/000001.png",
            " and ".join(f"no folder {name}" for name, folder in there if folder is None),
            lambda folder: bool(_parts(folder)),
        )
    samples: list[SegmentationSample] = []
    problems: list[str] = []
    parts = _parts(inner)
    for part in parts:
        images, masks = (listed(folder, problems) for folder in roles(part, _IMAGES, _MASKS) if folder)
        samples += paired(images, masks, lambda name: name, problems)
    absent = [
        f"{inner} has no folder {name} with folders of images and of masks"
        for name in _CLASSES
        if parts != [inner] and child(inner, name) not in parts
    ]
    return checked(inner, samples, problems, on_problem, absent=absent)


__all__ = ["find"]
