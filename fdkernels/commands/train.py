"""`fdkernels train`: the paper's protocol on a named data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from fdkernels.segmentation.config import TrainingConfig

# What may differ from the run that is resumed: where it lies, and what only the time depends on.
_FREE_ON_RESUME = ("data", "novel_data", "output", "workers", "accelerator", "tensorboard")


def train(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder of the run, such as runs/first.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="DATASET-MODEL, such as tnbc-nucleisegnet: sets data set, model, size, learning rate "
            "and batch size as in the paper; other options go before it."
        ),
    ] = None,
    dataset: Annotated[
        str,
        typer.Option(help="tnbc, monuseg, udiat, ad-256, ad-128, us-tnbc, busi or dsb2018."),
    ] = "tnbc",
    model: Annotated[str, typer.Option(help="unet, attention_unet, nucleisegnet or cmunet.")] = "unet",
    base_channels: Annotated[
        int | None, typer.Option(help="Width of the first level.", show_default="as published")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="Side that images are resized to.", show_default="the paper's"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images a batch and device.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Batches whose gradients make one step.")] = 1,
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
    exchange: Annotated[str, typer.Option(help="Cross-sample term: none, shuffle or pooled.")] = "none",
    fd_loss: Annotated[
        bool, typer.Option("--fd-loss/--no-fd-loss", help="Train with the loss or without.")
    ] = True,
    backend: Annotated[str, typer.Option(help="auto, reference, cpu, triton or cuda.")] = "auto",
    fold: Annotated[
        str | None,
        typer.Option(
            help="1 to 5: train on that fold of a cross-validation; all: on each, one after the other.",
            show_default="one split 70-20-10",
        ),
    ] = None,
    on_problem: Annotated[
        str, typer.Option(help="Files that cannot be used: refuse the run, or skip them.")
    ] = "refuse",
    novel_dataset: Annotated[
        str | None, typer.Option(help="Second data set, whose images are trained on besides.")
    ] = None,
    novel_data: Annotated[Path | None, typer.Option(help="Its folder.")] = None,
    novel_images: Annotated[
        int | None, typer.Option(help="How many of its images.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of split, weights, order and augmentation.")] = 0,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that read images.", show_default="by the number of images"),
    ] = None,
    accelerator: Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")] = "auto",
    devices: Annotated[str, typer.Option(help="How many devices, their numbers (0,2), or auto.")] = "1",
    num_nodes: Annotated[int, typer.Option(help="Hosts that train together.")] = 1,
    strategy: Annotated[
        str, typer.Option(help="As Lightning names it; auto is ddp on several devices.")
    ] = "auto",
    sync_batchnorm: Annotated[
        bool | None,
        typer.Option(
            "--sync-batchnorm/--no-sync-batchnorm",
            help="Batch norm over the samples of all devices.",
            show_default="on GPUs",
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="32-true, bf16-mixed or 16-mixed.")] = "32-true",
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Keep features in the channels_last format.")
    ] = False,
    compile: Annotated[  # noqa: A002 - the option's name
        bool, typer.Option("--compile", help="Run the network through torch.compile.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard/--no-tensorboard", help="Logs for TensorBoard beside the CSV.")
    ] = True,
    limit_batches: Annotated[
        int | None,
        typer.Option(help="At most so many batches an epoch, to try things out.", show_default="all"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that the output folder holds.")
    ] = False,
) -> None:
    """Train in the paper's two phases and test the best model of each."""
    from fdkernels.segmentation.display import folds_table, results_table
    from fdkernels.segmentation.protocol import train as run
    from fdkernels.segmentation.runfiles import is_first_process

    config = _configuration(context, output, data, preset, resume)
    console = Console(quiet=not is_first_process())
    try:
        metrics = run(config, resume=resume)
    except (SystemExit, KeyboardInterrupt):  # Lightning's way to end after Ctrl-C, and Python's
        console.print(f"Interrupted. Continue with: fdkernels train --output {output} --resume")
        raise
    console.print((folds_table if config.fold == "all" else results_table)(metrics, config.fd_loss))
    console.print(f"Weights, logs and results are in {output}.")


def _configuration(
    context: typer.Context, output: Path, data: Path | None, preset: str | None, resume: bool
) -> TrainingConfig:
    """What the options ask for, with the preset's fields, or those of the run that is resumed."""
    from fdkernels.segmentation.config import TrainingConfig
    from fdkernels.segmentation.presets import preset_fields

    fields = {field.name for field in dataclasses.fields(TrainingConfig)}
    chosen: dict[str, Any] = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in context.params.items()
        if name in fields
    }
    if chosen["fold"] is not None and chosen["fold"].isdecimal():
        chosen["fold"] = int(chosen["fold"])
    given = {name: value for name, value in chosen.items() if _was_given(context, name)}
    if preset is not None:
        given = {**preset_fields(preset), **given}
    if resume:
        return _resumed(output, given)
    if data is None:
        raise ValueError("--data must name the folder of the data set, got nothing")
    return TrainingConfig(**{**chosen, **given})


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
    changed = {name: value for name, value in given.items() if name in _FREE_ON_RESUME}
    return dataclasses.replace(saved, **{**changed, "output": str(output)})


__all__ = ["train"]
