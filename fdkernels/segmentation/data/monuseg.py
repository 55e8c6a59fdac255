"""MoNuSeg 2018 (Kumar et al.): nuclei of several organs, outlined in Aperio ImageScope.

    MoNuSeg 2018 Training Data/
        Tissue Images/NAME.tif      image, 1000x1000, RGB
        Annotations/NAME.xml        one polygon per nucleus
    MoNuSegTestData/
        NAME.tif  NAME.xml          the same, in one folder

The given folder contains both folders, one of them, or the content of either. NAME is a TCGA barcode; its
first three fields are the patient: TCGA-A7-A13E-01Z-00-DX1 belongs to TCGA-A7-A13E.

References:
    Kumar et al.: "A Dataset and a Technique for Generalized Nuclear Segmentation for
    Computational Pathology", IEEE TMI 36(7), 2017, doi:10.1109/TMI.2017.2677499.
    Kumar et al.: "A Multi-Organ Nucleus Segmentation Challenge", IEEE TMI 39(5), 2020,
    doi:10.1109/TMI.2019.2947628.
"""

from __future__ import annotations

import re
from pathlib import Path

from fdkernels.segmentation.data.samples import FoundSamples, SegmentationSample
from fdkernels.segmentation.data.scan import by_name, checked, data_folder, files, layout_error, paired

_TRAINING, _TEST = "MoNuSeg 2018 Training Data", "MoNuSegTestData"
_IMAGES, _MASKS = "Tissue Images", "Annotations"
_BARCODE = re.compile(r"TCGA-[^-]+-[^-]+(?=-|$)")


def patient_of(name: str) -> str:
    """Return the patient, the first three fields of a TCGA barcode, or the name itself if it is not one."""
    barcode = _BARCODE.match(name)
    return name if barcode is None else barcode[0]


def _pairs_of_folders(root: Path) -> list[tuple[Path, Path]]:
    """List the existing pairs of a folder of images and a folder of polygons."""
    apart = [(base / _IMAGES, base / _MASKS) for base in (root, root / _TRAINING)]
    together = [(base, base) for base in (root, root / _TEST)]
    return [pair for pair in apart if pair[0].is_dir() or pair[1].is_dir()] + [
        pair for pair in together if files(pair[1], [".xml"])
    ]


def find(root: str | Path, on_problem: str = "refuse") -> FoundSamples:
    """Find the images with their polygons, training before test, and read each pair once.

    Args:
        root: the folder that contains the two of the download, or one of these two.
        on_problem: "refuse" or "skip", see `Find`.

    Raises:
        ValueError: `on_problem` is unknown, `root` has another layout, no image is usable, or there
            are problems and `on_problem` is "refuse".
    """
    root = data_folder(root, on_problem)
    pairs = _pairs_of_folders(root)
    if not pairs:
        raise layout_error(
            root,
            "MoNuSeg",
            "Tissue Images/NAME.tif and Annotations/NAME.xml, or NAME.tif and NAME.xml in one folder",
            "neither of them",
        )
    samples: list[SegmentationSample] = []
    problems: list[str] = []
    for images, masks in pairs:
        tissue = by_name(files(images), problems)
        outlines = by_name(files(masks, [".xml"]), problems)
        samples += paired(tissue, outlines, patient_of, problems)
    return checked(root, samples, problems, on_problem)


__all__ = ["find", "patient_of"]
