"""Pair masks with frames of DICOM files by file name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fdkernels.segmentation.data.names import composed, is_utf8, natural, printable

_DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".dic", ".ima"})
_MASK_SUFFIXES = frozenset({".png", ".tif", ".tiff"})
_FRAME = re.compile(r"(?P<stem>.+)_frame(?P<frame>\d+)")


@dataclass
class Recording:
    """One DICOM file and the masks of its frames.

    Attributes:
        stem: file name without DICOM suffix, in Unicode's composed form.
        path: the file.
        masks: mask files by frame number, counted from 1; the key None is the only frame of a file.
    """

    stem: str
    path: Path
    masks: dict[int | None, Path] = field(default_factory=dict)


def frame_name(stem: str, frame: int | None) -> str:
    """Return the name of a frame in reports and options: STEM_frameN, or STEM if it is the only one."""
    return stem if frame is None else f"{stem}_frame{frame}"


def pair(dicom: Path, masks: Path) -> tuple[list[Recording], list[str]]:
    """Pair the DICOM files with their masks; return them sorted by name, and a list of problems.

    Searches both folders recursively; both may be the same. A mask has the name of its DICOM file
    (US7.dcm and US7.png), with the frame number, counted from 1, if there are several (US7_frame3.png).
    Skips hidden files and the index DICOMDIR.

    Raises:
        ValueError: `dicom` or `masks` is not a folder.
    """
    for name, folder in (("dicom", dicom), ("masks", masks)):
        if not folder.is_dir():
            raise ValueError(f"{name} must be a folder, got {folder}, which is not one")
    mask_files = _files(masks)
    dicom_files = [file for file in _files(dicom) if file not in set(mask_files)]
    if dicom.resolve() == masks.resolve():
        dicom_files = [file for file in mask_files if file.suffix.lower() not in _MASK_SUFFIXES]
        mask_files = [file for file in mask_files if file.suffix.lower() in _MASK_SUFFIXES]
    problems = [
        printable(f"{file} has a name that UTF-8 cannot hold; rename it")
        for file in (*dicom_files, *mask_files)
        if not is_utf8(file)
    ]
    recordings: dict[str, Recording] = {}
    for file in filter(is_utf8, dicom_files):
        stem = composed(file.stem if file.suffix.lower() in _DICOM_SUFFIXES else file.name)
        if not _is_dicom(file):
            problems.append(f"{file} is not a DICOM file")
        elif stem in recordings:
            problems.append(
                f"{file} has the same name as {recordings[stem].path}, so masks cannot be matched"
            )
        else:
            recordings[stem] = Recording(stem, file)
    for file in filter(is_utf8, mask_files):
        problem = _assign(file, recordings)
        if problem:
            problems.append(problem)
    return list(recordings.values()), problems


def _assign(file: Path, recordings: dict[str, Recording]) -> str | None:
    """Assign the mask to its recording; return a sentence if there is none or it has a mask already."""
    if file.suffix.lower() not in _MASK_SUFFIXES:
        return f"{file} is not a PNG or TIFF file"
    stem, frame = composed(file.stem), None
    match = _FRAME.fullmatch(stem)
    if stem not in recordings and match:
        stem, frame = match["stem"], int(match["frame"])
    if stem not in recordings:
        return f"{file} has no DICOM file named {stem}"
    earlier = recordings[stem].masks.setdefault(frame, file)
    return None if earlier is file else f"{file} is a second mask of the same frame as {earlier}"


def _files(folder: Path) -> list[Path]:
    """List all files under the folder in natural order, without hidden ones and DICOMDIR."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in _visible(names)]
    return sorted(found, key=lambda file: (natural(file.name), str(file)))


def _visible(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith(".") and name.upper() != "DICOMDIR"]


def _is_dicom(file: Path) -> bool:
    """Return whether the file has the magic number of DICOM part 10, "DICM" at byte 128."""
    with file.open("rb") as content:
        return content.read(132)[128:] == b"DICM"


__all__ = ["Recording", "frame_name", "pair"]
