from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    """Draw with few dots: the claims are about what is drawn, and most of the time goes into the dots."""
    monkeypatch.setattr("fdkernels.segmentation.report.drawing.DOTS", 40)
