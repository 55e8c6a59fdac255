"""What pyproject.toml and the README promise of versions is what docs/versions.md shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from matrix.table import PAGE, Row, numbers, read_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_rows(PAGE)


@pytest.fixture(scope="module")
def project() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_combination_of_the_table_passed(rows):
    assert rows
    assert {(row.python, row.torch): row.failed for row in rows if row.failed != "0"} == {}


def test_pyproject_admits_the_pythons_of_the_table(rows, project):
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert {row.python for row in rows} <= set(named)
    assert f'requires-python = ">={named[0]}"' in project


def test_the_bounds_of_pyproject_admit_the_versions_of_the_table(rows, project):
    for package in ("torch", "triton"):
        bound = numbers(re.search(rf'"{package}>=([\d.]+)', project)[1])
        assert all(numbers(getattr(row, package)) >= bound for row in rows if getattr(row, package) != "none")


def test_triton_is_a_backend_in_every_row_that_has_a_triton_of_the_readme(rows):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    oldest = re.search(r"Triton (\d+\.\d+) or later", readme)[1]
    # Before 3.7 it cannot be interpreted beside NumPy 2.4, which `fdk.backends()` says.
    promised = [
        row
        for row in rows
        if row.triton != "none"
        and numbers(row.triton) >= numbers(oldest)
        and (numbers(row.triton) >= (3, 7) or numbers(row.numpy) < (2, 4))
    ]
    assert [row for row in rows if "triton" in row.backends.split(", ")] == promised


def test_the_readme_names_the_table():
    assert "(docs/versions.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_run_takes_the_place_of_the_same_combination(tmp_path):
    page = tmp_path / "docs" / "versions.md"
    broken = Row("3.11", "2.9.1", failed="not installed: a | b")
    write_rows(page, [broken, Row("3.11", "2.10.0", numpy="2.4.6")])
    assert [(row.torch, row.failed) for row in read_rows(page)] == [
        ("2.9.1", "not installed: a / b"),
        ("2.10.0", "not run"),
    ]
    once = Row("3.11", "2.9.1", numpy="2.4.6", passed="7", failed="1: test_loss::test_x")
    again = once._replace(passed="8", failed="0")
    other = Row("3.11", "2.9.1", numpy="2.3.5", passed="8", failed="0")
    write_rows(page, [once, *read_rows(page)])
    write_rows(page, [other, again, *read_rows(page)])
    assert [(row.torch, row.numpy, row.failed) for row in read_rows(page)] == [
        ("2.9.1", "2.3.5", "0"),
        ("2.9.1", "2.4.6", "0"),
        ("2.10.0", "2.4.6", "not run"),
    ]
