"""Images and masks of one's own.

    images/NAME.png   image, any size
    masks/NAME.png    mask of the same name, or NAME_mask.png
    patients.csv      columns image and patient; optional

The patient of an image is what patients.csv says. Without it, it is in names that `fdkernels prepare` gives,
patientGROUP_IMAGE; an image with any other name counts as its own patient, and a note says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from fdkernels.segmentation.data.layout import layout_error, level, roles
from fdkernels.segmentation.data.names import caseless, composed, printable
from fdkernels.segmentation.data.pairs import listed, paired
from fdkernels.segmentation.data.samples import FoundSamples, SegmentationSample
from fdkernels.segmentation.data.scan import PICTURES, checked, data_folder, files
from fdkernels.segmentation.data.tables import read_table

PATIENTS = "patients.csv"
_COLUMNS = ("image", "patient")
_PREPARED = re.compile(r"(?P<patient>patient[^_]+)_.+")


def patient_of(name: str) -> str:
    """Return the patient from a name given by `fdkernels prepare`, or the name itself if it is another."""
    prepared = _PREPARED.fullmatch(PurePosixPath(name).name)
    return name if prepared is None else prepared["patient"]


def read_patients(path: Path) -> dict[str, str]:
    """Read the patient of each image, by `image_key`, from a CSV file with columns image and patient.

    Columns are separated by comma, semicolon or tab, as the first line shows; others are ignored.

    Raises:
        ValueError: the file is not UTF-8, lacks a column or a value, or gives an image two patients.
    """
    called = printable(str(path))
    try:
        _, rows = read_table(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{called} must be a CSV file in UTF-8: {error}") from error
    if missing := [name for name in _COLUMNS if name not in (rows.fieldnames or ())]:
        raise ValueError(
            f"{called} must have the columns image and patient, got no {' and no '.join(missing)}"
        )
    patients: dict[str, str] = {}
    for row in rows:
        image, patient = (composed(row[name] or "").strip() for name in _COLUMNS)
        if not image and not patient:
            continue
        if not image or not patient:
            raise ValueError(f"{called} must give an image and its patient in line {rows.line_num}")
        if patients.setdefault(image_key(image), patient) != patient:
            raise ValueError(
                f"{called} must give each image one patient, got {patients[image_key(image)]} and {patient} "
                f"for {image}"
            )
    return patients


def image_key(name: str) -> str:
    """Return an image's name without suffix, for any case, Unicode form and separator of folders."""
    path = PureWindowsPath(name)
    return caseless((path.with_suffix("") if path.suffix.lower() in PICTURES else path).as_posix())


def _listed_patients(
    samples: Sequence[SegmentationSample], images: Path, listing: Path, problems: list[str]
) -> list[SegmentationSample]:
    """Give each sample, whose patient is its name, the patient that the listing has; report the others."""
    patients = read_patients(listing)
    known = []
    for sample in samples:
        name = sample.patient
        keys = (image_key(each) for each in (f"{images.name}/{name}", name, PurePosixPath(name).name))
        if patient := next((patients[key] for key in keys if key in patients), None):
            known.append(SegmentationSample(sample.image, sample.masks, patient))
        else:
            problems.append(f"{sample.image} is not in {listing.name}, so its patient is not known")
    return known


def find(root: str | Path, on_problem: str = "refuse", *, title: str = "own-data") -> FoundSamples:
    """Find the images with their masks, in natural order of the names, and read each pair once.

    Args:
        root: the folder that contains images and masks, or one around it.
        on_problem: "refuse" or "skip", see `Find`.
        title: name of the data set in messages.

    Raises:
        ValueError: `on_problem` is unknown, `root` has another layout, patients.csv cannot be used, no
            image is usable, or there are problems and `on_problem` is "refuse".
    """
    root = data_folder(root, on_problem)

    def holds(folder: Path) -> bool:
        return None not in roles(folder)

    inner = level(root, holds)
    images, masks = roles(root if inner is None else inner)
    if inner is None or images is None or masks is None:
        there = {"images": images, "masks": masks}
        missing = " and ".join(f"no folder {name}" for name, folder in there.items() if folder is None)
        raise layout_error(root, title, "images/NAME.png, masks/NAME.png", missing, holds)
    problems: list[str] = []
    samples = paired(listed(images, problems), listed(masks, problems), lambda name: name, problems)
    tables = (path for each in (inner, root) for path in files(each, [".csv"]))
    listing = next((path for path in tables if caseless(path.name) == PATIENTS), None)
    if listing is not None:
        samples = _listed_patients(samples, images, listing, problems)
        return checked(inner, samples, problems, on_problem)
    prepared = [replace(sample, patient=patient_of(sample.patient)) for sample in samples]
    alone = sum(now.patient == before.patient for now, before in zip(prepared, samples, strict=True))
    note = (
        f"{inner} has no {PATIENTS} with the columns image and patient: each of {alone} images counts as a "
        "patient of its own, so images of one person can come into several parts"
    )
    return checked(inner, prepared, problems, on_problem, notes=[note] if alone else ())


__all__ = ["PATIENTS", "find", "image_key", "patient_of", "read_patients"]
