"""Convert folders of DICOM files and drawn masks to a folder of pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fdkernels.segmentation.data.prepare.dicom import DicomFile
from fdkernels.segmentation.data.prepare.drawn_masks import read_drawn_mask
from fdkernels.segmentation.data.prepare.names import PairNames
from fdkernels.segmentation.data.prepare.options import Box, PrepareOptions
from fdkernels.segmentation.data.prepare.outlines import without_outlines
from fdkernels.segmentation.data.prepare.output import MappingRow, OutputFolder
from fdkernels.segmentation.data.prepare.pairing import Recording, frame_name, pair
from fdkernels.segmentation.data.prepare.patients import (
    listed_patients,
    missing_id_note,
    missing_id_problem,
)
from fdkernels.segmentation.data.prepare.screen import annotation, content_box

# Maximum fraction of a lesion outside the crop: hand-drawn masks cross the image border by a few pixels.
_LOST_LESION = 0.01

# Fewer grey levels than 4 bits have are no picture: a wrong scale made it black or white.
_LEAST_LEVELS = 16


@dataclass
class PrepareReport:
    """Result of `prepare`.

    Attributes:
        pairs: number of pairs in the output folder.
        left_out: one sentence per file or frame that was not selected, with the reason.
        problems: one sentence per unusable input.
        notes: one sentence per thing to know: files passed over, outlines filled, missing Patient IDs.
        unchanged: whether the output folder already contained these very pairs.
    """

    pairs: int = 0
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unchanged: bool = False


def prepare(
    dicom: Path,
    masks: Path,
    output: Path,
    options: PrepareOptions | None = None,
    mapping: Path | None = None,
) -> PrepareReport:
    """Write images/NAME.png and masks/NAME.png to `output`, atomically.

    Args:
        dicom: folder of DICOM files, searched recursively.
        masks: folder of PNG and TIFF masks named STEM or STEM_frameN (N from 1), searched recursively.
        output: a folder outside these two that is new, empty, or contains the very same pairs.
        options: the options; None for the defaults.
        mapping: CSV file outside `output` that maps each pair to its source files; None for none.

    Returns:
        The number of pairs, and what was left out or unusable.

    Raises:
        ValueError: input is unusable and `options.on_problem` is "refuse"; no pair is usable; a forced
            or excluded frame does not exist; or `output` or `mapping` is not allowed or has other
            content.
    """
    options = options or PrepareOptions()
    folder = OutputFolder(output, mapping, inputs=(dicom, masks))
    found = pair(dicom, masks)
    _check_chosen(options, found.recordings)
    patients = listed_patients(options.patients, found.recordings, dicom)
    state = _State(patients, several=len(found.recordings) > 1)
    report = PrepareReport(problems=found.problems)
    with folder.writing() as writer:
        names = PairNames(options.hash_key)
        for recording in found.recordings:
            for made in _pairs_of(recording, options, state, report):
                name = names.next(made.group, made.image)
                writer.add(
                    MappingRow(name, recording.path, made.frame, made.mask, made.box),
                    made.picture,
                    made.lesion,
                )
                report.pairs += 1
        _report_state(state, options, report)
        if note := found.note():
            report.notes.append(f"Passed over {note}")
        if report.problems and options.on_problem == "refuse":
            raise ValueError(_refusal(report))
        if not report.pairs:
            listed = "".join(f"\n  {line}" for line in report.left_out + report.problems)
            raise ValueError(f"no pair of {dicom} and {masks} is usable:{listed}")
        report.unchanged = writer.finish()
    return report


@dataclass
class _State:
    """What is remembered from file to file.

    Attributes:
        patients: the listed patient of a file, by its stem.
        several: whether there are several DICOM files, so that patients have to be told apart.
        seen: where pixels were seen before, by their digest.
        unnamed: files with pairs and without Patient ID.
        filled: number of outlines that were filled.
    """

    patients: dict[str, str]
    several: bool
    seen: dict[bytes, str] = field(default_factory=dict)
    unnamed: list[str] = field(default_factory=list)
    filled: int = 0


def _report_state(state: _State, options: PrepareOptions, report: PrepareReport) -> None:
    """Add what concerns all files together to the report."""
    if state.filled:
        outlines = "1 outline" if state.filled == 1 else f"{state.filled} outlines"
        report.notes.append(f"Filled {outlines}")
    if not state.unnamed:
        return
    if state.several and options.without_patient_id == "refuse":
        report.problems.append(missing_id_problem(state.unnamed))
    else:
        report.notes.append(missing_id_note(state.unnamed))


@dataclass
class _Pair:
    """A cropped frame and its lesion.

    Attributes:
        group, image: identifiers from which the name is made, see `PairNames.next`; the group is set last.
        frame: frame number, counted from 1.
        mask: the mask file.
        box: the crop.
        picture: uint8 [H, W] or [H, W, 3], cropped.
        lesion: bool [H, W], cropped.
    """

    group: str
    image: str
    frame: int
    mask: Path
    box: Box
    picture: np.ndarray
    lesion: np.ndarray


def _check_chosen(options: PrepareOptions, recordings: list[Recording]) -> None:
    """Reject a forced or excluded frame name that matches nothing: it is a typo."""
    known = {recording.stem for recording in recordings}
    known |= {frame_name(r.stem, frame) for r in recordings for frame in (*r.masks, 1) if frame}
    for option, chosen in (("force", options.force), ("exclude", options.exclude)):
        unknown = sorted(chosen - known)
        if unknown:
            raise ValueError(
                f"{option} must name a DICOM file, STEM, or a frame with a mask, STEM_frameN, "
                f"got {unknown[0]!r}"
            )


def _pairs_of(
    recording: Recording, options: PrepareOptions, state: _State, report: PrepareReport
) -> Iterator[_Pair]:
    """Yield the usable pairs of one DICOM file; add the others to the report."""
    if recording.stem in options.exclude:
        report.left_out.append(f"{recording.stem} is excluded")
        return
    if not recording.masks:
        report.problems.append(
            f"{recording.path} has no mask {recording.stem}.png or {recording.stem}_frameN.png"
        )
        return
    try:
        file = DicomFile(recording.path)
    except ValueError as error:
        report.problems.append(str(error))
        return
    drawn = [frame for frame in recording.masks if frame is None or frame <= file.frames]
    if len(drawn) < file.frames:
        report.left_out.append(
            f"{recording.stem}: {file.frames - len(drawn)} of {file.frames} frames have no mask"
        )
    patient = ""
    if options.group_by == "patient-id":
        patient = state.patients.get(recording.stem) or file.text("PatientID")
    for frame, mask in sorted(recording.masks.items(), key=lambda item: item[0] or 0):
        try:
            made = _pair_of(recording.stem, file, frame, mask, options, state)
            if isinstance(made, _Pair):
                _check_new(made, file, state.seen)
        except ValueError as error:
            report.problems.append(str(error))
            continue
        if isinstance(made, str):
            report.left_out.append(made)
            continue
        if options.group_by == "patient-id" and not patient:
            if recording.path.name not in state.unnamed:
                state.unnamed.append(recording.path.name)
            if state.several and options.without_patient_id == "refuse":
                continue
        made.group = patient or f"file {recording.stem}"
        yield made


def _check_new(made: _Pair, file: DicomFile, seen: dict[bytes, str]) -> None:
    """Reject a copy of an earlier image: it could leak from one part of a split to another."""
    called = f"frame {made.frame} of {file.path}"
    earlier = seen.setdefault(_digest(made.picture), called)
    if earlier is not called:
        raise ValueError(f"{called} has the same pixels as {earlier}")


def _digest(picture: np.ndarray) -> bytes:
    return hashlib.sha256(str(picture.shape).encode() + picture.tobytes()).digest()


def _pair_of(
    stem: str, file: DicomFile, frame: int | None, mask: Path, options: PrepareOptions, state: _State
) -> _Pair | str:
    """Return the pair, or the reason why its frame is not selected.

    Raises:
        ValueError: the frame or the mask is unusable.
    """
    called = frame_name(stem, frame)
    if frame is None and file.frames > 1:
        raise ValueError(f"{mask} must name one of the {file.frames} frames of {file.path}: {stem}_frameN")
    number = frame or 1
    spellings = {stem, called, frame_name(stem, number)}
    if spellings & options.exclude:
        return f"{called} is excluded"
    forced = bool(spellings & options.force)
    if file.says_annotated and options.annotations in ("both", "tag") and not forced:
        return f"{called}: the tag Burned In Annotation is YES"
    picture = file.picture(number)
    lesion = read_drawn_mask(mask, options.mask_polarity)
    if lesion.shape != picture.shape[:2]:
        raise ValueError(
            f"{mask} must have the size of its frame in {file.path.name}, "
            f"{picture.shape[1]}x{picture.shape[0]}, got {lesion.shape[1]}x{lesion.shape[0]}"
        )
    lesion, filled = without_outlines(mask, lesion, options.outlines)
    box = _box(file, picture, lesion, options)
    cut = picture[box.slices]
    marks = annotation(cut) if options.annotations in ("both", "pixels") and not forced else None
    if marks:
        return f"{called}: {marks} inside the crop look like annotation"
    _check_levels(cut, f"{file.path} is blank in frame {number}")
    kept = lesion[box.slices]
    lost = 1 - kept.sum() / lesion.sum()
    if lost > _LOST_LESION:
        raise ValueError(f"{mask} has {lost:.0%} of its lesion outside the crop {','.join(map(str, box))}")
    state.filled += filled
    return _Pair("", _digest(picture).hex(), number, mask, box, cut, kept)


def _check_levels(cut: np.ndarray, blank: str) -> None:
    """Reject a cropped frame, uint8 [H, W] or [H, W, 3], that shows nothing."""
    levels = np.unique(cut)
    if levels.size == 1:
        raise ValueError(f"{blank}: every pixel of the crop is {levels[0]}")
    if levels.size < _LEAST_LEVELS:
        raise ValueError(
            f"{blank}: the crop has only {levels.size} grey levels, from {levels[0]} to {levels[-1]}; its "
            "window, table or bits stored may be wrong"
        )


def _box(file: DicomFile, picture: np.ndarray, lesion: np.ndarray, options: PrepareOptions) -> Box:
    """Choose the crop: the given one, else the region with most of the lesion, else the bright content."""
    height, width = lesion.shape
    if options.crop is not None:
        if options.crop.x1 > width or options.crop.y1 > height:
            raise ValueError(
                f"{file.path} has {width}x{height} pixels, so the crop {','.join(map(str, options.crop))} "
                "exceeds it"
            )
        return options.crop
    regions = file.regions(width, height)
    if regions is not None:
        return max(regions, key=lambda box: (int(lesion[box.slices].sum()), box.area))
    box = content_box(picture)
    if box is None:
        raise ValueError(
            f"{file.path} is black, so no ultrasound region can be detected; set the crop explicitly"
        )
    return box


def _refusal(report: PrepareReport) -> str:
    count = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
    listed = "".join(f"\n  {problem}" for problem in report.problems)
    return f"nothing was written, {count}:{listed}\nFix them, or skip them with --on-problem skip."


__all__ = ["PrepareReport", "prepare"]
