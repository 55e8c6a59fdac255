"""Breast ultrasound images (Al-Dhabyani et al. 2020) in three classes.

    benign/benign (1).png         image, any size
    benign/benign (1)_mask.png    mask, white lesion on black
    benign/benign (4)_mask_1.png  another lesion of the same image; the foreground is the union
    malignant/  normal/           the same

These folders may be in the given folder or in its subfolder `Dataset_BUSI_with_GT`. Copies are read as well
that hold images and masks in folders of their own, in each class or for all (images/benign (1).png and
masks/0/benign (1).png), or everything in one folder: the class is then in the name. Patients are not given,
so each image counts as its own patient. `normal` shows no lesion and its masks are empty; papers exclude it,
and so does `find` by default.

References:
    Al-Dhabyani, Gomaa, Khaled, Fahmy: "Dataset of breast ultrasound images", Data in Brief 28,
    2020, doi:10.1016/j.dib.2019.104863.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from fdkernels.segmentation.data.layout import child, layout_error, level, roles
from fdkernels.segmentation.data.names import caseless
from fdkernels.segmentation.data.pairs import MASK_ENDING, listed, paired
from fdkernels.segmentation.data.samples import FoundSamples, SegmentationSample
from fdkernels.segmentation.data.scan import checked, data_folder, files

CLASSES = ("benign", "malignant", "normal")
LESIONS = ("benign", "malignant")
_OUTER = "Dataset_BUSI_with_GT"
_CLASS = re.compile(rf"(?P<name>{'|'.join(CLASSES)})(?![a-z])")


def _class_of(name: str) -> str | None:
    """Return the class that a name, or one of the folders before it, begins with."""
    told = (_CLASS.match(caseless(part)) for part in reversed(PurePosixPath(name).parts))
    return next((found["name"] for found in told if found), None)


def _samples_of(folder: Path, problems: list[str]) -> list[SegmentationSample]:
    """Collect the images of a folder, each with all its masks, from folders of their own or told by name."""
    images, masks = roles(folder)
    if images is not None and masks is not None:
        named, drawn = listed(images, problems), listed(masks, problems)
    else:
        everything = listed(folder, problems)
        drawn = {name: path for name, path in everything.items() if MASK_ENDING.fullmatch(name)}
        named = {name: path for name, path in everything.items() if name not in drawn}
    return paired(named, drawn, lambda name: name, problems)


def _by_class(root: Path, classes: Sequence[str], problems: list[str]) -> dict[str, list[SegmentationSample]]:
    """Collect the images of each class, from the folders of the classes or told by their names."""
    found: dict[str, list[SegmentationSample]] = {name: [] for name in CLASSES}
    apart = {name: folder for name in classes if (folder := child(root, name)) is not None}
    for name, folder in apart.items():
        found[name] = _samples_of(folder, problems)
    for sample in [] if apart else _samples_of(root, problems):
        told = _class_of(sample.patient)
        if told is None:
            problems.append(f"{sample.image} must have a name that begins with {' or '.join(CLASSES)}")
        else:
            found[told].append(sample)
    return {name: found[name] for name in classes}


def find(root: str | Path, on_problem: str = "refuse", *, classes: Sequence[str] = LESIONS) -> FoundSamples:
    """Find the images of the classes with their masks, class by class, and read each sample once.

    Args:
        root: the folder that contains the classes, or one around it.
        on_problem: "refuse" or "skip", see `Find`.
        classes: classes to include; `CLASSES` is all three. Only masks of "normal" may be empty.

    Raises:
        ValueError: a class or `on_problem` is unknown, `root` has another layout, no image is usable,
            or there are problems and `on_problem` is "refuse".
    """
    root = data_folder(root, on_problem)
    if not classes or not set(classes) <= set(CLASSES):
        raise ValueError(f"classes must be some of {', '.join(CLASSES)}, got {', '.join(classes) or 'none'}")

    def of_classes(folder: Path) -> bool:
        return any(child(folder, name) is not None for name in classes)

    def told_by_name(folder: Path) -> bool:
        images, masks = roles(folder)
        if images is None or masks is None:
            return any(_class_of(path.stem) is not None for path in files(folder))
        return any(_class_of(name) is not None for name in listed(images, []))

    inner = level(root, of_classes, _OUTER) or level(root, told_by_name)
    if inner is None:
        raise layout_error(
            root,
            "BUSI",
            "benign/benign (1).png, benign/benign (1)_mask.png",
            f"none of the folders {', '.join(classes)}",
            of_classes,
        )
    problems: list[str] = []
    found = _by_class(inner, classes, problems)
    absent = [f"{inner} has no image of the class {name}" for name, samples in found.items() if not samples]
    normal = {sample.image for sample in found.get("normal", [])}
    return checked(
        inner,
        [sample for samples in found.values() for sample in samples],
        problems,
        on_problem,
        may_be_empty=lambda sample: sample.image in normal,
        absent=absent,
    )


__all__ = ["CLASSES", "LESIONS", "find"]
