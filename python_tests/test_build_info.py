"""A source tree that was not built says so at import; an installation without a compiler does not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fdkernels"

NOT_BUILT = "RuntimeWarning: fdkernels is imported from a source tree that was not built"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources without what a build leaves beside them."""
    built = shutil.ignore_patterns("*.so", "*.pyd", "*.dylib", "_build_report.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "fdkernels", ignore=built)
    return tmp_path


def said_at_import(tree: Path) -> str:
    code = "import fdkernels, fdkernels.taps; assert fdkernels.backends()['cpu'] is not None"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_importing_an_unbuilt_source_tree_warns_once_how_to_install_it(tree):
    said = said_at_import(tree)
    assert said.count(NOT_BUILT) == 1
    assert "run `pip install .` in it" in said


def test_importing_an_installation_without_a_compiler_says_nothing(tree):
    report = {"cpp": False, "messages": ["No C++ compiler was found."]}
    (tree / "fdkernels" / "_build_report.json").write_text(json.dumps(report), encoding="utf-8")
    assert said_at_import(tree) == ""
