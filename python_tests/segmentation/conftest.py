from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Networks this small lose more by waiting for a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def study(tmp_path):
    from made_dicom import Study

    made = Study(tmp_path)
    yield made
    left = [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]
    assert left == []  # whatever happened, nothing half-written is left
