"""Scan data folders: list files, validate every sample found."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fdkernels.segmentation.data.names import is_utf8, natural, patient_key, printable
from fdkernels.segmentation.data.reading import SAID_BITS, load_pair
from fdkernels.segmentation.data.samples import FoundSamples, SegmentationSample

PICTURES = frozenset({".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg"})
ON_PROBLEM = ("refuse", "skip")
_FOREIGN = frozenset({"__MACOSX", "@eaDir"})  # folders with copies or thumbnails of the files beside them
_TO_SKIP = "Fix them, or skip them with --on-problem skip."


def data_folder(root: str | Path, on_problem: str) -> Path:
    """Validate the arguments of a scan and return `root` as a path.

    Raises:
        ValueError: `root` is not a folder, or has a name that UTF-8 cannot hold, or `on_problem` is
            neither "refuse" nor "skip".
    """
    if on_problem not in ON_PROBLEM:
        raise ValueError(f'on_problem must be "refuse" or "skip", got {on_problem!r}')
    root = Path(root)
    if not root.is_dir():
        raise ValueError(printable(f"data must be a folder, got {root}, which is not one"))
    if not is_utf8(root):
        raise ValueError(printable(f"data must be a folder whose name UTF-8 can hold, got {root}; rename it"))
    return root


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """List what lies in a folder in natural order, without hidden entries and those of unpackers and servers.

    Raises:
        ValueError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as inside:
            seen = [
                entry for entry in inside if not entry.name.startswith(".") and entry.name not in _FOREIGN
            ]
    except OSError as error:
        raise ValueError(printable(f"{folder} cannot be read: {error.strerror}")) from error
    return sorted(seen, key=lambda entry: natural(entry.name))


def folders(folder: Path) -> list[Path]:
    """List the subfolders of a folder in natural order, without hidden ones."""
    return [folder / entry.name for entry in _entries(folder) if entry.is_dir()]


def files(folder: Path, suffixes: Iterable[str] = PICTURES) -> list[Path]:
    """List the files of a folder with one of the suffixes, in natural order.

    Skips hidden files, which some systems create. Returns no files for a missing folder.
    """
    if not folder.is_dir():
        return []
    wanted = frozenset(suffixes)
    paths = (folder / entry.name for entry in _entries(folder) if entry.is_file())
    return [path for path in paths if path.suffix.lower() in wanted]


def _defects(
    sample: SegmentationSample,
    seen: dict[bytes, Path],
    may_be_empty: Callable[[SegmentationSample], bool],
    size: tuple[int, int] | None,
    found: Counter[str],
) -> list[str]:
    """Describe in sentences what makes a sample unusable, and count what is `found` in the others.

    Decodes the files completely: only this detects a truncated file before the first epoch.
    """
    if unspeakable := [path for path in (sample.image, *sample.masks) if not is_utf8(path)]:
        return [
            f"{unspeakable[0]} has a name that UTF-8 cannot hold, so scores could not be written; rename it"
        ]
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
        found["foreground"] += mask.getbbox() is not None
        found[str(image.info.get(SAID_BITS, 8))] += 1
    return defects


def _depth_notes(root: Path, found: Counter[str]) -> tuple[str, ...]:
    """Say how images are scaled that use some of their 16 bits."""
    return tuple(
        f"{root} has {found[str(bits)]} images that use {bits} of 16 bits, as their files say; they are "
        f"scaled by 255/{2**bits - 1}"
        for bits in range(9, 16)
        if found[str(bits)]
    )


def raise_problems(root: Path, problems: Sequence[str], way_out: str = "") -> None:
    """Raise one ValueError that lists `problems`, if there are any, and ends with the way out."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"{root} cannot be used, {count}:", *(f"  {problem}" for problem in problems)]
        raise ValueError(printable("\n".join([*lines, way_out] if way_out else lines)))


def _one_spelling(samples: Sequence[SegmentationSample]) -> tuple[SegmentationSample, ...]:
    """Give each patient one name, the first: a split would take 1 and 01 for two (`names.patient_key`)."""
    first: dict[str, str] = {}
    return tuple(
        dataclasses.replace(sample, patient=first.setdefault(patient_key(sample.patient), sample.patient))
        for sample in samples
    )


def checked(
    root: Path,
    samples: Sequence[SegmentationSample],
    problems: Sequence[str],
    on_problem: str,
    *,
    may_be_empty: Callable[[SegmentationSample], bool] = lambda sample: False,
    size: tuple[int, int] | None = None,
    absent: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> FoundSamples:
    """Read every sample once and return the usable ones; refuse or skip the others.

    A sample is unusable if a file cannot be read or has a name that UTF-8 cannot hold, if a mask differs
    from the image in size, if the mask is empty and `may_be_empty` does not allow that, or if an earlier
    image has the same pixels, whatever its name and format: a split could put one into training and the
    other into the test. Patients whose names differ only in case, Unicode form and leading zeros are one.

    Args:
        root: the folder to name in messages.
        samples: the samples found, in order; of duplicates the first is kept.
        problems: problems found while scanning for files.
        on_problem: "refuse" raises on any problem, "skip" drops the affected samples.
        may_be_empty: whether a sample without foreground is valid.
        size: required width and height of every image in pixels; None for any.
        absent, notes: what to say of parts of the data set that are not there, and besides; see
            `FoundSamples`.

    Raises:
        ValueError: there are problems and `on_problem` is "refuse" (the message lists all of them),
            no sample is usable, or no mask holds the values that are named as foreground.
    """
    seen: dict[bytes, Path] = {}
    found: Counter[str] = Counter()
    problems, usable = list(problems), []
    for sample in samples:
        defects = _defects(sample, seen, may_be_empty, size, found)
        problems.extend(defects)
        if not defects:
            usable.append(sample)
    if on_problem == "refuse" or not usable:
        raise_problems(root, problems, _TO_SKIP if usable else "")
    if not usable:
        raise ValueError(printable(f"{root} contains no usable image"))
    named = usable[0].rules.mask_values
    if named is not None and not found["foreground"]:
        raise ValueError(
            printable(f"mask_values must be values of the masks in {root}, got {named}, which none has")
        )
    skipped = tuple(map(printable, (*absent, *problems)))
    notes = (*notes, *_depth_notes(root, found))
    return FoundSamples(_one_spelling(usable), skipped, tuple(map(printable, notes)))


__all__ = [
    "ON_PROBLEM",
    "PICTURES",
    "checked",
    "data_folder",
    "files",
    "folders",
    "natural",
    "raise_problems",
]
