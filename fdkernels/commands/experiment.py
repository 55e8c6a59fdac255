"""`fdkernels experiment`: the paper's experiments on a named data set."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fdkernels.commands.options import as_field, field_options, options_named, was_given
from fdkernels.segmentation.config import FOLDS, TrainingConfig
from fdkernels.segmentation.fields import FieldError
from fdkernels.segmentation.presets import preset_fields
from fdkernels.segmentation.saved_runs import FREE_ON_RESUME
from fdkernels.segmentation.signals import ending_on_signals
from fdkernels.segmentation.terminal import terminal


class Name(str, Enum):
    """Experiments by name."""

    ablation = "ablation"
    correlation = "correlation"
    shift = "shift"
    alpha = "alpha"
    addition = "addition"
    qualitative = "qualitative"
    bound = "bound"
    conventions = "conventions"
    mediation = "mediation"


def experiment(
    context: typer.Context,
    name: Annotated[Name, typer.Argument(help="Which experiment.", show_default=False)],
    preset: Annotated[
        str | None,
        typer.Option(
            help="DATASET-MODEL, such as tnbc-nucleisegnet: sets data set, model, size, learning rate "
            "and batch size as in the paper; other options go before it."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, from --seed on.")] = 3,
    folds: Annotated[int, typer.Option(help=f"How many of the {FOLDS} folds of a cross-validation.")] = FOLDS,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Runs side by side, each on one thread of the CPU; the numbers do not depend on it.",
            show_default="one a GPU, or one a core up to 4",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the experiment that the output folder holds.")
    ] = False,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of another experiment; what it has trained with the same options, images and "
            "versions is taken from there. May be given several times.",
            show_default=False,
        ),
    ] = None,
    **options: Any,
) -> None:
    """Carry out an experiment of the paper over seeds and folds; write scores.csv and summary.json."""
    output = Path(options["output"])
    console = terminal()
    try:
        with ending_on_signals(), options_named():
            config, seeds, folds = _settings(context, name.value, preset, seeds, folds, resume, options)
            # Here, as torch and Lightning take seconds to import.
            from fdkernels.segmentation.experiments.engine import run_experiment

            summary = run_experiment(
                name.value,
                config,
                seeds=seeds,
                folds=folds,
                jobs=jobs,
                resume=resume,
                reuse=reuse or (),
            )
    except (SystemExit, KeyboardInterrupt):  # of a signal, and Lightning's way and Python's to end on Ctrl-C
        if (output / "summary.json").exists():
            folder = shlex.quote(str(output))
            hint = f"Continue with: fdkernels experiment {name.value} --output {folder} --resume"
        else:
            hint = "The experiment had not begun; start it again with the same command."
        console.print(f"Interrupted. {hint}", soft_wrap=True)
        raise
    from fdkernels.segmentation.experiments.tables import tables

    for table in tables(summary):
        console.print(table)
    console.print(f"scores.csv, summary.json and the runs are in {output}.", soft_wrap=True)


def _settings(
    context: typer.Context,
    name: str,
    preset: str | None,
    seeds: int,
    folds: int,
    resume: bool,
    options: Mapping[str, Any],
) -> tuple[TrainingConfig, int, int]:
    """Make the configuration from the options, and from those of the experiment that is resumed."""
    fields = {field: as_field(field, value) for field, value in options.items()}
    given = {field: value for field, value in fields.items() if was_given(context, field)}
    if preset is not None:
        given = {**preset_fields(preset), **given}
    if not resume:
        if fields["data"] is None and name != "mediation":
            raise ValueError("--data must name the folder of the data set, got nothing")
        fields["data"] = fields["data"] or ""
        return TrainingConfig(**{**fields, **given}), seeds, folds
    from fdkernels.segmentation.experiments.folder import read_settings

    saved, seeds_before, folds_before = read_settings(Path(fields["output"]))
    counts = {"seeds": (seeds, seeds_before), "folds": (folds, folds_before)}
    changes = {field: (value, getattr(saved, field)) for field, value in given.items()}
    for field, (value, before) in {**changes, **counts}.items():
        if was_given(context, field) and field not in FREE_ON_RESUME and value != before:
            raise FieldError(
                field,
                f"is {value}, but the experiment in {fields['output']} began with {before}; leave it out to "
                "go on, or name another folder",
            )
    free = {field: value for field, value in given.items() if field in FREE_ON_RESUME}
    return dataclasses.replace(saved, **{**free, "output": fields["output"]}), seeds_before, folds_before


def _with_fields(written: inspect.Signature) -> inspect.Signature:
    """Put an option for each field of `TrainingConfig` but fold between those that are written out."""
    context, name, preset, *counts, _ = written.parameters.values()
    # Parameters with a default come last in a signature; by keyword alone their order is free.
    options = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for one in (preset, *field_options(without=("fold",)), *counts)
    ]
    return written.replace(parameters=[context, name, *options])


experiment.__signature__ = _with_fields(inspect.signature(experiment, eval_str=True))  # type: ignore[attr-defined]

__all__ = ["experiment"]
