"""Pair masks with frames of DICOM files by file name."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from fdkernels.segmentation.data.names import composed, is_utf8, natural, printable

_DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".dic", ".ima"})
_MASK_SUFFIXES = frozenset({".png", ".tif", ".tiff"})

# What systems, archives and viewers leave beside the data, by name and by ending; none of it is an image.
_STRAY_NAMES = frozenset(
    {"thumbs.db", "ehthumbs.db", "desktop.ini", "autorun.inf", "readme", "license", "lockfile", "version"}
)
_STRAY_SUFFIXES = frozenset(
    {".txt", ".md", ".rtf", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".csv", ".htm", ".html", ".css", ".js"}
    | {".exe", ".dll", ".com", ".bat", ".cmd", ".sh", ".jar", ".app", ".msi", ".lnk", ".url", ".ico"}
    | {".ini", ".inf", ".cfg", ".log", ".db", ".bak", ".tmp"}
)
# Pictures and settings of a viewer, and previews, are no DICOM files; among the masks they would be wrong.
_STRAY_IN_DICOM = frozenset(
    {".xml", ".json", ".xsl", ".chm", ".hlp", ".ttf", ".cab", ".manifest", ".so", ".dylib", ".dat", ".bin"}
    | {".jpg", ".jpeg", ".gif", ".bmp", ".svg"}
)
_STRAY_FOLDERS = frozenset({"__macosx", "$recycle.bin", "system volume information"})
_NAMED = 5  # stray files that a message names

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


@dataclass
class Found:
    """What lies in the two folders.

    Attributes:
        recordings: DICOM files with their masks, sorted by name.
        problems: one sentence per file that cannot be used.
        passed_over: names of the files that are no data.
    """

    recordings: list[Recording] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)

    def note(self) -> str | None:
        """Say in one line what was passed over; None if nothing was."""
        names = self.passed_over
        if not names:
            return None
        shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
        return f"{'1 file that is' if len(names) == 1 else f'{len(names)} files that are'} no image: {shown}"


def pair(dicom: Path, masks: Path) -> Found:
    """Pair the DICOM files with their masks.

    Searches both folders recursively; both may be the same. A mask has the name of its DICOM file
    (US7.dcm and US7.png), with the frame number, counted from 1, if there are several (US7_frame3.png).
    A DICOM file is known by its content and needs no suffix. Skips hidden files and the index DICOMDIR;
    passes over what is no data by its name, such as Thumbs.db, README.txt and a viewer's program.

    Raises:
        ValueError: `dicom` or `masks` is not a folder.
    """
    for name, folder in (("dicom", dicom), ("masks", masks)):
        if not folder.is_dir():
            raise ValueError(f"{name} must be a folder, got {folder}, which is not one")
    found = Found()
    mask_files = _files(masks, found.problems)
    of_masks = set(mask_files)
    dicom_files = [file for file in _files(dicom, found.problems) if file not in of_masks]
    if dicom.resolve() == masks.resolve():
        dicom_files = [file for file in mask_files if file.suffix.lower() not in _MASK_SUFFIXES]
        mask_files = [file for file in mask_files if file.suffix.lower() in _MASK_SUFFIXES]
    found.problems = list(dict.fromkeys(found.problems))  # one folder may be inside the other
    recordings: dict[str, Recording] = {}
    for file in dicom_files:
        stem = composed(file.stem if file.suffix.lower() in _DICOM_SUFFIXES else file.name)
        if not _is_dicom(file):
            if _is_stray(file) or file.suffix.lower() in _STRAY_IN_DICOM:
                found.passed_over.append(file.name)
            else:
                found.problems.append(f"{file} is not a DICOM file")
        elif stem in recordings:
            found.problems.append(
                f"{file} has the same name as {recordings[stem].path}, so masks cannot be matched"
            )
        else:
            recordings[stem] = Recording(stem, file)
    for file in mask_files:
        if _is_stray(file):
            found.passed_over.append(file.name)
        elif problem := _assign(file, recordings):
            found.problems.append(problem)
    found.recordings = list(recordings.values())
    return found


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


def _files(folder: Path, problems: list[str]) -> list[Path]:
    """List all files under the folder in natural order, without hidden ones and DICOMDIR.

    A name that UTF-8 cannot hold, from another system's character set, goes to `problems`: neither the
    mapping nor a message could name it.
    """
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if _is_visible(name) and name.lower() not in _STRAY_FOLDERS]
        for file in (Path(parent, name) for name in names if _is_visible(name)):
            if is_utf8(file):
                found.append(file)
            else:
                problems.append(printable(f"{file} has a name that UTF-8 cannot hold; rename it"))
    return sorted(found, key=lambda file: (natural(file.name), str(file)))


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name.upper().partition(".")[0] != "DICOMDIR"


def _is_stray(file: Path) -> bool:
    return file.name.lower() in _STRAY_NAMES or file.suffix.lower() in _STRAY_SUFFIXES


def _is_dicom(file: Path) -> bool:
    """Return whether the file has the magic number of DICOM part 10, "DICM" at byte 128."""
    with file.open("rb") as content:
        return content.read(132)[128:] == b"DICM"


__all__ = ["Found", "Recording", "frame_name", "pair"]
