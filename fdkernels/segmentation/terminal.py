"""The console that all commands print to."""

from __future__ import annotations

from rich.console import Console


def terminal(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Make the console that everything is printed to.

    Names and paths may hold square brackets and colons, which rich would take for its markup and for emoji.
    A path that is broken into lines cannot be copied, so that sentences are printed with soft_wrap=True.

    Args:
        stderr: print to the standard error output.
        quiet: print nothing.
    """
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)


__all__ = ["terminal"]
