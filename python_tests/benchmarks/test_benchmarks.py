from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import peers, prepared, report
from benchmarks.cases import (
    BASE_CHANNELS,
    BATCH,
    CPU_NAMES,
    PYRAMIDS,
    TAPS,
    Inputs,
    cases,
    make_inputs,
    named_case,
)
from benchmarks.memory import peak_bytes
from benchmarks.prepared import Prepared
from benchmarks.results import read_results
from benchmarks.timing import Rounds, quartiles, summarize
from benchmarks.truth import Truth
from fdkernels import backends, models

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = [case.shrunk() for case in cases("cpu")]

needs_extension = pytest.mark.skipif(
    backends()["cpu"] is not None, reason=f"backend cpu: {backends()['cpu']}"
)


@needs_extension
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_everyone_agrees_with_the_truth(case):
    Prepared(case, compiled=False).require_agreement()


@needs_extension
@pytest.mark.slow
@pytest.mark.parametrize("name", ["enc1-128", "pyramid-32"])
def test_compiled_agrees_with_the_truth(name):
    ready = Prepared(named_case(name, torch.float32, "contiguous", "cpu").shrunk())
    ready.require_agreement()
    assert "compiled" in ready.losses or "compiled" in ready.left_out


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_everyone_agrees_with_the_truth_on_cuda():
    for case in cases("cuda"):
        Prepared(case.shrunk(), compiled=False).require_agreement()


@needs_extension
def test_a_wrong_peer_is_named_and_nothing_is_timed(monkeypatch):
    right = peers.two_column_bmm
    monkeypatch.setattr(peers, "two_column_bmm", lambda *inputs: 1.01 * right(*inputs))
    ready = Prepared(SMALL[0], compiled=False)
    with pytest.raises(AssertionError, match=r"loss of bmm is wrong for enc1-256-float32-cont"):
        ready.measure(None, "forward", ready.losses, budget=0)


@needs_extension
def test_a_wrong_kernel_is_named(monkeypatch):
    monkeypatch.setattr(prepared.Kernels, "forward", lambda self: (2 * self.grad_sums, None))
    with pytest.raises(AssertionError, match="kernel forward is wrong"):
        Prepared(SMALL[0], compiled=False).require_agreement()


def test_the_truth_of_two_pixels_is_that_by_hand():
    layers = [torch.tensor([[[[3.0, 1.0]]]], requires_grad=True)]
    truth = Truth(Inputs(layers, torch.tensor([[[[1.0, 0.0]]]])))
    # f = 3/2, b = 1/2, L = -log(1) = 0; dL/df = -2 (f - b) / D = -2, so dL/dF = -1 and +1.
    assert truth.loss == pytest.approx(0, abs=1e-9)
    assert truth.gradient_error([torch.tensor([[[[-1.0, 1.0]]]])]) < 1e-9
    assert truth.gradient_error([torch.tensor([[[[1.0, 1.0]]]])]) == pytest.approx(2**0.5)
    assert truth.gradient_error([None]) == float("inf")


def test_the_pyramid_has_the_taps_of_the_unet():
    with torch.device("meta"):
        model = models.create("unet", base_channels=BASE_CHANNELS)
        images = torch.empty(BATCH, 3, 256, 256)
    shapes = {}
    for name in model.tap_names:
        module = model.get_submodule(name)
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: shapes.update({name: tuple(output.shape)})
        )
    model(images)
    pyramid = named_case("pyramid-256", torch.float32, "contiguous", "cpu")
    assert list(TAPS) == list(model.tap_names)
    assert [shapes[name] for name in TAPS] == list(pyramid.layers)


def test_the_case_at_half_the_size_is_that_of_the_issue():
    assert named_case("enc1-128", torch.float32, "contiguous", "cpu").layers == ((4, 64, 128, 128),)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_inputs_are_as_the_case_says(case):
    layers, mask = make_inputs(case)
    assert [tuple(layer.shape) for layer in layers] == list(case.layers)
    assert sum(layer.nbytes for layer in layers) == case.feature_bytes
    assert all(layer.requires_grad and layer.is_leaf for layer in layers)
    if case.layout == "channels_last":
        assert all(layer.is_contiguous(memory_format=torch.channels_last) for layer in layers)
    assert mask.unique().tolist() == [0, 1]


