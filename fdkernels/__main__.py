"""`python -m fdkernels` and the command `fdkernels`: errors as sentences, `info` without extras."""

from __future__ import annotations

import os
import sys

from fdkernels.info import info_text

# Modules of the extras, with the extra that brings them.
_EXTRAS = {
    **dict.fromkeys(
        (
            *("defusedxml", "lightning", "matplotlib", "PIL", "rich", "safetensors"),
            *("tensorboard", "tifffile", "torchmetrics", "typer"),
        ),
        "train",
    ),
    **dict.fromkeys(("pydicom", "scipy"), "dicom"),
    "skimage": "demo",
}
_USAGE = "usage: fdkernels info | train | evaluate | prepare | demo"


def _missing_extra(error: ModuleNotFoundError) -> str | None:
    """Name the extra that brings the missing module; None if none does."""
    return _EXTRAS.get((error.name or "").partition(".")[0])


def _say(message: str) -> None:
    print(f"fdkernels: {message}", file=sys.stderr)


def _without_typer(arguments: list[str], extra: str) -> int:
    """Print `info` in plain text; for other commands print the packages to install."""
    if arguments == ["info"]:
        print(info_text())
        return 0
    _say(f"this command needs further packages: pip install 'fdkernels[{extra}]'\n{_USAGE}")
    return 1


def main() -> int:
    """Run the command line; return the exit code.

    An error that a user can correct is shown as one sentence, with exit code 1. FDKERNELS_TRACEBACK=1 in
    the environment shows the traceback instead.
    """
    traceback_wanted = os.environ.get("FDKERNELS_TRACEBACK", "0") not in ("", "0")
    try:
        from fdkernels.cli import app
    except ModuleNotFoundError as error:
        extra = _missing_extra(error)
        if extra is None:
            raise
        return _without_typer(sys.argv[1:], extra)
    try:
        app(prog_name="fdkernels")
    except ModuleNotFoundError as error:
        extra = _missing_extra(error)
        if extra is None or traceback_wanted:
            raise
        _say(f"{error.name} is not installed: pip install 'fdkernels[{extra}]'")
        return 1
    except Exception as error:
        if traceback_wanted or not _is_for_the_user(error):
            raise
        _say(str(error))
        return 1
    return 0


def _is_for_the_user(error: Exception) -> bool:
    """Whether the sentence of the error is enough: wrong input, or something that is missing."""
    if isinstance(error, (ValueError, TypeError, RuntimeError, OSError)):
        return True
    # Lightning's own for a wrong accelerator or precision; it derives from Exception alone.
    return type(error).__name__ == "MisconfigurationException"


if __name__ == "__main__":
    sys.exit(main())
