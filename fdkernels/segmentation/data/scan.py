"""What the loaders share: folders, pairs of files, and the check of everything found."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from fdkernels.segmentation.data.image_io import load_pair
from fdkernels.segmentation.data.samples import FoundSamples, SegmentationSample

_PICTURES = frozenset({".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg"})
ON_PROBLEM = ("refuse", "skip")


def natural(text: str) -> list[tuple[int, str]]:
    """Sorting key under which 01_2 comes before 01_10."""
    parts = [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]
    return [*parts, (-2, text)]  # so that 1 and 01 have an order, too


def data_folder(root: str | Path, on_problem: str) -> Path:
    """`root` as a path, after both arguments of a search were checked.

    Raises:
        ValueError: `root` is no folder, or `on_problem` neither "refuse" nor "skip".
    """
    if on_problem not in ON_PROBLEM:
        raise ValueError(f'on_problem must be "refuse" or "skip", got {on_problem!r}')
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"data must be a folder, got {root}, which is none")
    return root


def inner_folder(root: Path, outer: str, holds: Callable[[Path], bool]) -> Path | None:
    """`root`, or its folder `outer` (the one the download unpacks to), whichever `holds` the data."""
    return next((folder for folder in (root, root / outer) if folder.is_dir() and holds(folder)), None)


def layout_error(root: Path, title: str, layout: str, missing: str) -> ValueError:
    """The error for a folder that is laid out in another way."""
    return ValueError(
        f"data must be a folder in the {title} layout ({layout}), got {root}, which holds {missing}"
    )


def folders(folder: Path) -> list[Path]:
    """The folders in a folder in natural order, without hidden ones."""
    inside = (entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return sorted(inside, key=lambda entry: natural(entry.name))


def files(folder: Path, suffixes: Iterable[str] = _PICTURES) -> list[Path]:
    """The files of a folder that have one of the suffixes, in natural order.

    Hidden files, as some systems leave them, are no part of any data set. A folder that is not
    there has no files.
    """
    if not folder.is_dir():
        return []
    wanted = frozenset(suffixes)
    inside = (
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in wanted and not entry.name.startswith(".") and entry.is_file()
    )
    return sorted(inside, key=lambda entry: natural(entry.name))


def by_name(paths: Iterable[Path], problems: list[str], prefix: str = "") -> dict[str, Path]:
    """The files by name without prefix and suffix; a second one of the same name becomes a problem."""
    named: dict[str, Path] = {}
    for path in paths:
        name = path.stem.removeprefix(prefix)
        if name in named:
            problems.append(f"{path} has the same name as {named[name].name}")
        else:
            named[name] = path
    return named


def paired(
    images: Mapping[str, Path],
    masks: Mapping[str, Path],
    patient: str | Callable[[str], str],
    problems: list[str],
) -> list[SegmentationSample]:
    """Samples of the images and masks of one name; those without a partner become problems.

    Args:
        images, masks: files by the name under which they belong together.
        patient: whose they all are, or a function from that name to the patient.
        problems: where a sentence is added for each file without a partner.
    """
    samples = []
    for name in sorted(images.keys() | masks.keys(), key=natural):
        if name not in masks:
            problems.append(f"{images[name]} has no mask")
        elif name not in images:
            problems.append(f"{masks[name]} has no image")
        else:
            owner = patient if isinstance(patient, str) else patient(name)
            samples.append(SegmentationSample(images[name], (masks[name],), owner))
    return samples


def _defects(
    sample: SegmentationSample,
    seen: dict[bytes, Path],
    may_be_empty: Callable[[SegmentationSample], bool],
    size: tuple[int, int] | None,
) -> list[str]:
    """Sentences on what makes a sample unusable; reads its files whole.

    A truncated file shows only then, and had better show before the first epoch than during it.
    """
    try:
        image, mask = load_pair(sample)
    except ValueError as error:
        return [str(error)]
    defects = []
    if size is not None and image.size != size:
        defects.append(
            f"{sample.image} must have {size[0]}x{size[1]} pixels, got {image.width}x{image.height}"
        )
    if mask.getbbox() is None and not may_be_empty(sample):
        defects.append(f"{sample.image} has a mask without foreground, {sample.masks[0].name}")
    pixels = hashlib.sha256(f"{image.width} {image.height} ".encode() + image.tobytes()).digest()
    if pixels in seen:
        defects.append(f"{sample.image} holds the same pixels as {seen[pixels]}")
    elif not defects:
        seen[pixels] = sample.image
    return defects


def raise_problems(root: Path, problems: Sequence[str]) -> None:
    """Raises one ValueError that lists `problems`, if there are any."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(f"{root} cannot be used, {count}:\n{listed}")


def checked(
    root: Path,
    samples: Sequence[SegmentationSample],
    problems: Sequence[str],
    on_problem: str,
    *,
    may_be_empty: Callable[[SegmentationSample], bool] = lambda sample: False,
    size: tuple[int, int] | None = None,
) -> FoundSamples:
    """The samples after each was read once, with those that cannot be used refused or left out.

    A sample cannot be used if a file is unreadable or masks differ from the image in size; if
    nothing is foreground, unless `may_be_empty` allows that; or if its image has the same pixels as
    one before it, whatever their names and formats: a split could put one into training and the
    other into the test.

    Args:
        root: the folder that the messages are about.
        samples: what was found, in order; of duplicates the first is kept.
        problems: what the search for files has to complain of already.
        on_problem: "refuse" raises on any problem, "skip" leaves out what is affected.
        may_be_empty: whether a sample without foreground is part of the data set.
        size: width and height that every image must have; None for any.

    Raises:
        ValueError: there are problems and they are refused, all in one list; or nothing is left.
    """
    seen: dict[bytes, Path] = {}
    problems, usable = list(problems), []
    for sample in samples:
        defects = _defects(sample, seen, may_be_empty, size)
        problems.extend(defects)
        if not defects:
            usable.append(sample)
    if on_problem == "refuse" or not usable:
        raise_problems(root, problems)
    if not usable:
        raise ValueError(f"{root} holds no image that can be used")
    return FoundSamples(tuple(usable), tuple(problems))


__all__ = [
    "by_name",
    "checked",
    "data_folder",
    "files",
    "folders",
    "inner_folder",
    "layout_error",
    "natural",
    "paired",
    "raise_problems",
]
