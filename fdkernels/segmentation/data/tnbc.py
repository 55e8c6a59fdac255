"""Triple-negative breast cancer nuclei (Naylor et al. 2018) in the layout of its download.

    Slide_01/01_1.png   image, 512x512, RGBA or RGB
    GT_01/01_1.png      mask of the same name, 0 or 255

The number of the folder is the patient; Slide_1 and Slide_01 are one. Gaps in the numbering and subsets are
fine, and patches without a nucleus are kept. Copies with images/01_1.png and masks/01_1.png are read as well,
with the patient from the name. Version 1.1 of the record adds slides of brain, 12 to 14, which are refused.

References:
    Naylor, Lae, Reyal, Walter: "Segmentation of Nuclei in Histopathology Images by Deep
    Regression of the Distance Map", IEEE TMI 38(2), 2019, doi:10.1109/TMI.2018.2865709.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fdkernels.segmentation.data.layout import layout_error, level, roles
from fdkernels.segmentation.data.names import composed, natural, patient_key
from fdkernels.segmentation.data.pairs import listed, paired
from fdkernels.segmentation.data.samples import FoundSamples, SegmentationSample
from fdkernels.segmentation.data.scan import checked, data_folder, folders

_OUTER = ("TNBC_NucleiSegmentation", "TNBC_and_Brain_dataset")
_ROLE = re.compile(r"(?P<role>slide|gt)(?:[\s_-]+|(?=\d))(?P<patient>.+)", re.IGNORECASE)
_NUMBERED = re.compile(r"(?:.*/)?(?P<patient>\d+)[_-]\d+")
_FIRST_OF_BRAIN = 12  # the slides of breast are 1 to 11


def _slides(root: Path) -> dict[str, tuple[list[Path], list[Path]]]:
    """Return the folders of images and of masks of each patient.

    A folder without a partner of its own spelling goes with those of another: Slide_1 with GT_01.
    """
    exact: dict[str, tuple[list[Path], list[Path]]] = {}
    for folder in folders(root):
        if found := _ROLE.fullmatch(folder.name):
            pair = exact.setdefault(composed(found["patient"]), ([], []))
            pair[found["role"].casefold() == "gt"].append(folder)
    slides = {patient: pair for patient, pair in exact.items() if all(pair)}
    alike: dict[str, str] = {}
    for patient, (images, masks) in exact.items():
        if patient not in slides:
            pair = slides.setdefault(alike.setdefault(patient_key(patient), patient), ([], []))
            pair[0].extend(images)
            pair[1].extend(masks)
    return {patient: slides[patient] for patient in sorted(slides, key=natural)}


def _of_slides(root: Path, problems: list[str]) -> list[SegmentationSample]:
    """Collect the images of Slide_XX and GT_XX, patient by patient."""
    samples: list[SegmentationSample] = []
    for patient, (images, masks) in _slides(root).items():
        named, drawn = _joined(images, problems), _joined(masks, problems)
        if not named and not drawn:
            problems.append(f"{' and '.join(map(str, [*images, *masks]))} contain no image")
        samples += paired(named, drawn, patient, problems)
    return samples


def _joined(parts: Sequence[Path], problems: list[str]) -> dict[str, Path]:
    """Index the files of the folders of one patient by name; nearly always there is one folder."""
    named: dict[str, Path] = {}
    for folder in parts:
        for name, path in listed(folder, problems).items():
            if named.setdefault(name, path) is not path:
                problems.append(f"{path} has the same name as {named[name]}")
    return named


def _of_names(images: Path, masks: Path, problems: list[str]) -> list[SegmentationSample]:
    """Collect the images of a flattened copy, whose names 01_1 begin with the patient."""
    samples = []
    for sample in paired(listed(images, problems), listed(masks, problems), lambda name: name, problems):
        if found := _NUMBERED.fullmatch(sample.patient):
            samples.append(SegmentationSample(sample.image, sample.masks, found["patient"]))
        else:
            problems.append(
                f"{sample.image} must have a name such as 01_1, which begins with the patient (images whose "
                "patients are not known are the data set folder)"
            )
    return samples


def _without_brain(
    root: Path, samples: Sequence[SegmentationSample], problems: list[str]
) -> list[SegmentationSample]:
    """Leave out the slides of brain, and report them."""
    brain = [
        sample for sample in samples if sample.patient.isdecimal() and int(sample.patient) >= _FIRST_OF_BRAIN
    ]
    if brain:
        slides = ", ".join(dict.fromkeys(f"Slide_{sample.patient}" for sample in brain))
        problems.append(
            f"{root} holds {len(brain)} images of brain ({slides}), which version 1.1 of the record adds and "
            "which are no triple-negative breast cancer"
        )
    return [sample for sample in samples if sample not in brain]


def find(root: str | Path, on_problem: str = "refuse", *, brain: bool = False) -> FoundSamples:
    """Find the images with their masks, sorted by number, and read each pair once.

    Args:
        root: the folder that contains Slide_XX and GT_XX, or one around it.
        on_problem: "refuse" or "skip", see `Find`.
        brain: whether slides 12 and above, which show brain, are images like the others; if not, they
            are a problem.

    Raises:
        ValueError: `on_problem` is unknown, `root` has another layout, no image is usable, or there
            are problems and `on_problem` is "refuse".
    """
    root = data_folder(root, on_problem)

    def slides(folder: Path) -> bool:
        return bool(_slides(folder))

    inner = level(root, slides, *_OUTER) or level(root, lambda folder: None not in roles(folder))
    if inner is None:
        layout = "Slide_01/01_1.png, GT_01/01_1.png"
        raise layout_error(root, "TNBC", layout, "no Slide_ and no GT_ folder", slides)
    problems: list[str] = []
    images, masks = roles(inner)
    if slides(inner) or images is None or masks is None:
        samples = _of_slides(inner, problems)
    else:
        samples = _of_names(images, masks, problems)
    if not brain:
        samples = _without_brain(inner, samples, problems)
    return checked(inner, samples, problems, on_problem, may_be_empty=lambda sample: True)


__all__ = ["find"]
