"""MoNuSeg 2018 (Kumar et al.): nuclei of several organs, outlined in Aperio ImageScope.

    MoNuSeg 2018 Training Data/
        Tissue Images/NAME.tif      image, 1000x1000, RGB
        Annotations/NAME.xml        one polygon per nucleus
    MoNuSegTestData/
        NAME.tif  NAME.xml          the same, in one folder

The given folder contains both folders, one of them, or the content of either, or is one around these. NAME
is a TCGA barcode; its first three fields are the patient: TCGA-A7-A13E-01Z-00-DX1 belongs to TCGA-A7-A13E.
Copies with masks as images in a folder masks or GT are read as well; where there are both, the polygons are
taken.

References:
    Kumar et al.: "A Dataset and a Technique for Generalized Nuclear Segmentation for
    Computational Pathology", IEEE TMI 36(7), 2017, doi:10.1109/TMI.2017.2677499.
    Kumar et al.: "A Multi-Organ Nucleus Segmentation Challenge", IEEE TMI 39(5), 2020,
    doi:10.1109/TMI.2019.2947628.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fdkernels.segmentation.data.layout import IMAGES, MASKS, child, layout_error, level
from fdkernels.segmentation.data.names import folder_key
from fdkernels.segmentation.data.pairs import by_name, listed, paired
from fdkernels.segmentation.data.samples import FoundSamples, SegmentationSample
from fdkernels.segmentation.data.scan import checked, data_folder, files, folders

_TISSUE, _OUTLINES = "Tissue Images", "Annotations"
_IMAGES = (_TISSUE, *IMAGES)
_PART = re.compile("train|test|val")
_LAYOUT = "Tissue Images/NAME.tif and Annotations/NAME.xml, or NAME.tif and NAME.xml in one folder"
_BARCODE = re.compile(r"(?<![A-Z0-9])TCGA[-_]([A-Z0-9]+)[-_]([A-Z0-9]+)(?![A-Z0-9])", re.IGNORECASE)


def patient_of(name: str) -> str:
    """Return the patient, the first three fields of the TCGA barcode in a name, or the name itself."""
    barcode = _BARCODE.search(name)
    return name if barcode is None else f"TCGA-{barcode[1]}-{barcode[2]}".upper()


def _is_part(folder: Path, images: Sequence[str] = _IMAGES) -> bool:
    """Return whether the folder holds images, in a folder of one of the names, or annotations."""
    return child(folder, *images, _OUTLINES) is not None or bool(files(folder, [".xml"]))


def _parts(root: Path) -> tuple[list[Path], list[Path]]:
    """List the folders that are pooled: `root`, or in it the training and the test folder, or both.

    Folders that only resemble the download count where nothing of the download itself is there, since people
    put what they derive beside it; otherwise they are the second list.
    """
    apart = {folder_key(name) for name in (*_IMAGES, _OUTLINES, *MASKS)}
    inside = {
        name: part
        for each in folders(root)
        if (name := folder_key(each.name)) not in apart and (part := level(each, _is_part))
    }
    named = [part for name, part in inside.items() if name.startswith("monuseg")]
    alike = [part for name, part in inside.items() if _PART.search(name)]
    official = [root, *named] if _is_part(root, [_TISSUE]) else named
    parts = official or ([root] if _is_part(root) else alike)
    return parts, [part for part in alike if part not in parts]


def _apart(folder: Path, problems: list[str]) -> list[SegmentationSample]:
    """Pair a folder of images with a folder of polygons or, without those, of masks."""
    tissue, outlines, masks = (child(folder, *names) for names in (_IMAGES, (_OUTLINES,), MASKS))
    if tissue is None or (outlines is None and masks is None):
        missing = "no folder Tissue Images" if tissue is None else "no folder Annotations and no folder masks"
        raise layout_error(folder, "MoNuSeg", _LAYOUT, missing)
    truth: dict[str, Path] = {}
    if outlines is not None:
        truth = listed(outlines, problems, [".xml"]) or listed(outlines, problems)
    if masks is not None and not truth:
        truth = listed(masks, problems)
    return paired(listed(tissue, problems), truth, patient_of, problems)


def find(root: str | Path, on_problem: str = "refuse") -> FoundSamples:
    """Find the images with their polygons, training before test, and read each pair once.

    Args:
        root: the folder that contains the two of the download, one of these two, or one around them.
        on_problem: "refuse" or "skip", see `Find`.

    Raises:
        ValueError: `on_problem` is unknown, `root` has another layout, no image is usable, or there
            are problems and `on_problem` is "refuse".
    """
    root = data_folder(root, on_problem)

    def holds(folder: Path) -> bool:
        return bool(_parts(folder)[0])

    inner = level(root, holds)
    if inner is None:
        missing = "no folder Tissue Images, no folder Annotations and no XML file"
        raise layout_error(root, "MoNuSeg", _LAYOUT, missing, holds)
    parts, others = _parts(inner)
    samples: list[SegmentationSample] = []
    problems: list[str] = []
    for part in parts:
        together = by_name(files(part, [".xml"]), problems)
        if together:
            samples += paired(by_name(files(part), problems), together, patient_of, problems)
        if child(part, *_IMAGES, _OUTLINES) is not None:
            samples += _apart(part, problems)
    absent = [
        f"{part} is not read, since {inner} holds parts with the names of the download" for part in others
    ]
    return checked(inner, samples, problems, on_problem, absent=absent)


__all__ = ["find", "patient_of"]
