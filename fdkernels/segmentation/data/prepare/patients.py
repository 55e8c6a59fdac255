"""Who the patient of a DICOM file is: by a list, by its Patient ID, or asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fdkernels.segmentation.data.prepare.pairing import Recording
from fdkernels.segmentation.data.tables import read_table

_COLUMNS = ("file", "patient")
_NAMED = 5  # files without Patient ID that a message names


def read_patients(path: Path) -> dict[str, str]:
    """Read a CSV file with the columns "file" and "patient": the patient of each DICOM file.

    Columns are separated by commas, semicolons or tabs. A file is named as it is called, with or
    without suffix, or by its path in the folder.

    Raises:
        ValueError: the file cannot be read, has other columns, an empty cell, or two patients of a file.
    """
    try:
        header, rows = read_table(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"patients {path} cannot be read: {error}") from error
    if not set(_COLUMNS) <= set(rows.fieldnames or ()):
        raise ValueError(f"patients {path} must have the columns file and patient, got {header.strip()!r}")
    patients: dict[str, str] = {}
    for row in rows:
        file, patient = ((row[name] or "").strip() for name in _COLUMNS)
        if not file or not patient:
            raise ValueError(f"patients {path} must have a file and a patient in line {rows.line_num}")
        if patients.setdefault(file, patient) != patient:
            raise ValueError(
                f"patients {path} must have one patient for {file}, got {patients[file]} and {patient}"
            )
    return patients


def listed_patients(
    patients: Mapping[str, str], recordings: Sequence[Recording], folder: Path
) -> dict[str, str]:
    """Return the listed patient of each recording by its stem.

    Raises:
        ValueError: an entry names no DICOM file of the folder: it is a typo.
    """
    found: dict[str, str] = {}
    unknown = dict.fromkeys(patients)
    for recording in recordings:
        path = recording.path
        for name in (recording.stem, path.name, path.relative_to(folder).as_posix()):
            if name in patients:
                found[recording.stem] = patients[name]
                unknown.pop(name, None)
    if unknown:
        raise ValueError(f"patients must name DICOM files of {folder}, got {next(iter(unknown))!r}")
    return found


def missing_id_problem(unnamed: Sequence[str]) -> str:
    """Say that these files have no Patient ID, and ask for it."""
    return (
        f"{_counted(unnamed)} no Patient ID, so that images of one person could fall into several parts of "
        "a split: name the patients with --patients FILE, or, if each file is of another person, set "
        "--without-patient-id separate"
    )


def missing_id_note(unnamed: Sequence[str]) -> str:
    """Say that files without Patient ID count as a patient each."""
    return f"{_counted(unnamed)} no Patient ID: each counts as another patient"


def _counted(unnamed: Sequence[str]) -> str:
    shown = ", ".join(unnamed[:_NAMED]) + (", ..." if len(unnamed) > _NAMED else "")
    return f"{shown} has" if len(unnamed) == 1 else f"{len(unnamed)} files ({shown}) have"


__all__ = ["listed_patients", "missing_id_note", "missing_id_problem", "read_patients"]
