"""The runner of the matrix: which combinations it takes, and what it reads of a run of the tests."""

from __future__ import annotations

import pytest

from matrix import run
from matrix.run import Combination


def test_named_combinations_may_hold_requirements(monkeypatch):
    monkeypatch.setenv("MATRIX", "3.11:2.8.0 3.12:2.13.0:numpy<2.4:triton==3.4.0")
    assert run.combinations({}) == [
        Combination("3.11", "2.8.0"),
        Combination("3.12", "2.13.0", ("numpy<2.4", "triton==3.4.0")),
    ]
    monkeypatch.setenv("MATRIX", "3.11")
    with pytest.raises(SystemExit, match=r"entries such as 3\.11:2\.8\.0, got 3\.11"):
        run.combinations({})


def test_the_last_patch_of_each_release_from_the_bound_on(monkeypatch):
    listed = "torch (2.10.1)\nAvailable versions: 2.10.1, 2.10.0, 2.9.1+cpu, 2.9.0, 2.6.0, 2.5.1, 1.13.1\n"
    monkeypatch.setattr(run, "output_of", lambda command: listed)
    assert run.releases("python3") == ["2.6.0", "2.9.0", "2.10.1"]


def test_failures_are_named_once_by_file_and_test(tmp_path):
    cases = '<testcase classname="{}" name="{}"><{}/></testcase>'
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite>"
        + cases.format("python_tests.op.test_cpu", "test_x[1-2]", "failure")
        + cases.format("python_tests.test_loss", "test_y", "error")
        + cases.format("python_tests.test_loss", "test_z", "skipped")
        + "</testsuite></testsuites>"
    )
    assert list(run.failures_in(report)) == ["test_cpu::test_x", "test_loss::test_y"]
