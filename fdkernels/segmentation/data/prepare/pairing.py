"""Which mask belongs to which frame of which DICOM file, by the names of the files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fdkernels.segmentation.data.scan import natural

_DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".dic", ".ima"})
_MASK_SUFFIXES = frozenset({".png", ".tif", ".tiff"})
_FRAME = re.compile(r"(?P<stem>.+)_frame(?P<frame>\d+)")


@dataclass
class Recording:
    """One DICOM file and the masks drawn on its frames.

    Attributes:
        stem: the file's name without a DICOM suffix.
        path: the file.
        masks: by frame, counted from 1; frame None stands for the only one.
    """

    stem: str
    path: Path
    masks: dict[int | None, Path] = field(default_factory=dict)


def frame_name(stem: str, frame: int | None) -> str:
    """What reports and options call a frame: STEM_frameN, or STEM for the only one."""
    return stem if frame is None else f"{stem}_frame{frame}"


def pair(dicom: Path, masks: Path) -> tuple[list[Recording], list[str]]:
    """The DICOM files with their masks, in the order of their names, and what belongs to none.

    Both folders are searched with their subfolders. A mask is called as its file (US7.dcm and
    US7.png) or, with the number of the frame counted from 1, US7_frame3.png. Hidden files and the
    index DICOMDIR are passed over. Masks may lie in the DICOM folder itself.

    Raises:
        ValueError: one of the folders is none.
    """
    for name, folder in (("dicom", dicom), ("masks", masks)):
        if not folder.is_dir():
            raise ValueError(f"{name} must be a folder, got {folder}, which is none")
    mask_files = _files(masks)
    dicom_files = [file for file in _files(dicom) if file not in set(mask_files)]
    if dicom.resolve() == masks.resolve():
        dicom_files = [file for file in mask_files if file.suffix.lower() not in _MASK_SUFFIXES]
        mask_files = [file for file in mask_files if file.suffix.lower() in _MASK_SUFFIXES]
    problems: list[str] = []
    recordings: dict[str, Recording] = {}
    for file in dicom_files:
        stem = file.stem if file.suffix.lower() in _DICOM_SUFFIXES else file.name
        if not _is_dicom(file):
            problems.append(f"{file} is not a DICOM file")
        elif stem in recordings:
            problems.append(
                f"{file} has the name of {recordings[stem].path}, so masks cannot tell them apart"
            )
        else:
            recordings[stem] = Recording(stem, file)
    for file in mask_files:
        problem = _assign(file, recordings)
        if problem:
            problems.append(problem)
    return list(recordings.values()), problems


def _assign(file: Path, recordings: dict[str, Recording]) -> str | None:
    """Gives the mask to its recording; what is wrong where there is none, or another mask."""
    if file.suffix.lower() not in _MASK_SUFFIXES:
        return f"{file} is not a PNG or TIFF file"
    stem, frame = file.stem, None
    match = _FRAME.fullmatch(stem)
    if stem not in recordings and match:
        stem, frame = match["stem"], int(match["frame"])
    if stem not in recordings:
        return f"{file} has no DICOM file of the name {stem}"
    earlier = recordings[stem].masks.setdefault(frame, file)
    return None if earlier is file else f"{file} is a second mask beside {earlier}"


def _files(folder: Path) -> list[Path]:
    """All files under the folder, in the order of their names, without hidden ones and DICOMDIR."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in _visible(names)]
    return sorted(found, key=lambda file: (natural(file.name), str(file)))


def _visible(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith(".") and name.upper() != "DICOMDIR"]


def _is_dicom(file: Path) -> bool:
    """Whether the four letters stand where part 10 of the standard puts them."""
    with file.open("rb") as content:
        return content.read(132)[128:] == b"DICM"


__all__ = ["Recording", "frame_name", "pair"]
