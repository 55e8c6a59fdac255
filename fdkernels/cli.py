"""The command line: `fdkernels train`, `evaluate`, `experiment`, `report`, `prepare`, `demo` and `info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fdkernels.commands.evaluate import evaluate
from fdkernels.commands.experiment import experiment
from fdkernels.commands.prepare import prepare
from fdkernels.commands.report import report
from fdkernels.commands.train import train
from fdkernels.info import info_text, version_text

app = typer.Typer(
    help="The feature discrepancy loss as fused kernels, and networks trained with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(train)
app.command()(evaluate)
app.command()(experiment)
app.command()(report)
app.command()(prepare)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version_text())
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command()
def info() -> None:
    """Print what was built and which backends are available here."""
    print(info_text())


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for patches, runs, picture and table.")] = Path(
        "demo_output"
    ),
    seeds: Annotated[int, typer.Option(min=1, max=100, help="How many seeds, each in both arms.")] = 3,
    epochs_warm: Annotated[int, typer.Option(min=1, help="Epochs of phase one.")] = 12,
    epochs_active: Annotated[int, typer.Option(min=1, help="Epochs of phase two.")] = 12,
    base_channels: Annotated[int, typer.Option(min=1, help="Width of the first level.")] = 16,
    accelerator: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
) -> None:
    """Train a small UNet on a stained slide, without and with the loss, and compare."""
    from fdkernels.segmentation.demo import run_demo
    from fdkernels.segmentation.report import write_report

    run_demo(
        output,
        seeds=range(seeds),
        epochs_warm=epochs_warm,
        epochs_active=epochs_active,
        base_channels=base_channels,
        accelerator=accelerator,
    )
    page, _ = write_report([output / "runs"], output)
    print(f"Report: {page}")


__all__ = ["app"]
