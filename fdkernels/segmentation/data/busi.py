"""Breast ultrasound images (Al-Dhabyani et al. 2020) in three classes.

    benign/benign (1).png         image, any size
    benign/benign (1)_mask.png    mask, white lesion on black
    benign/benign (4)_mask_1.png  another lesion of the same image; the foreground is the union
    malignant/  normal/           the same

These folders may be in the given folder or in its subfolder `Dataset_BUSI_with_GT`. Patients are not
given, so each image counts as its own patient. `normal` shows no lesion and its masks are empty; papers
exclude it, and so does `find` by default.

References:
    Al-Dhabyani, Gomaa, Khaled, Fahmy: "Dataset of breast ultrasound images", Data in Brief 28,
    2020, doi:10.1016/j.dib.2019.104863.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fdkernels.segmentation.data.samples import FoundSamples, SegmentationSample
from fdkernels.segmentation.data.scan import (
    by_name,
    checked,
    data_folder,
    files,
    inner_folder,
    layout_error,
    natural,
)

CLASSES = ("benign", "malignant", "normal")
LESIONS = ("benign", "malignant")
_OUTER = "Dataset_BUSI_with_GT"
_MASK = re.compile(r"(?P<image>.*)_mask(_\d+)?")


def _samples_of(folder: Path, problems: list[str]) -> list[SegmentationSample]:
    """Collect the images of one class, each with all its masks."""
    images: dict[str, Path] = {}
    masks: dict[str, list[Path]] = {}
    for name, path in by_name(files(folder), problems).items():
        mask = _MASK.fullmatch(name)
        if mask is None:
            images[name] = path
        else:
            masks.setdefault(mask["image"], []).append(path)
    problems += [f"{path} has no mask" for name, path in images.items() if name not in masks]
    problems += [f"{path} has no image" for name in masks if name not in images for path in masks[name]]
    return [
        SegmentationSample(images[name], tuple(masks[name]), name)
        for name in sorted(images.keys() & masks.keys(), key=natural)
    ]


def find(root: str | Path, on_problem: str = "refuse", *, classes: Sequence[str] = LESIONS) -> FoundSamples:
    """Find the images of the classes with their masks, class by class, and read each sample once.

    Args:
        root: the folder that contains the classes, or its parent.
        on_problem: "refuse" or "skip", see `Find`.
        classes: classes to include; `CLASSES` is all three. Only masks of "normal" may be empty.

    Raises:
        ValueError: a class or `on_problem` is unknown, `root` has another layout, no image is usable,
            or there are problems and `on_problem` is "refuse".
    """
    root = data_folder(root, on_problem)
    if not classes or not set(classes) <= set(CLASSES):
        raise ValueError(f"classes must be some of {', '.join(CLASSES)}, got {', '.join(classes) or 'none'}")
    inner = inner_folder(root, _OUTER, lambda folder: any((folder / name).is_dir() for name in classes))
    if inner is None:
        raise layout_error(
            root,
            "BUSI",
            "benign/benign (1).png, benign/benign (1)_mask.png",
            f"none of the folders {', '.join(classes)}",
        )
    samples: list[SegmentationSample] = []
    problems: list[str] = []
    for name in classes:
        samples += _samples_of(inner / name, problems)
    return checked(
        inner,
        samples,
        problems,
        on_problem,
        may_be_empty=lambda sample: sample.image.parent.name not in LESIONS,
    )


__all__ = ["CLASSES", "LESIONS", "find"]
