"""`fdkernels evaluate`: score a run, its folds or given weights, image by image."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fdkernels.commands.options import options_named


class Phases(str, Enum):
    """Values of --phase."""

    warm = "warm"
    active = "active"
    both = "both"


class OnProblem(str, Enum):
    """Values of --on-problem."""

    refuse = "refuse"
    skip = "skip"


class Part(str, Enum):
    """Values of --part."""

    train = "train"
    validation = "validation"
    test = "test"


@options_named()
def evaluate(
    context: typer.Context,
    run: Annotated[
        Path | None, typer.Argument(help="Folder of a run, or of its folds.", show_default=False)
    ] = None,
    phase: Annotated[
        Phases | None, typer.Option(help="Phase whose best model is scored.", show_default="those finished")
    ] = None,
    part: Annotated[Part, typer.Option(help="Part of the data.")] = Part.test,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data set.", show_default="where the run found it")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="A run on the same split to compare with, the baseline.", show_default=False),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Safetensors file to score instead of a run.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With --weights: the network.", show_default=False)
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="With --weights: the data set.", show_default=False)
    ] = None,
    base_channels: Annotated[
        int | None, typer.Option(help="With --weights: width of the network.", show_default="as published")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="With --weights: side that images are resized to.", show_default="the paper's"),
    ] = None,
    convention: Annotated[str, typer.Option(help="With --weights: convention of L_fd.")] = "paper",
    on_problem: Annotated[
        OnProblem, typer.Option(help="With --weights: refuse files that cannot be used, or skip them.")
    ] = OnProblem.refuse,
    mask_values: Annotated[
        str | None,
        typer.Option(help="With --weights: values of masks that are foreground.", show_default="as in train"),
    ] = None,
    image_bits: Annotated[
        int | None,
        typer.Option(
            help="With --weights: how many bits 16-bit images use.", show_default="what the files say"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write; earlier masks and overlays of the run stay.", show_default="RUN/evaluation"
        ),
    ] = None,
    masks: Annotated[bool, typer.Option("--masks", help="Write predicted masks as PNG.")] = False,
    overlays: Annotated[
        bool,
        typer.Option(
            "--overlays", help="Write predictions over the images, errors in red that shows what is below."
        ),
    ] = False,
    augmented: Annotated[
        bool, typer.Option("--augmented", help="Add rows for the seven other symmetries of each image.")
    ] = False,
    worst_off: Annotated[
        int | None,
        typer.Option(help="Number of worst-off samples.", show_default="by the paper's Table 1"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 4,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that read images.", show_default="by the number of images"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = "auto",
) -> None:
    """Score a run's best models image by image: worst-off, best-off and all, and L_fd by layer."""
    from fdkernels.segmentation.console import scores_table
    from fdkernels.segmentation.data import ReadingRules
    from fdkernels.segmentation.evaluation import EvaluationOptions, evaluate_weights
    from fdkernels.segmentation.evaluation import evaluate as evaluate_run
    from fdkernels.segmentation.fields import one_of
    from fdkernels.segmentation.terminal import terminal

    _check_options(context, run, weights)
    if output is None and run is not None:
        output = run / "evaluation"
    if output is None:
        raise ValueError("--output must name a folder where --weights are scored, got nothing")
    options = EvaluationOptions(
        output=output,
        masks=masks,
        overlays=overlays,
        augmented=augmented,
        worst_off=worst_off,
        batch_size=batch_size,
        workers=workers,
        device=device,
        progress=True,
    )
    if run is not None:
        asked = None if phase is None else [phase.value]
        phases = ["warm", "active"] if phase is Phases.both else asked
        found = evaluate_run(run, phases=phases, part=part.value, data=data, against=against, options=options)
    elif weights is None or model is None or dataset is None or data is None:
        needed = {"--model": model, "--dataset": dataset, "--data": data}
        missing = one_of(name for name, value in needed.items() if value is None)
        raise ValueError(f"--weights needs --model, --dataset and --data, got no {missing}")
    else:
        found = evaluate_weights(
            weights,
            model=model,
            dataset=dataset,
            data=data,
            base_channels=base_channels,
            size=size,
            convention=convention,
            on_problem=on_problem.value,
            rules=ReadingRules(mask_values, image_bits),
            options=options,
        )
    console = terminal()
    for problem in found.summary.get("skipped", []):
        console.print(f"Skipped: {problem}", soft_wrap=True)
    for name in found.summary["phases"]:
        console.print(scores_table(found.summary, name))
    console.print(f"samples.csv and summary.json are in {output}.", soft_wrap=True)


_OF_RUNS = ("phase", "part", "against")
_OF_WEIGHTS = (
    "model",
    "dataset",
    "base_channels",
    "size",
    "convention",
    "on_problem",
    "mask_values",
    "image_bits",
)


def _check_options(context: typer.Context, run: Path | None, weights: Path | None) -> None:
    """Refuse both or neither of run and weights, and options that go with the other."""
    if (run is None) == (weights is None):
        got = "neither" if run is None else "both"
        raise ValueError(f"evaluate takes the folder of a run or --weights, got {got}")
    foreign, other = (_OF_WEIGHTS, "--weights") if weights is None else (_OF_RUNS, "the folder of a run")
    for name in foreign:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} goes with {other} only")


__all__ = ["evaluate"]
