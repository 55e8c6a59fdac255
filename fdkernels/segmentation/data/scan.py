"""Scan data folders: list and pair files, validate every sample found."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from fdkernels.segmentation.data.reading import load_pair
from fdkernels.segmentation.data.samples import FoundSamples, SegmentationSample

_PICTURES = frozenset({".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg"})
ON_PROBLEM = ("refuse", "skip")


def natural(text: str) -> list[tuple[int, str]]:
    """Return a natural sort key: 01_2 comes before 01_10."""
    parts = [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]
    return [*parts, (-2, text)]  # breaks the tie between 1 and 01


def data_folder(root: str | Path, on_problem: str) -> Path:
    """Validate the arguments of a scan and return `root` as a path.

    Raises:
        ValueError: `root` is not a folder, or `on_problem` is neither "refuse" nor "skip".
    """
    if on_problem not in ON_PROBLEM:
        raise ValueError(f'on_problem must be "refuse" or "skip", got {on_problem!r}')
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"data must be a folder, got {root}, which is not one")
    return root


def inner_folder(root: Path, outer: str, holds: Callable[[Path], bool]) -> Path | None:
    """Return the first of `root` and `root / outer` (the download's) that `holds` the data, or None."""
    return next((folder for folder in (root, root / outer) if folder.is_dir() and holds(folder)), None)


def layout_error(root: Path, title: str, layout: str, missing: str) -> ValueError:
    """Return the error for a folder with another layout; `missing` names what was not found in it."""
    return ValueError(
        f"data must be a folder in the {title} layout ({layout}), got {root}, which contains {missing}"
    )


def folders(folder: Path) -> list[Path]:
    """List the subfolders of a folder in natural order, without hidden ones."""
    inside = (entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return sorted(inside, key=lambda entry: natural(entry.name))


def files(folder: Path, suffixes: Iterable[str] = _PICTURES) -> list[Path]:
    """List the files of a folder with one of the suffixes, in natural order.

    Skips hidden files, which some systems create. Returns no files for a missing folder.
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
    """Index the files by name without prefix and suffix; report duplicate names in `problems`."""
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
    """Pair images and masks of the same name; report those without a partner.

    Args:
        images, masks: files by name.
        patient: the patient of all of them, or a function from name to patient.
        problems: list to which one sentence is appended per file without a partner.
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
    """Describe in sentences what makes a sample unusable.

    Decodes the files completely: only this detects a truncated file before the first epoch.
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
        defects.append(f"{sample.image} has the same pixels as {seen[pixels]}")
    elif not defects:
        seen[pixels] = sample.image
    return defects


def raise_problems(root: Path, problems: Sequence[str]) -> None:
    """Raise one ValueError that lists `problems`, if there are any."""
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
    """Read every sample once and return the usable ones; refuse or skip the others.

    A sample is unusable if a file cannot be read, if a mask differs from the image in size, if the
    mask is empty and `may_be_empty` does not allow that, or if an earlier image has the same pixels,
    whatever its name and format: a split could put one into training and the other into the test.

    Args:
        root: the folder to name in messages.
        samples: the samples found, in order; of duplicates the first is kept.
        problems: problems found while scanning for files.
        on_problem: "refuse" raises on any problem, "skip" drops the affected samples.
        may_be_empty: whether a sample without foreground is valid.
        size: required width and height of every image in pixels; None for any.

    Raises:
        ValueError: there are problems and `on_problem` is "refuse" (the message lists all of them),
            or no sample is usable.
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
        raise ValueError(f"{root} contains no usable image")
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
