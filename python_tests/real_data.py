"""Where the real subsets lie that some tests read; they are no part of this repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_CHECKOUT = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ.get("FDKERNELS_TEST_DATA", _CHECKOUT.parent / "shared" / "data"))


def needs(name: str) -> pytest.MarkDecorator:
    """Skips a test where the real data set of that name is absent."""
    folder = FOLDER / name
    return pytest.mark.skipif(not folder.is_dir(), reason=f"{folder} is not there (FDKERNELS_TEST_DATA)")
