"""The command line: `fdkernels train`, `fdkernels evaluate`, `fdkernels demo`, `fdkernels info`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fdkernels.commands.evaluate import evaluate
from fdkernels.commands.prepare import prepare
from fdkernels.info import info_text

if TYPE_CHECKING:
    from fdkernels.segmentation.config import TrainingConfig

app = typer.Typer(
    help="The feature discrepancy loss as fused kernels, and networks trained with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# What may differ from the run that is resumed: where it lies and what it runs on.
_FREE_ON_RESUME = ("data", "output", "workers", "accelerator")


app.command()(prepare)


@app.command()
def info() -> None:
    """Print what was built and which backends are available here."""
    print(info_text())


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for patches, runs, picture and table.")] = Path(
        "demo_output"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and augmentation.")] = 0,
    epochs_warm: Annotated[int, typer.Option(min=1, help="Epochs of phase one.")] = 20,
    epochs_active: Annotated[int, typer.Option(min=1, help="Epochs of phase two.")] = 20,
    base_channels: Annotated[int, typer.Option(min=1, help="Width of the first level.")] = 16,
    accelerator: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
) -> None:
    """Train a small UNet on a stained slide, without and with the loss, and compare."""
    from fdkernels.segmentation.demo import run_demo

    run_demo(
        output,
        seed=seed,
        epochs_warm=epochs_warm,
        epochs_active=epochs_active,
        base_channels=base_channels,
        accelerator=accelerator,
    )


@app.command()
def train(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder of the run, such as runs/first.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    dataset: Annotated[str, typer.Option(help="Name of the data set: tnbc.")] = "tnbc",
    model: Annotated[str, typer.Option(help="unet, attention_unet, nucleisegnet or cmunet.")] = "unet",
    base_channels: Annotated[
        int | None, typer.Option(help="Width of the first level.", show_default="as published")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="Side that images are resized to.", show_default="the paper's"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 4,
    epochs_warm: Annotated[int, typer.Option(help="Epochs of phase one, alpha at 0.")] = 100,
    epochs_active: Annotated[int, typer.Option(help="Epochs of phase two, loss acting.")] = 75,
    lr: Annotated[
        float | None, typer.Option(help="Adam's learning rate.", show_default="the paper's")
    ] = None,
    alpha_lr: Annotated[float, typer.Option(help="Adam's learning rate for alpha.")] = 1e-3,
    alpha_target: Annotated[
        float | None,
        typer.Option(help="Layer loss at which alpha stops growing.", show_default="set by phase one"),
    ] = None,
    alpha_rule: Annotated[str, typer.Option(help="ascent, descent, clipped or ramp.")] = "ascent",
    convention: Annotated[
        str,
        typer.Option(help="paper, definition4, algorithm1, lemma7, region_mean or released."),
    ] = "paper",
    exchange: Annotated[str, typer.Option(help="Cross-sample term: none or shuffle.")] = "none",
    fd_loss: Annotated[
        bool, typer.Option("--fd-loss/--no-fd-loss", help="Train with the loss or without.")
    ] = True,
    backend: Annotated[str, typer.Option(help="auto, reference, cpu, triton or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of split, weights, order and augmentation.")] = 0,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that read images.", show_default="by the number of images"),
    ] = None,
    accelerator: Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")] = "auto",
    precision: Annotated[str, typer.Option(help="32-true, bf16-mixed or 16-mixed.")] = "32-true",
    limit_batches: Annotated[
        int | None,
        typer.Option(help="At most so many batches an epoch, to try things out.", show_default="all"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that the output folder holds.")
    ] = False,
) -> None:
    """Train in the paper's two phases and test the best model of each."""
    from fdkernels.segmentation.config import TrainingConfig
    from fdkernels.segmentation.display import results_table
    from fdkernels.segmentation.protocol import train as run

    names = {field.name for field in dataclasses.fields(TrainingConfig)}
    chosen: dict[str, Any] = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in context.params.items()
        if name in names
    }
    if resume:
        given = {name for name in chosen if _was_given(context, name)}
        config = _resumed(output, {name: chosen[name] for name in given})
    elif data is None:
        raise ValueError("--data must name the folder of the data set, got nothing")
    else:
        config = TrainingConfig(**chosen)
    console = Console()
    try:
        metrics = run(config, resume=resume)
    except SystemExit:  # Lightning's way to end after Ctrl-C
        console.print(f"Interrupted. Continue with: fdkernels train --output {output} --resume")
        raise
    console.print(results_table(metrics, config.fd_loss))
    console.print(f"Weights, logs and metrics.json are in {output}.")


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _resumed(output: Path, given: dict[str, Any]) -> TrainingConfig:
    """The configuration that the folder holds, with what may differ taken from the command line.

    Raises:
        ValueError: there is no run, or an option differs that would make it another run.
    """
    from fdkernels.segmentation.config import TrainingConfig
    from fdkernels.segmentation.runfiles import read_json

    if not (output / "config.json").exists():
        raise ValueError(f"output {output} holds no run to resume: there is no config.json")
    saved = TrainingConfig.from_json(read_json(output / "config.json"))
    for name, value in given.items():
        before = getattr(saved, name)
        if name not in _FREE_ON_RESUME and value != before:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} is {value}, but the run in {output} began with {before}; leave it out "
                "to continue that run, or start another one"
            )
    return dataclasses.replace(
        saved, **{name: value for name, value in given.items() if name in _FREE_ON_RESUME}
    )


app.command()(evaluate)

__all__ = ["app"]
