"""2018 Data Science Bowl (Caicedo et al. 2019): nuclei in fluorescence and in stained tissue.

    stage1_train/ID/images/ID.png   image, any size, RGBA
    stage1_train/ID/masks/*.png     one mask per nucleus; the foreground is their union

The ID folders may be in the given folder or in its subfolder `stage1_train`. Patients are not given, so
each image counts as its own patient.

References:
    Caicedo et al.: "Nucleus segmentation across imaging experiments: the 2018 Data Science Bowl",
    Nature Methods 16, 2019, doi:10.1038/s41592-019-0612-7; set BBBC038v1 of the Broad Bioimage
    Benchmark Collection.
"""

from __future__ import annotations

from pathlib import Path

from fdkernels.segmentation.data.samples import FoundSamples, SegmentationSample
from fdkernels.segmentation.data.scan import (
    checked,
    data_folder,
    files,
    folders,
    inner_folder,
    layout_error,
)

_OUTER, _IMAGES, _MASKS = "stage1_train", "images", "masks"


def _ids(root: Path) -> list[Path]:
    return [folder for folder in folders(root) if (folder / _IMAGES).is_dir()]


def find(root: str | Path, on_problem: str = "refuse") -> FoundSamples:
    """Find the images with the masks of their nuclei, sorted by id, and read each sample once.

    Args:
        root: the folder that contains the ID folders, or its parent.
        on_problem: "refuse" or "skip", see `Find`.

    Raises:
        ValueError: `on_problem` is unknown, `root` has another layout, no image is usable, or there
            are problems and `on_problem` is "refuse".
    """
    root = data_folder(root, on_problem)
    inner = inner_folder(root, _OUTER, lambda folder: bool(_ids(folder)))
    if inner is None:
        raise layout_error(
            root, "2018 Data Science Bowl", "ID/images/ID.png, ID/masks/*.png", "no id with images"
        )
    samples: list[SegmentationSample] = []
    problems: list[str] = []
    for folder in _ids(inner):
        images, masks = files(folder / _IMAGES), files(folder / _MASKS)
        if len(images) != 1:
            problems.append(f"{folder / _IMAGES} must contain one image, got {len(images)}")
        elif not masks:
            problems.append(f"{images[0]} has no mask")
        else:
            samples.append(SegmentationSample(images[0], tuple(masks), folder.name))
    return checked(inner, samples, problems, on_problem)


__all__ = ["find"]
