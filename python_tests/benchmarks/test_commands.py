from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cases
from benchmarks.page import machines_of, read_files

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"

not_on_windows = pytest.mark.skipif(sys.platform == "win32", reason="the suite is a bash script")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


def run_suite(out, **environment):
    return subprocess.run(
        ["bash", str(SUITE), str(out)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )


@not_on_windows
@no_gpu
def test_the_gpu_suite_says_that_there_is_no_device(tmp_path):
    done = run_suite(tmp_path / "out")
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


@not_on_windows
def test_the_gpu_suite_refuses_a_step_that_it_does_not_have(tmp_path):
    done = run_suite(tmp_path / "out", FDKERNELS_SUITE_STEPS="build lunch")
    assert done.returncode == 2
    assert "must name steps of this suite, got lunch" in done.stderr


@not_on_windows
@no_gpu
@pytest.mark.slow
def test_a_step_that_fails_does_not_stop_the_next(tmp_path):
    # A torch that claims a device: the small calls fail on it, the page is made all the same.
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "torch.cuda.get_device_capability = lambda *device: (9, 0)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = run_suite(tmp_path / "out", PYTHONPATH=path, FDKERNELS_SUITE_STEPS="calls training page")
    assert done.returncode == 1
    steps = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    status = {step["name"]: step["exit_status"] for step in steps}
    assert list(status) == ["small calls", "training", "page"]
    assert status["small calls"] != 0
    assert status["page"] == 0
    assert "Nothing has been measured yet." in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_quick_run_writes_results_that_the_report_reads(tmp_path):
    results = tmp_path / "calls.json"
    command = [
        *(sys.executable, "-m", "benchmarks.calls", "--set=quick", "--device=cpu"),
        *(f"--results={results}", "-k", "pyramid-32 and (forward or tap)"),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:]
    (machine,) = machines_of(read_files(tmp_path))
    ((case, modes),) = machine.cases.items()
    assert case == ("pyramid-32", "float32", "contiguous")
    assert {"forward", "forward+backward", "tap"} <= modes.keys()
    head = machine.file.head
    assert head["machine"]["instruction_set"] == cases.instruction_set()
    assert head["machine"]["versions"]["torch"] == torch.__version__
    assert head["command"].startswith("python -m benchmarks.calls --set=quick")
    assert head["quick"]
    assert results.stat().st_size < 20_000


def test_a_command_names_no_folder_of_this_machine(monkeypatch):
    words = ["pytest", f"{ROOT}/benchmarks", "--results=/somewhere/else/calls.json"]
    monkeypatch.setattr(cases, "machine", lambda device: {})
    assert cases.header(words, "cpu")["command"] == "pytest benchmarks --results=calls.json"


def test_the_commit_is_told_where_there_is_no_history(monkeypatch):
    monkeypatch.setenv("FDKERNELS_COMMIT", "abc")
    cases.commit.cache_clear()
    assert cases.commit() == {"id": "abc", "dirty": None}
    cases.commit.cache_clear()


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("AMD EPYC", "amd-epyc"),
        ("Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz", "intel-xeon-platinum-8480c"),
        ("AMD Ryzen 9 7950X 16-Core Processor", "amd-ryzen-9-7950x"),
    ],
)
def test_results_lie_in_a_folder_for_the_kind_of_machine(monkeypatch, model, folder):
    monkeypatch.setattr(cases, "_cpu_model", lambda: model)
    assert cases.folder_name("cpu") == folder
