"""The sections of an experiment."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from pathlib import Path

from PIL import Image

from fdkernels.segmentation.data.names import natural
from fdkernels.segmentation.report.arms import arms_blocks
from fdkernels.segmentation.report.experiment import Experiment
from fdkernels.segmentation.report.experiment_figures import FIGURES
from fdkernels.segmentation.report.own_results import own_results
from fdkernels.segmentation.report.page import Block, Notes, Picture, Section, Table
from fdkernels.segmentation.report.render import PICTURES
from fdkernels.segmentation.report.results import result_blocks
from fdkernels.segmentation.report.settings import runs_blocks, settings_blocks, shown

MOST_PICTURES = 24
_WIDEST = 1400  # pixels


def experiment_sections(experiment: Experiment, prefix: str) -> list[Section]:
    """Give the sections of an experiment: results, further results, settings and runs.

    Args:
        experiment: as read.
        prefix: of the names of its pictures.
    """
    title = experiment.title
    stated = experiment.summary.get("notes")
    notes = [*experiment.problems, *(map(str, stated) if isinstance(stated, list) else ())]
    first: list[Block] = [Notes(tuple(notes))] if notes else []
    first += arms_blocks(prefix, experiment)
    if experiment.name in FIGURES and (experiment.rows or experiment.runs):
        first += FIGURES[experiment.name](prefix, experiment)
    special = own_results(prefix, experiment)
    first += special.pictures
    first += _stored_pictures(prefix, experiment.folder, special.shown)
    sections = [Section(f"Experiment {title}", tuple(first))]
    further = [*special.blocks, *result_blocks(special.others)]
    if further:
        sections.append(Section(f"Results in summary.json of {title}", tuple(further)))
    sections.append(Section(f"Settings, versions, seeds and time of {title}", tuple(_asked_for(experiment))))
    return sections


def _asked_for(experiment: Experiment) -> list[Block]:
    runs = [one.run for one in experiment.runs]
    if runs:
        return [*settings_blocks(runs, [one.arm for one in experiment.runs]), *runs_blocks(runs)]
    blocks: list[Block] = []
    for name in ("settings", "versions"):
        stated = experiment.summary.get(name)
        if isinstance(stated, dict) and stated:
            rows = tuple((str(key), shown(value)) for key, value in stated.items())
            blocks.append(Table(f"The {name} in summary.json.", (name, "value"), rows, texts=2))
    seeds = experiment.summary.get("seeds")
    seeds_said = f" Seeds: {shown(seeds)}." if seeds is not None else ""
    return [*blocks, Notes((f"The folder holds no runs.{seeds_said}",))]


def _stored_pictures(prefix: str, folder: Path, known: Collection[Path]) -> list[Block]:
    """Take in pictures in the folder that are not known yet; one that cannot be read is named."""
    found = [path for path in _pictures(folder) if path not in known]
    blocks: list[Block] = []
    problems = []
    for place, path in enumerate(found[:MOST_PICTURES], start=1):
        name = path.relative_to(folder).as_posix()
        try:
            content = _as_png(path)
        except (OSError, ValueError, SyntaxError) as error:  # the last from Pillow, for broken PNG chunks
            problems.append(f"The picture {name} cannot be read and is left out: {error}.")
            continue
        words = path.stem.replace("_", " ")
        blocks.append(Picture(f"{prefix}-stored-{place}", content, f"{words} ({name}).", f"Picture {words}."))
    if len(found) > MOST_PICTURES:
        problems.append(f"The first {MOST_PICTURES} of {len(found)} pictures are shown.")
    return [*blocks, Notes(tuple(problems))] if problems else blocks


def _pictures(folder: Path) -> Iterator[Path]:
    others = ("runs", PICTURES)
    places = [path for path in folder.rglob("*.png") if path.relative_to(folder).parts[0] not in others]
    hidden = (path for path in places if not path.name.startswith("."))
    return iter(sorted(hidden, key=lambda path: natural(path.relative_to(folder).as_posix())))


def _as_png(path: Path) -> bytes:
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((_WIDEST, _WIDEST * 4))
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


__all__ = ["MOST_PICTURES", "experiment_sections"]
