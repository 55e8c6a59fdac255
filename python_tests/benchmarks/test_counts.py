from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
import torch

from benchmarks import instructions
from benchmarks.cases import named_case
from fdkernels import backends


def test_instructions_of_a_call_are_the_difference_of_k_and_2k_calls():
    # Before the first mark, then for each figure k calls, 2k calls, and what lies between them and the next.
    totals = [9999, 100, 1040, 2040, 50, 640, 1240]
    called = [{"figure": "a", "calls": 4}, {"figure": "b", "calls": 4}]
    found = instructions.per_call(totals[1:], called, "avx2")
    assert [(entry["figure"], entry["instructions"]) for entry in found] == [("a", 250), ("b", 150)]


def test_marks_that_callgrind_did_not_see_are_an_error():
    with pytest.raises(RuntimeError, match=r"callgrind must see 3 marks, .* got 2"):
        instructions.per_call([1, 2], [{"figure": "a", "calls": 4}], "avx2")


def test_the_total_of_a_dump_is_read():
    assert instructions.total_of("events: Ir\nfn=(1)\n1 5\n\ntotals: 12345\n") == 12345
    with pytest.raises(RuntimeError, match="a dump of callgrind must have a line"):
        instructions.total_of("")


def test_the_change_of_each_figure_is_printed(capsys):
    entries = [{"figure": "a", "instructions": 110}, {"figure": "b", "instructions": 7}]
    assert instructions.compare({"a": 100, "c": 1}, entries) == [pytest.approx(10)]
    printed = capsys.readouterr().out
    assert "+10.00%" in printed
    assert "new" in printed
    assert "gone" in printed


def test_without_valgrind_a_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["instructions"])
    with pytest.raises(SystemExit, match="2"):
        instructions.main()
    assert "valgrind is missing" in capsys.readouterr().err


def test_the_driver_marks_each_figure_three_times():
    from benchmarks import instruction_driver

    calls = []
    done = instruction_driver.run(lambda: calls.append("mark"), {"a": lambda: calls.append("a")})
    k = done[0]["calls"]
    warm = instruction_driver._WARM_CALLS
    assert calls == ["a"] * warm + ["mark"] + ["a"] * k + ["mark"] + ["a"] * 2 * k + ["mark"]


@pytest.mark.skipif(backends()["cpu"] is not None, reason=f"backend cpu: {backends()['cpu']}")
def test_every_figure_of_the_driver_can_be_called():
    from benchmarks import instruction_driver

    figures = instruction_driver.figures()
    for function in figures.values():
        function()
    assert {name.split()[0] for name in figures} == {"kernel", "op", "criterion"}


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or backends()["triton"] is not None,
    reason="kernels are counted by Triton's interpreter, with TRITON_INTERPRET=1",
)
def test_the_interpreter_counts_every_launch_of_a_pyramid():
    from benchmarks.launches import count_launches, launches

    case = named_case("pyramid-32", torch.float32, "contiguous", "cpu").shrunk()
    found = launches(case)
    forward = [name for name in found["forward"] if name.endswith("_kernel")]
    backward = [name for name in found["backward"] if name.endswith("_kernel")]
    assert any(name.startswith("region_sums") for name in forward)
    assert any(name.startswith("region_sums") for name in backward)
    assert found == launches(case)
    # A view launches nothing, an addition does.
    x = torch.ones(4)
    assert count_launches(lambda: x.view(2, 2).transpose(0, 1)) == {}
    assert count_launches(lambda: x + 1) == {"aten::add": 1}


def test_results_of_instructions_are_compared_with_the_file_that_is_there(tmp_path):
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps({"measurements": [{"figure": "a", "instructions": 5}]}))
    assert instructions._read(path) == {"a": 5}
    assert instructions._read(tmp_path / "none.json") == {}
