"""Build the report of folders of `fdkernels train` and `fdkernels experiment`, and write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fdkernels.segmentation.data.names import natural, printable
from fdkernels.segmentation.report.beside import published_blocks
from fdkernels.segmentation.report.curves import run_blocks
from fdkernels.segmentation.report.experiment import Experiment, is_experiment, read_experiment
from fdkernels.segmentation.report.experiment_page import experiment_sections
from fdkernels.segmentation.report.experiment_words import summary_of
from fdkernels.segmentation.report.images import images_blocks
from fdkernels.segmentation.report.page import Block, Notes, Page, Section
from fdkernels.segmentation.report.render import check_jinja, write_page
from fdkernels.segmentation.report.runs import ReportedRun, RunGroup, is_run, read_group
from fdkernels.segmentation.report.settings import results_table, runs_blocks, settings_blocks
from fdkernels.segmentation.report.words import of_groups

# Trainings whose curves and images are drawn; of more, the tables tell.
MOST_DRAWN = 8
# Levels below a given folder in which runs are looked for.
DEEPEST = 4


@dataclass(frozen=True)
class _Sources:
    experiments: list[Experiment]
    groups: list[RunGroup]


def write_report(
    folders: Sequence[str | Path], output: str | Path | None = None, data: str | Path | None = None
) -> tuple[Path, Path]:
    """Write report.html and report.md of what the folders hold; return the paths of the two.

    Args:
        folders: of runs of `fdkernels train`, of their folds, of experiments, or folders of these.
        output: folder to write; None takes the first of `folders`.
        data: where the data of the runs is now; None where they found it. It is needed for pictures of
            images alone.

    Raises:
        ValueError: a folder holds neither a run nor an experiment, or none is given.
        ModuleNotFoundError: Jinja2 is not installed.
    """
    check_jinja()
    if not folders:
        raise ValueError("report needs the folder of a run or of an experiment, got none")
    places = [Path(folder) for folder in folders]
    page = build_page(places, None if data is None else Path(data))
    return write_page(page, places[0] if output is None else Path(output))


def build_page(folders: Sequence[Path], data: Path | None = None) -> Page:
    """Build the page of what the folders hold; raises as `write_report`."""
    sources = _Sources([], [])
    titles = _titles(folders)
    for folder, title in titles.items():
        _read(folder, title, sources, alone=len(titles) == 1)
    several = len(sources.experiments) + bool(sources.groups) > 1
    summaries = [
        f"{experiment.title}: {summary_of(experiment)}" if several else summary_of(experiment)
        for experiment in sources.experiments
    ]
    sections: list[Section] = []
    for number, experiment in enumerate(sources.experiments, start=1):
        sections += experiment_sections(experiment, f"experiment-{number}")
    if sources.groups:
        summaries.append(f"Trainings: {of_groups(sources.groups)}" if several else of_groups(sources.groups))
        sections += _group_sections(sources.groups, data)
    sections.append(
        Section("Published numbers", tuple(published_blocks(sources.experiments, sources.groups)))
    )
    names = [experiment.title for experiment in sources.experiments]
    names += [group.title for group in sources.groups]
    title = f"Report: {names[0]}" if len(names) == 1 else f"Report on {len(names)} folders"
    return Page(title, tuple(summaries), tuple(sections))


def _titles(folders: Sequence[Path]) -> dict[Path, str]:
    """Name each folder, by its path as it was given where several have one name."""
    names = {folder: folder.resolve().name for folder in folders}
    known = list(names.values())
    return {folder: name if known.count(name) == 1 else folder.as_posix() for folder, name in names.items()}


def _read(folder: Path, title: str, sources: _Sources, alone: bool) -> None:
    """Add what a folder of that title holds; `alone` tells whether it is the only one."""
    if not folder.is_dir():
        raise ValueError(printable(f"report needs a folder, got {folder}, which is none"))
    places = _places(folder)
    if not places:
        raise ValueError(
            printable(
                "report needs the folder of a run of fdkernels train, of an experiment, or one that holds "
                f"such folders, got {folder}, which holds neither config.json nor scores.csv"
            )
        )
    for place in places:
        if is_experiment(place):
            sources.experiments.append(read_experiment(place))
            continue
        inside = place.relative_to(folder).as_posix()
        named = title if place == folder else inside if alone else f"{title}/{inside}"
        sources.groups.append(read_group(place, named))


def _places(folder: Path, depth: int = DEEPEST) -> list[Path]:
    """Find the folders of experiments and runs in a folder and so many levels below it, in natural order."""
    if is_experiment(folder) or is_run(folder):
        return [folder]
    if depth == 0:
        return []
    inside = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return [
        found
        for entry in sorted(inside, key=lambda entry: natural(entry.name))
        for found in _places(entry, depth - 1)
    ]


def _group_sections(groups: Sequence[RunGroup], data: Path | None) -> list[Section]:
    runs = [run for group in groups for run in group.runs]
    problems = [problem for group in groups for problem in group.problems]
    problems += [problem for run in runs for problem in run.problems]
    results: list[Block] = [Notes(tuple(problems))] if problems else []
    if runs:
        results.append(results_table(runs))
    if len(groups) > MOST_DRAWN:
        results.append(
            Notes((f"Curves and images of the first {MOST_DRAWN} trainings alone are drawn below.",))
        )
    sections = [Section("Results of the runs", tuple(results))]
    for number, group in enumerate(groups[:MOST_DRAWN], start=1):
        prefix = f"run-{number}"
        blocks = [*run_blocks(prefix, group.title, group.runs), *images_blocks(prefix, group, data)]
        if not blocks:
            blocks = [Notes((f"{group.title} has no log and no finished phase yet.",))]
        sections.append(Section(f"Training {group.title}", tuple(blocks)))
    if runs:
        sections.append(Section("Settings, versions, seeds and time", tuple(_asked_for(runs))))
    return sections


def _asked_for(runs: Sequence[ReportedRun]) -> list[Block]:
    return [*settings_blocks(runs), *runs_blocks(runs)]


__all__ = ["MOST_DRAWN", "build_page", "write_report"]
