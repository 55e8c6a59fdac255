from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from benchmarks import classes
from benchmarks.cases import write_results
from benchmarks.class_tables import class_losses, class_rows, class_tables
from benchmarks.classes import FORMS, Form, by_einsum, class_case, cpu_samples, measure, one_by_one
from benchmarks.markdown import FORWARD, STEP
from benchmarks.page import page, read_files, tables
from fdkernels import backends

MIB = 2**20
SMALL = replace(
    class_case("map-128", torch.float32, "contiguous", "cpu"), layers=((4, 3, 16, 16),), mask_size=(16, 16)
)
FISHER_4 = {
    "form": "fisher-4",
    "case": "map-128",
    "dtype": "float32",
    "layout": "contiguous",
    "device": "cpu",
}

needs_extension = pytest.mark.skipif(
    backends()["cpu"] is not None, reason=f"backend cpu: {backends()['cpu']}"
)


@pytest.fixture(autouse=True)
def one_thread():
    """As the benchmark runs; two threads on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@needs_extension
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_everyone_agrees_with_the_truth(form):
    names = {"op", "binary", "einsum", "floor"} | ({"single calls"} if form.mode != "binary" else set())
    entries = list(measure(SMALL, form, compiled=False, budget=0))
    assert [entry["mode"] for entry in entries] == [FORWARD, STEP]
    for entry in entries:
        assert entry["seconds"].keys() == names
        assert entry["errors"].keys() == names - {"binary", "floor"}


@needs_extension
def test_several_layers_agree_with_the_truth():
    levels = replace(SMALL, layers=((4, 3, 16, 16), (4, 5, 8, 8)), layout="channels_last")
    assert len(list(measure(levels, FORMS[1], compiled=False, budget=0))) == 2


@needs_extension
def test_a_wrong_peer_is_named_and_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(classes, "by_einsum", lambda *inputs: 1.01 * by_einsum(*inputs).square())
    with pytest.raises(AssertionError, match=r"of op is wrong for fisher-4, map-128-float32-contiguous-cpu"):
        next(measure(SMALL, FORMS[-1], compiled=False, budget=0))


def test_the_plain_loss_of_two_pixels_is_the_one_by_hand():
    # Classes 0 and 1 hold a pixel each, with features 3 and 1: means over both pixels differ by 1.
    layers, planes = [torch.tensor([[[3.0, 1.0]]])], torch.eye(2)[None]
    for sums_of in (by_einsum, one_by_one):
        assert classes.plain(layers, planes, Form("multiclass", 2), sums_of).item() == 0
    # Four pixels, two a class: means 3 and 1, variances 1 and 0.25.
    layers = [torch.tensor([[[2.0, 4.0, 0.5, 1.5]]])]
    planes = torch.eye(2).repeat_interleave(2, dim=1)[None]
    found = classes.plain(layers, planes, Form("binary", 2, "fisher"), by_einsum).item()
    assert found == pytest.approx(-0.5 * math.log(4 / 1.25))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_sample_holds_every_class(form):
    inputs = classes.make_class_inputs(SMALL, form)
    assert inputs.planes.flatten(2).sum(-1).min() > 0
    if form.mode == "multilabel":
        assert inputs.planes.sum(1).max() > 1
    else:
        assert torch.equal(inputs.planes.sum(1), torch.ones(4, 16, 16))


def test_cpu_samples_take_turns():
    order = []
    functions = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = cpu_samples(functions, budget=0)
    assert {len(values) for values in samples.values()} == {classes.MIN_ROUNDS}
    timed = order[6:]  # after the two calls of each that tell how many rounds there are
    assert timed[:12] == list("bbccaa") + list("ccaabb")


def spread(value):
    return {"median": value, "q1": value * 0.9, "q3": value * 1.1}


def entry(mode, seconds, peaks, **changes):
    ratios = {
        f"{name}/op": spread(value / seconds["op"])
        for name, value in seconds.items()
        if name not in ("op", "floor")
    }
    ratios["op/floor"] = spread(seconds["op"] / seconds["floor"])
    return {
        **FISHER_4,
        "mode": mode,
        "feature_bytes": 16 * MIB,
        "seconds": {name: spread(value) for name, value in seconds.items()},
        "ratios": ratios,
        "peak_bytes": {name: int(share * 16 * MIB) for name, share in peaks.items()},
        **changes,
    }


SECONDS = {"op": 0.004, "binary": 0.003, "single calls": 0.012, "einsum": 0.002, "floor": 0.002}
PEAKS = {"op": 1.02, "binary": 1.0, "single calls": 2.0, "einsum": 4.0, "floor": 1.0}
ENTRIES = [
    entry(STEP, SECONDS, PEAKS),
    entry(FORWARD, {**SECONDS, "einsum": 0.003}, PEAKS),
    entry(FORWARD, {**SECONDS, "einsum": 0.0025}, PEAKS, form="multiclass-4"),
    entry(STEP, {**SECONDS, "einsum": 0.008}, PEAKS, layout="channels_last"),
]


def test_the_page_has_a_row_for_each_form_of_the_first_case():
    rows = class_rows({"A": ENTRIES, "B": ENTRIES[1:]}).splitlines()
    assert rows[0] == (
        "| form | A over floors | A single calls | A einsum | A compiled | A memory, op / einsum "
        "| B over floors | B single calls | B einsum | B compiled | B memory, op / einsum |"
    )
    cells = "2.00 | 3× | **0.5×** | – | 2.0% / 300.0% | – | – | – | – | – |"
    assert rows[2:] == [f"| `fisher-4`, `map-128` float32 contiguous | {cells}"]


def test_the_worst_loss_of_each_mode_is_named():
    where = "(`{}`, `map-128` float32 contiguous"
    assert dict(class_losses({"A": ENTRIES, "B": ENTRIES[3:]})) == {
        STEP: f"A 2.00 times the time of `einsum` {where.format('fisher-4')})",
        FORWARD: f"A 1.60 times the time of `einsum` {where.format('multiclass-4')}, 2 in all)",
    }


def test_the_tables_have_times_and_memory_of_everyone():
    text = class_tables(ENTRIES)
    assert "### Forward+backward, ms" in text
    cells = "16 | 4, 2 [1.8–2.2] | 3, 0.75 [0.675–0.825] | 12, 3 [2.7–3.3] | 2, 0.5 [0.45–0.55] | 2 |"
    assert f"| `fisher-4`, `map-128` float32 contiguous | {cells}" in text
    assert "| `fisher-4`, `map-128` float32 contiguous | 16 | 2.0% | 0.0% | 100.0% | 300.0% | 0.0% |" in text


def test_classes_stand_with_the_machine_whose_folder_they_lie_in(tmp_path):
    about = {
        "cpu_model": "Made-up CPU",
        "cpu_cores": 2,
        "cpu_cache_bytes": 0,
        "threads": 1,
        "system": "Linux",
    }
    about |= {"versions": {"torch": "9.9"}, "copy_bytes_per_second": {"cpu": 2e10}}
    about["build"] = {"cpp_compiler": "GNU 1", "isa": [], "cuda_version": None, "cuda_archs": []}
    head = {
        "machine": about,
        "commit": {"id": "abc123"},
        "when": "2000-01-01",
        "command": "x",
        "quick": False,
    }
    calls = entry(STEP, SECONDS, PEAKS, mask="128x128", layers=[], backend="cpu", rounds=7, left_out={})
    assert "Nothing of it has been measured yet." in page([])
    write_results(tmp_path / "first" / "calls.json", head, [calls])
    timed = {**head, "clock": "CPU time of one thread", "load": [3.5, 4.25]}
    write_results(tmp_path / "first" / "classes.json", timed, ENTRIES, "classes")
    write_results(tmp_path / "other" / "classes.json", timed, ENTRIES[:1], "classes")
    files = read_files(tmp_path)
    text = " ".join(page(files).split())
    assert "| `fisher-4`, `map-128` float32 contiguous | 2.00 | 3× | **0.5×** |" in text
    assert "slower than a peer**: forward+backward A 2.00 times the time of `einsum`" in text
    assert "Times are CPU time of one thread; load average 3.5 to 4.25" in " ".join(tables(files).split())
