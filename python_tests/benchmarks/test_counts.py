from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from benchmarks import cases, counts, instructions
from benchmarks.cases import named_case
from benchmarks.counts import byte_counts, peak_bytes, tap_bytes
from fdkernels import backends


def plain_case(name):
    return named_case(name, torch.float32, "contiguous", "cpu")


def test_instructions_of_a_call_are_the_difference_of_k_and_2k_calls():
    # Before the first mark, then for each figure k calls, 2k calls, and what lies between them and the next.
    totals = [9999, 100, 1040, 2040, 50, 640, 1240]
    found = instructions.per_call(totals, ["a", "b"])
    assert found == [{"figure": "a", "instructions": 250}, {"figure": "b", "instructions": 150}]


def test_marks_that_callgrind_did_not_see_are_an_error():
    with pytest.raises(RuntimeError, match=r"callgrind must see 3 marks, .* got 2"):
        instructions.per_call([1, 2], ["a"])


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
    assert counts.main(["instructions"]) == 2
    assert "valgrind is missing" in capsys.readouterr().err


@pytest.mark.parametrize(("limit", "status"), [("9", 1), ("11", 0)])
def test_a_rise_beyond_the_limit_fails(monkeypatch, tmp_path, capsys, limit, status):
    def counted(now):
        return [{"figure": "a", "instructions": now, "instruction_set": "avx2"}]

    path = tmp_path / "instructions.json"
    monkeypatch.setattr(shutil, "which", lambda name: "valgrind")
    monkeypatch.setattr(cases, "header", lambda command, device: {})
    for now, expected in ((100, 0), (110, status)):
        monkeypatch.setattr(instructions, "count", lambda valgrind, now=now: counted(now))
        assert counts.main(["instructions", f"--output={path}", f"--limit={limit}"]) == expected
    assert json.loads(path.read_text())["measurements"] == counted(110)
    assert ("risen by more than 9 %" in capsys.readouterr().err) == (status == 1)


def test_the_driver_marks_each_figure_three_times():
    calls, k = [], instructions.CALLS
    assert instructions.drive(lambda: calls.append("mark"), {"a": lambda: calls.append("a")}) == ["a"]
    warm = ["a"] * instructions.WARM_CALLS
    assert calls == [*warm, "mark", *["a"] * k, "mark", *["a"] * 2 * k, "mark"]


@pytest.mark.skipif(backends()["cpu"] is not None, reason=f"backend cpu: {backends()['cpu']}")
def test_every_figure_can_be_called_and_is_one_of_the_last_count():
    figures = instructions.figures()
    for function in figures.values():
        function()
    counted = json.loads((counts.RESULTS / "instructions-x86_64.json").read_text())["measurements"]
    assert list(figures) == [entry["figure"] for entry in counted]


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or backends()["triton"] is not None,
    reason="kernels are counted by Triton's interpreter, with TRITON_INTERPRET=1",
)
def test_the_interpreter_counts_every_launch_of_a_pyramid():
    case = named_case("pyramid-32", torch.float32, "contiguous", "cpu").shrunk()
    found = counts.launches(case)
    ours = {way: {k: n for k, n in of_way.items() if k.endswith("_kernel")} for way, of_way in found.items()}
    assert sum(ours["forward"].values()) == 2
    assert sum(ours["backward"].values()) == 1
    assert found == counts.launches(case)
    # A view launches nothing, an addition does.
    x = torch.ones(4)
    assert counts.count_launches(lambda: x.view(2, 2).transpose(0, 1)) == {}
    assert counts.count_launches(lambda: x + 1) == {"aten::add": 1}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the profiler, about what it cannot trace here
def test_peak_memory_is_what_is_alive_at_once():
    def two_at_once_of_three():
        first = torch.zeros(1000, 1000)
        second = first + 1
        del first
        return second, torch.zeros(10)

    assert peak_bytes(two_at_once_of_three, "cpu") == pytest.approx(8_000_000, abs=100)


def test_bytes_of_a_call_are_those_worked_out_by_hand():
    passes = {one.name: one for one in byte_counts(plain_case("enc1-128"))}
    features, mask, sums = 4 * 64 * 128**2 * 4, 4 * 128**2 * 4, 2 * 4 * (64 + 1) * 4
    # A mask of the layer's size is read as it is: nothing is made.
    assert passes["masks"][1:] == (0, 0)
    assert passes["sums"][1:] == (features + mask, sums)
    assert passes["losses and slopes"][1:] == (sums, sums + 4)
    assert passes["gradient"][1:] == (sums + 4 + mask, features)


def test_pixels_to_ignore_need_two_weights():
    masks = byte_counts(plain_case("ignore-256"))[0]
    assert masks.read == 4 * 256**2  # uint8
    assert masks.written == 2 * 4 * 256**2 * 4


def test_tap_saves_two_transfers_of_the_features():
    case = plain_case("enc1-128")
    by_tap, separate = tap_bytes(case)
    assert separate - by_tap == 2 * case.feature_bytes
