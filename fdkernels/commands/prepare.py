"""`fdkernels prepare`: convert DICOM files and drawn masks to image and mask pairs in the US-TNBC layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def prepare(
    dicom: Annotated[Path, typer.Option(help="Folder of DICOM files, searched recursively.")],
    masks: Annotated[
        Path,
        typer.Option(
            help="Folder of PNG or TIFF masks, searched recursively: STEM.png or STEM_frameN.png, N from 1."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to create, with images/ and masks/.")],
    crop: Annotated[
        str | None,
        typer.Option(
            help="Crop of every frame, x0,y0,x1,y1 in pixels, x1 and y1 exclusive.",
            show_default="the ultrasound region",
        ),
    ] = None,
    mask_polarity: Annotated[
        str,
        typer.Option(
            help="Polarity of the lesion: dark, light, or auto: the opposite of the mask's border pixels."
        ),
    ] = "auto",
    annotations: Annotated[
        str,
        typer.Option(
            help="Exclude annotated frames by tag (Burned In Annotation is YES), pixels (colours or thin "
            "bright strokes inside the crop), both, or none."
        ),
    ] = "both",
    force: Annotated[
        list[str] | None,
        typer.Option(help="STEM or STEM_frameN to keep even if it is annotated; repeatable."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="STEM or STEM_frameN to exclude; repeatable.")
    ] = None,
    on_problem: Annotated[
        str, typer.Option(help="On unusable input: refuse the whole run, or skip that input.")
    ] = "refuse",
    group_by: Annotated[
        str,
        typer.Option(
            help="Images that share the first part of their name: those of one patient-id, or of one file."
        ),
    ] = "patient-id",
    patients: Annotated[
        Path | None,
        typer.Option(
            help="CSV file with the columns file and patient, for DICOM files without Patient ID.",
            show_default="by Patient ID",
        ),
    ] = None,
    without_patient_id: Annotated[
        str,
        typer.Option(help="On files without Patient ID: refuse them, or take each as a separate patient."),
    ] = "refuse",
    outlines: Annotated[
        str,
        typer.Option(help="On masks drawn as outlines: refuse them, fill them, or keep them as rings."),
    ] = "refuse",
    hash_key: Annotated[
        Path | None,
        typer.Option(help="File with the secret key for hashed names.", show_default="running numbers"),
    ] = None,
    mapping: Annotated[
        Path | None,
        typer.Option(
            help="CSV file, outside the output, that maps each pair to its source files.", show_default="none"
        ),
    ] = None,
) -> None:
    """Convert DICOM files and drawn masks to anonymous image and mask pairs (us-tnbc)."""
    from fdkernels.segmentation.data.prepare import PrepareOptions, parse_crop, read_patients
    from fdkernels.segmentation.data.prepare import prepare as run

    choices: dict[str, Any] = {
        "mask_polarity": mask_polarity,
        "annotations": annotations,
        "on_problem": on_problem,
        "group_by": group_by,
        "outlines": outlines,
        "without_patient_id": without_patient_id,
    }
    options = PrepareOptions(
        crop=None if crop is None else parse_crop(crop),
        force=frozenset(force or ()),
        exclude=frozenset(exclude or ()),
        patients={} if patients is None else read_patients(patients),
        hash_key=None if hash_key is None else hash_key.read_bytes(),
        **choices,
    )
    report = run(dicom, masks, output, options, mapping)
    pairs = "1 pair" if report.pairs == 1 else f"{report.pairs} pairs"
    print(f"{output} contains {pairs}" + (", unchanged." if report.unchanged else "."))
    for note in report.notes:
        print(f"{note}.")
    for title, lines in (("Left out", report.left_out), ("Skipped", report.problems)):
        if lines:
            print(f"{title}:")
        for line in lines:
            print(f"  {line}")
    print("Check every image by eye before you share it: no rule detects all burned-in text.")


__all__ = ["prepare"]
