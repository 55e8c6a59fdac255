"""`fdkernels prepare`: pairs in the US-TNBC form from DICOM files and drawn masks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def prepare(
    dicom: Annotated[Path, typer.Option(help="Folder of DICOM files, with its subfolders.")],
    masks: Annotated[
        Path, typer.Option(help="Folder of PNG or TIFF masks, STEM.png or STEM_frameN.png, N from 1.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to make; it gets images/ and masks/.")],
    crop: Annotated[
        str | None,
        typer.Option(
            help="x0,y0,x1,y1 in pixels, x1 and y1 not included.", show_default="the ultrasound region"
        ),
    ] = None,
    mask_polarity: Annotated[
        str,
        typer.Option(
            help="How the lesion is drawn: dark, light, or auto: unlike the mask's outermost pixels."
        ),
    ] = "auto",
    annotations: Annotated[
        str,
        typer.Option(
            help="What leaves a frame out: tag (Burned In Annotation is YES), pixels (colours or thin bright "
            "strokes inside the crop), both or none."
        ),
    ] = "both",
    force: Annotated[
        list[str] | None,
        typer.Option(help="STEM or STEM_frameN to take whatever is burnt in; can be given again."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="STEM or STEM_frameN to leave out; can be given again.")
    ] = None,
    on_problem: Annotated[
        str, typer.Option(help="When something cannot be used: refuse the run, or skip it.")
    ] = "refuse",
    group_by: Annotated[
        str,
        typer.Option(
            help="Whose pictures share the first part of the name: those of a patient-id or a file."
        ),
    ] = "patient-id",
    hash_key: Annotated[
        Path | None,
        typer.Option(help="File of a secret to hash names with.", show_default="running numbers"),
    ] = None,
    mapping: Annotated[
        Path | None,
        typer.Option(
            help="CSV file, outside the output, to note where each pair came from.", show_default="none"
        ),
    ] = None,
) -> None:
    """Make anonymous image and mask pairs (us-tnbc) from DICOM files and drawn masks."""
    from fdkernels.segmentation.data.prepare import PrepareOptions, parse_crop
    from fdkernels.segmentation.data.prepare import prepare as run

    choices: dict[str, Any] = {
        "mask_polarity": mask_polarity,
        "annotations": annotations,
        "on_problem": on_problem,
        "group_by": group_by,
    }
    options = PrepareOptions(
        crop=None if crop is None else parse_crop(crop),
        force=frozenset(force or ()),
        exclude=frozenset(exclude or ()),
        hash_key=None if hash_key is None else hash_key.read_bytes(),
        **choices,
    )
    report = run(dicom, masks, output, options, mapping)
    pairs = "1 pair" if report.pairs == 1 else f"{report.pairs} pairs"
    print(f"{output} holds {pairs}" + (", as before." if report.unchanged else "."))
    for title, lines in (("Left out", report.left_out), ("Skipped", report.problems)):
        if lines:
            print(f"{title}:")
        for line in lines:
            print(f"  {line}")
    print("Look at every picture before you share it: no rule sees all that may be burnt in.")


__all__ = ["prepare"]
