"""The host's part of a call is measured with kernels that do nothing, on every road, and they come back."""

from __future__ import annotations

import json

import pytest
import torch

import fdkernels as fdk
from benchmarks import host
from benchmarks.page import read_files, tables
from fdkernels.op import cpu, cuda

pytestmark = pytest.mark.skipif(
    fdk.backends()["cpu"] is not None, reason=f"backend 'cpu': {fdk.backends()['cpu']}"
)


def test_each_road_is_measured_and_has_a_column(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "ROUNDS", 2)
    threads = torch.get_num_threads()
    try:
        assert host.main(["--output", str(tmp_path / "machine" / "host.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    entries = json.loads((tmp_path / "machine" / "host.json").read_text("utf-8"))["measurements"]
    assert [entry["road"] for entry in entries] == ["cpu", "cuda"]
    assert all(us > 0 for entry in entries for us in entry["microseconds"].values())
    page = tables(read_files(tmp_path))
    assert "| call without its kernels | `cpu`, µs | `cuda`, µs |" in page
    assert "criterion forward+backward pyramid-32" in page


@pytest.mark.parametrize("road", host.ROADS)
def test_kernels_do_nothing_inside_and_their_work_behind(road):
    module = {"cpu": cpu, "cuda": cuda}[road]
    features, mask = torch.rand(2, 3, 8, 8), torch.ones(2, 1, 8, 8)
    wanted = fdk.region_sums(features, mask, backend="reference").fg
    compiled = module._C
    with host.without_kernels(road):
        assert module._C.cpu_sums() is True  # without arguments, which the kernel would refuse
        assert fdk.region_sums(features, mask).fg.shape == wanted.shape
    assert module._C is compiled
    torch.testing.assert_close(fdk.region_sums(features, mask).fg, wanted)
