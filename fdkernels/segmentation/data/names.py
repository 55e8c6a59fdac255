"""Names of files and folders: which of them mean the same, and how they are shown."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path


def natural(text: str) -> list[tuple[int, str]]:
    """Return a natural sort key: 01_2 comes before 01_10."""
    parts = [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]
    return [*parts, (-2, text)]  # breaks the tie between 1 and 01


def composed(name: str) -> str:
    """Return the name in Unicode's composed form (NFC): macOS writes é as two characters, others as one."""
    return unicodedata.normalize("NFC", name)


def caseless(name: str) -> str:
    """Return what names have in common that differ at most in case and Unicode form."""
    return composed(composed(name).casefold())


def folder_key(name: str) -> str:
    """Return what names of folders have in common that differ at most in case, spaces, "_" and "-"."""
    return re.sub(r"[\s_-]+", "", caseless(name))


def patient_key(name: str) -> str:
    """Return what the spellings of one patient have in common: 1, 01 and 001 are one, as are a and A."""
    return re.sub(r"\d+", lambda digits: digits[0].lstrip("0") or "0", caseless(name).strip())


def is_utf8(path: str | Path) -> bool:
    """Return whether UTF-8 can hold the path; an archive of another system may unpack to one it cannot."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    r"""Return the text with what UTF-8 cannot hold written as \udcXX, so that printing never fails."""
    return text.encode(errors="backslashreplace").decode()


__all__ = ["caseless", "composed", "folder_key", "is_utf8", "natural", "patient_key", "printable"]