def test_every_case_is_there_in_two_dtypes_and_two_layouts():
    assert len({case.id for case in cases("cpu")}) == 4 * len(CPU_NAMES)
    assert {name.split("-")[0] for name in CPU_NAMES} > set(PYRAMIDS)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the profiler, about what it cannot trace here
def test_peak_memory_is_what_is_alive_at_once():
    def two_at_once_of_three():
        first = torch.zeros(1000, 1000)
        second = first + 1
        del first
        return second, torch.zeros(10)

    assert peak_bytes(two_at_once_of_three, "cpu") == pytest.approx(8_000_000, abs=100)


class FakeBenchmark:
    """Does rounds as pytest-benchmark does, without a clock."""

    disabled = True

    def pedantic(self, target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()


def test_a_round_times_everyone_once():
    calls = {"op": 0, "eager": 0, "floor": 0}

    def call(name):
        calls[name] += 1

    functions = {name: lambda name=name: call(name) for name in calls}
    rounds = Rounds(functions, "op", "cpu")
    assert rounds.run(FakeBenchmark(), budget=0) == {}
    assert len(rounds.samples["eager"]) == len(rounds.samples["floor"])
    assert len(set(calls.values())) == 1


def test_ratios_are_those_of_the_same_round():
    samples = {"op": [1.0, 2.0, 4.0], "eager": [3.0, 6.0, 12.0]}
    seconds, ratios = summarize(samples, [("eager", "op")])
    assert seconds["op"] == {"median": 2.0, "q1": 1.5, "q3": 3.0}
    assert ratios == {"eager/op": {"median": 3.0, "q1": 3.0, "q3": 3.0}}


def test_quartiles_keep_five_digits():
    assert quartiles([0.000123456789] * 3)["median"] == 0.00012346


def _spread(value):
    return {"median": value, "q1": value * 0.9, "q3": value * 1.1}


def _entry(mode, first, seconds, **changes):
    times = {name: _spread(value) for name, value in seconds.items()}
    ratios = {
        f"{name}/{first}": _spread(value / seconds[first])
        for name, value in seconds.items()
        if name not in (first, "floor")
    }
    ratios[f"{first}/floor"] = _spread(seconds[first] / seconds["floor"])
    info = {
        "mode": mode,
        "case": "enc1-256",
        "dtype": "float32",
        "layout": "contiguous",
        "device": "cpu",
        "layers": ["4x64x256x256"],
        "mask": "256x256",
        "feature_bytes": 64 * 2**20,
        "backend": "cpu",
        "rounds": 7,
        "seconds": times,
        "ratios": ratios,
        "peak_bytes": dict.fromkeys(seconds, 64 * 2**20),
        "errors": {"op": {"loss": 1e-7, "gradient": 3e-7}},
        "left_out": {},
    }
    return {"extra_info": {**info, **changes}}


def _write(folder, entries, **machine):
    content = {
        "machine_info": {
            "cpu_model": "Made-up CPU",
            "cpu_cores": 2,
            "cpu_cache_bytes": 32 * 2**20,
            "threads": 2,
            "system": "Linux x86_64",
            "versions": {"fdkernels": "0.1.0", "torch": "9.9"},
            "build": {"cpp_compiler": "GNU 1", "isa": [], "cuda_version": None, "cuda_archs": []},
            "copy_bytes_per_second": {"cpu": 2e10, "cuda": 4e12},
            **machine,
        },
        "commit_info": {"id": "abc123", "dirty": True},
        "datetime": "2000-01-01",
        "command": "pytest benchmarks",
        "quick": False,
        "benchmarks": entries,
    }
    (folder / "made-up.json").write_text(json.dumps(content))
    (folder / "summary.json").write_text('{"steps": []}')
    return read_results(folder)


FAST = {"op": 0.002, "eager": 0.05, "compiled": 0.008, "bmm": 0.009, "floor": 0.002}


def test_the_page_shows_conditions_and_numbers(tmp_path):
    entries = [
        _entry("forward", "op", FAST, peak_bytes=dict.fromkeys(FAST, 0)),
        _entry("forward+backward", "op", FAST),
        _entry("kernel backward", "kernel", {"kernel": 0.00208, "floor": 0.002}),
    ]
    page = report.report(_write(tmp_path, entries), {})
    for text in (
        "Made-up CPU, 2 cores, 2 threads, cache 32 MiB",
        "torch 9.9",
        "abc123, with changes",
        "2000-01-01",
        "`pytest benchmarks`",
        "50 (25 [22.5–27.5]×)",
        "1.04 [0.94–1.14]",
        "33.6 GB/s",
        "In no case does a peer take less time than the op.",
        "Every figure is reached.",
    ):
        assert text in page


def test_the_page_tells_where_we_lose(tmp_path):
    slow = {**FAST, "op": 0.01}
    entries = [
        _entry("forward", "op", slow),
        _entry("forward+backward", "op", slow),
        _entry("kernel backward", "kernel", {"kernel": 0.003, "floor": 0.002}),
    ]
    page = report.report(_write(tmp_path, entries), {})
    lost = page[page.index("### Where we lose") : page.index("### Over the floors")]
    for text in (
        "| forward | slower than `compiled` | 1.25 times its time (10 ms against 8 ms",
        "| forward+backward | slower than `bmm` | 1.11 times its time (10 ms against 9 ms",
        "| forward | time over that of the floor, beyond the cache | 5.00 | ≤ 1.10 |",
        "| kernel backward | time over that of the floor, beyond the cache | 1.50 | ≤ 1.10 |",
        "| forward | peak memory beyond the gradient, of the features' bytes | 100.0% | < 1% |",
    ):
        assert text.replace("100.0%", "100%") in lost.replace("100.0%", "100%")
    assert "Every figure is reached" not in page


def test_the_page_takes_the_times_of_the_device_where_there_are_any(tmp_path):
    on_device = {name: _spread(value / 10) for name, value in FAST.items()}
    ratios = {
        f"{a}/{b}": _spread(FAST[a] / FAST[b])
        for a, b in (("eager", "op"), ("compiled", "op"), ("bmm", "op"), ("op", "floor"))
    }
    entries = [
        _entry(
            mode,
            "op",
            FAST,
            device="cuda",
            device_seconds=on_device,
            device_ratios=ratios,
            launches=dict.fromkeys(FAST, 3),
        )
        for mode in ("forward", "forward+backward")
    ]
    gpu = {
        "gpu": "Made-up GPU",
        "gpu_memory_bytes": 2**34,
        "gpu_cache_bytes": 2**25,
        "gpu_multiprocessors": 7,
    }
    page = report.report(_write(tmp_path, entries, **gpu), {})
    assert "## Made-up GPU" in page
    assert "| `enc1-256` float32 contiguous | 0.2 | 5 (25" in page
    assert "| `enc1-256` float32 contiguous | 2 | 50 (25" in page.split("### As the host sees it")[1]
    assert "| `enc1-256` float32 contiguous | 3 | 3 | 3 | 3 |" in page


def test_without_results_the_page_says_so(tmp_path):
    assert "Nothing has been measured yet." in report.report(read_results(tmp_path), {})


def test_a_run_that_was_broken_off_is_named(tmp_path):
    (tmp_path / "latest.json").write_text("")
    with pytest.raises(ValueError, match=r"latest\.json is not JSON"):
        read_results(tmp_path)


def test_the_committed_page_is_made_from_the_committed_results():
    results = read_results(BENCHMARKS / "results")
    page = BENCHMARKS / "README.md"
    if not results or not page.is_file():
        pytest.skip("nothing has been measured yet")
    pictures = {
        name: f"results/{name}"
        for name in map(report.picture_name, results)
        if (BENCHMARKS / "results" / name).is_file()
    }
    assert page.read_text(encoding="utf-8") == report.report(results, pictures)


@pytest.mark.skipif(sys.platform == "win32", reason="the suite is a bash script")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_the_gpu_suite_says_that_there_is_no_device(tmp_path):
    script = BENCHMARKS / "gpu_suite.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run(
        ["bash", str(script), str(tmp_path / "out")],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()
