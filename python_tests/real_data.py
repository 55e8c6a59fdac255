"""Folder of the real data subsets that some tests read; they are not part of this repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_CHECKOUT = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ.get("FDKERNELS_TEST_DATA", _CHECKOUT.parent / "shared" / "data"))


def needs(name: str) -> pytest.MarkDecorator:
    """Skip a test if the real data set of that name is missing."""
    folder = FOLDER / name
    return pytest.mark.skipif(not folder.is_dir(), reason=f"{folder} does not exist (FDKERNELS_TEST_DATA)")
