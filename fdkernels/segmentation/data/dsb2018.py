"""2018 Data Science Bowl (Caicedo et al. 2019): nuclei in fluorescence and in stained tissue.

    stage1_train/ID/images/ID.png   image, any size, RGBA
    stage1_train/ID/masks/*.png     one mask per nucleus; the foreground is their union

The ID folders may be in the given folder or in its subfolder `stage1_train`, or in a folder for each kind of
image. Copies with images/ID.png and one mask masks/0/ID.png are read as well. Patients are not given, so each
image counts as its own patient.

References:
    Caicedo et al.: "Nucleus segmentation across imaging experiments: the 2018 Data Science Bowl",
    Nature Methods 16, 2019, doi:10.1038/s41592-019-0612-7; set BBBC038v1 of the Broad Bioimage
    Benchmark Collection.
"""

from __future__ import annotations

from pathlib import Path

from fdkernels.segmentation.data.layout import layout_error, level, roles
from fdkernels.segmentation.data.names import composed
from fdkernels.segmentation.data.pairs import listed, paired
from fdkernels.segmentation.data.samples import FoundSamples, SegmentationSample
from fdkernels.segmentation.data.scan import checked, data_folder, files, folders

_OUTER, _IMAGES, _MASKS = "stage1_train", "images", "masks"


def _ids(root: Path) -> list[Path]:
    return [folder for folder in folders(root) if roles(folder) != (None, None)]


def _kinds(folder: Path) -> list[Path]:
    """List the ID folders of a folder that holds nothing but folders of them, one a kind of image."""
    ids = [_ids(kind) for kind in folders(folder)]
    return [each for kind in ids for each in kind] if all(ids) else []


def _of_ids(ids: list[Path], problems: list[str]) -> list[SegmentationSample]:
    """Collect the images of the ID folders, each with all its masks."""
    samples = []
    for folder in ids:
        there = zip(roles(folder), (_IMAGES, _MASKS), strict=True)
        images, masks = (found or folder / name for found, name in there)
        found = files(images)
        drawn = files(masks)
        if len(found) != 1:
            problems.append(f"{images} must contain one image, got {len(found)}")
        elif not drawn:
            problems.append(f"{found[0]} has no mask")
        else:
            samples.append(SegmentationSample(found[0], tuple(drawn), composed(folder.name)))
    return samples


def find(root: str | Path, on_problem: str = "refuse") -> FoundSamples:
    """Find the images with the masks of their nuclei, sorted by id, and read each sample once.

    Args:
        root: the folder that contains the ID folders, or one around it.
        on_problem: "refuse" or "skip", see `Find`.

    Raises:
        ValueError: `on_problem` is unknown, `root` has another layout, no image is usable, or there
            are problems and `on_problem` is "refuse".
    """
    root = data_folder(root, on_problem)

    def ids(folder: Path) -> bool:
        return bool(_ids(folder))

    inner = (
        level(root, ids, _OUTER)
        or level(root, lambda folder: None not in roles(folder))
        or level(root, lambda folder: bool(_kinds(folder)))
    )
    if inner is None:
        layout = "ID/images/ID.png, ID/masks/*.png"
        raise layout_error(root, "2018 Data Science Bowl", layout, "no id with images", ids)
    problems: list[str] = []
    images, masks = roles(inner)
    if ids(inner) or images is None or masks is None:
        samples = _of_ids(_ids(inner) or _kinds(inner), problems)
    else:
        samples = paired(listed(images, problems), listed(masks, problems), lambda name: name, problems)
    return checked(inner, samples, problems, on_problem)


__all__ = ["find"]
