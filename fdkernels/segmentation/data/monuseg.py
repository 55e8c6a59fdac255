"""MoNuSeg 2018 (Kumar et al.): nuclei of several organs, outlined in Aperio ImageScope.

    MoNuSeg 2018 Training Data/
        Tissue Images/NAME.tif      image, 1000x1000, RGB
        Annotations/NAME.xml        one polygon a nucleus
    MoNuSegTestData/
        NAME.tif  NAME.xml          the same, in one folder

Both, one of them, or the content of either in the folder itself. NAME is a TCGA barcode, of which
the first three fields are the patient: TCGA-A7-A13E-01Z-00-DX1 is of TCGA-A7-A13E.

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
    """The patient in a TCGA barcode, its first three fields; a name that is none is its own patient."""
    barcode = _BARCODE.match(name)
    return name if barcode is None else barcode[0]


def _pairs_of_folders(root: Path) -> list[tuple[Path, Path]]:
    """The folders of images and of polygons that there are."""
    apart = [(base / _IMAGES, base / _MASKS) for base in (root, root / _TRAINING)]
    together = [(base, base) for base in (root, root / _TEST)]
    return [pair for pair in apart if pair[0].is_dir() or pair[1].is_dir()] + [
        pair for pair in together if files(pair[1], [".xml"])
    ]


def find(root: str | Path, on_problem: str = "refuse") -> FoundSamples:
    """Every image of the folder with its polygons, training before test, each read once.

    Args:
        root: the folder around the two of the download, or one of them.
        on_problem: "refuse" or "skip", as in `DatasetPreset`.

    Raises:
        ValueError: `root` is no such folder; or there are problems and they are refused.
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
