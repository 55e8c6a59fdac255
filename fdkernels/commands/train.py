"""`fdkernels train`: the paper's protocol on a named data set."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fdkernels.commands.options import as_field, field_options, options_named, was_given
from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.presets import preset_fields
from fdkernels.segmentation.runfiles import is_first_process
from fdkernels.segmentation.saved_runs import FREE_ON_RESUME, read_config
from fdkernels.segmentation.signals import ending_on_signals
from fdkernels.segmentation.terminal import terminal


def train(
    context: typer.Context,
    preset: Annotated[
        str | None,
        typer.Option(
            help="DATASET-MODEL, such as tnbc-nucleisegnet: sets data set, model, size, learning rate "
            "and batch size as in the paper; other options go before it."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that the output folder holds.")
    ] = False,
    **options: Any,
) -> None:
    """Train in the paper's two phases and test the best model of each."""
    output = Path(options["output"])
    console = terminal(quiet=not is_first_process())
    try:
        with ending_on_signals(), options_named():
            config, metrics = _train(context, preset, resume, options)
    except (SystemExit, KeyboardInterrupt):  # of a signal, and Lightning's way and Python's to end on Ctrl-C
        if (output / "config.json").exists():
            hint = f"Continue with: fdkernels train --output {shlex.quote(str(output))} --resume"
        else:
            hint = "The training had not begun; start it again with the same command."
        console.print(f"Interrupted. {hint}", soft_wrap=True)
        raise
    # Here, as torch and Lightning take seconds to import.
    from fdkernels.segmentation.console import results_table

    console.print(results_table(metrics, config.fd_loss))
    console.print(f"Weights, logs and results are in {output}.", soft_wrap=True)


def _train(
    context: typer.Context, preset: str | None, resume: bool, options: Mapping[str, Any]
) -> tuple[TrainingConfig, dict[str, Any]]:
    """Make the configuration from the options, train, and return both."""
    fields = {name: as_field(name, value) for name, value in options.items()}
    given = {name: value for name, value in fields.items() if was_given(context, name)}
    if preset is not None:
        given = {**preset_fields(preset), **given}
    if resume:
        config = _resumed(Path(fields["output"]), given)
    elif fields["data"] is None:
        raise ValueError("--data must name the folder of the data set, got nothing")
    else:
        config = TrainingConfig(**{**fields, **given})
    from fdkernels.segmentation.train import train as train_and_test

    return config, train_and_test(config, resume=resume)


def _with_fields(written: inspect.Signature) -> inspect.Signature:
    """Put an option for each field of `TrainingConfig` between those that `train` writes out."""
    context, preset, resume, _ = written.parameters.values()
    # Parameters with a default come last in a signature; by keyword alone their order is free.
    options = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (preset, *field_options(), resume)]
    return written.replace(parameters=[context, *options])


train.__signature__ = _with_fields(inspect.signature(train, eval_str=True))  # type: ignore[attr-defined]


def _resumed(output: Path, given: Mapping[str, Any]) -> TrainingConfig:
    """Read the configuration that the folder holds, and change what may differ.

    Args:
        output: the folder of the run.
        given: fields from the command line.

    Raises:
        ValueError: there is no run, or an option differs that would make it another run.
    """
    if not (output / "config.json").exists():
        raise ValueError(f"output {output} holds no run to resume: there is no config.json")
    saved = read_config(output / "config.json")
    for name, value in given.items():
        before = getattr(saved, name)
        if name not in FREE_ON_RESUME and value != before:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} is {value}, but the run in {output} began with {before}; leave it out "
                "to continue that run, or start another one"
            )
    changed = {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    return dataclasses.replace(saved, **{**changed, "output": str(output)})


__all__ = ["train"]
