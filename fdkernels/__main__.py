"""`python -m fdkernels` and the command `fdkernels`: errors as sentences, `info` without extras."""

from __future__ import annotations

import io
import os
import sys

from fdkernels.info import info_text, version_text

# Packages of the extras, and the extras that a command needs, as the README names them.
_PACKAGES = frozenset(
    {
        *(
            "defusedxml",
            "jinja2",
            "lightning",
            "matplotlib",
            "PIL",
            "pydicom",
            "rich",
            "safetensors",
            "scipy",
        ),
        *("skimage", "tensorboard", "tifffile", "torchmetrics", "typer"),
    }
)
_EXTRAS = {
    "experiment": "train,report",
    "report": "train,report",
    "prepare": "train,dicom",
    "demo": "demo",
}
_USAGE = "usage: fdkernels info | train | evaluate | experiment | report | prepare | demo"


def _install(arguments: list[str]) -> str:
    """Say what to install for a command."""
    extra = _EXTRAS.get(next((word for word in arguments if not word.startswith("-")), ""), "train")
    return f"pip install 'fdkernels[{extra}]', or in its sources pip install '.[{extra}]'"


def _is_of_an_extra(error: ModuleNotFoundError) -> bool:
    return (error.name or "").partition(".")[0] in _PACKAGES


def _say(message: str) -> None:
    print(f"fdkernels: {message}", file=sys.stderr)


def _without_typer(arguments: list[str]) -> int:
    """Print `info` and the version in plain text; for other commands print the packages to install."""
    plain = {"info": info_text, "--version": version_text}
    if len(arguments) == 1 and arguments[0] in plain:
        print(plain[arguments[0]]())
        return 0
    _say(f"this command needs further packages: {_install(arguments)}\n{_USAGE}")
    return 1


def main() -> int:
    """Run the command line; return the exit code.

    An error that a user can correct is shown as one sentence, with exit code 1. FDKERNELS_TRACEBACK=1 in
    the environment shows the traceback instead.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that the encoding lacks end no command
    traceback_wanted = os.environ.get("FDKERNELS_TRACEBACK", "0") not in ("", "0")
    try:
        from fdkernels.cli import app
    except ModuleNotFoundError as error:
        if not _is_of_an_extra(error):
            raise
        return _without_typer(sys.argv[1:])
    try:
        app(prog_name="fdkernels")
    except ModuleNotFoundError as error:
        if not _is_of_an_extra(error) or traceback_wanted:
            raise
        _say(f"{error.name} is not installed: {_install(sys.argv[1:])}")
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
