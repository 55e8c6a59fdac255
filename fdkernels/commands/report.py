"""`fdkernels report`: one page that shows what runs and experiments have found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of runs of train, of experiments, or folders that hold such.",
            metavar="DIR...",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for report.html and report.md.", show_default="the first DIR"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the data, if it has moved.", show_default="where the runs found it"),
    ] = None,
) -> None:
    """Write report.html, which needs nothing beside it, and report.md with its pictures."""
    from fdkernels.segmentation.report import write_report
    from fdkernels.segmentation.terminal import terminal

    page, text = write_report(folders, output, data)
    terminal().print(f"The report is in {page}, and as Markdown in {text}.", soft_wrap=True)


__all__ = ["report"]
