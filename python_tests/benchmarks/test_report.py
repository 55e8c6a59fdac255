from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.reasons import read_reasons
from benchmarks.results import read_files, read_results, write_results
from benchmarks.shortfalls import FIGURES
from benchmarks.steps_report import read_steps
from benchmarks.training_report import training_section

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MIB = 2**20
FAST = {"op": 0.002, "eager": 0.05, "compiled": 0.008, "bmm": 0.009, "floor": 0.002}


def spread(value):
    return {"median": value, "q1": value * 0.9, "q3": value * 1.1}


def entry(mode, first, seconds, **changes):
    ratios = {
        f"{name}/{first}": spread(value / seconds[first])
        for name, value in seconds.items()
        if name not in (first, "floor")
    }
    ratios[f"{first}/floor"] = spread(seconds[first] / seconds["floor"])
    return {
        "mode": mode,
        "case": "enc1-256",
        "dtype": "float32",
        "layout": "contiguous",
        "device": "cpu",
        "layers": ["4x64x256x256"],
        "mask": "256x256",
        "feature_bytes": 64 * MIB,
        "backend": "cpu",
        "rounds": 7,
        "seconds": {name: spread(value) for name, value in seconds.items()},
        "ratios": ratios,
        "peak_bytes": dict.fromkeys(seconds, 64 * MIB),
        "errors": {"op": {"loss": 1e-7, "gradient": 3e-7}},
        "left_out": {},
        **changes,
    }


def header(**machine):
    return {
        "machine": {
            "cpu_model": "Made-up CPU",
            "cpu_cores": 2,
            "cpu_cache_bytes": 32 * MIB,
            "threads": 2,
            "system": "Linux x86_64",
            "versions": {"fdkernels": "0.1.0", "torch": "9.9", "python": "3.99"},
            "build": {"cpp_compiler": "GNU 1", "isa": [], "cuda_version": None, "cuda_archs": []},
            "copy_bytes_per_second": {"cpu": 2e10, "cuda": 4e12},
            **machine,
        },
        "commit": {"id": "abc123", "dirty": True},
        "when": "2000-01-01",
        "command": "pytest benchmarks",
        "quick": False,
    }


def page_of(folder, entries, **machine):
    write_results(folder / "made-up" / "calls.json", header(**machine), entries)
    (folder / "summary.json").write_text('{"steps": []}')
    return report.report(read_files(folder), read_results(folder), {})


def write_step(folder, ratios, **changes):
    step = {
        "network": "unet",
        "mode": "compiled",
        "device": "cpu",
        "images": "2x3x128x128",
        "base_channels": 16,
        "parameters": 10,
        "rounds": 7,
        "seconds": {"without": spread(0.5), **{name: spread(0.5 * ratio) for name, ratio in ratios.items()}},
        "ratios": {f"{name}/without": spread(ratio) for name, ratio in ratios.items()},
        "peak_bytes": dict.fromkeys(("without", *ratios), 80 * MIB),
        "launches": {},
        "errors": {},
        "left_out": {"tap": "made-up reason"},
        **changes,
    }
    write_results(folder / "made-up" / "steps.json", header(), [step], kind="steps")


def write_training(folder, name="training", fields=(), **machine):
    def trained(milliseconds, gibibytes):
        quartiles = {"first_quartile": 0.9, "median": 1.0, "third_quartile": 1.1}
        return {
            "seconds_per_step": {key: value * milliseconds / 1e3 for key, value in quartiles.items()},
            "peak_bytes": gibibytes * 1024 * MIB,
            "loss": 0.5,
        }

    pair = {
        "preset": "tnbc-unet",
        "model": "unet",
        "dataset": "tnbc",
        "size": 512,
        "batch_size": 4,
        "base_channels": None,
        "precision": "32-true",
        "channels_last": False,
        "compile": False,
        "steps": 10,
        "without_loss": trained(100, 4),
        "with_loss": trained(102, 5),
        "ratio_of_medians": 1.02,
        **dict(fields),
    }
    head = {**header(**machine), "command": "python -m benchmarks.training"}
    write_results(folder / "made-up" / f"{name}.json", head, [pair], kind="training")


def test_the_page_shows_conditions_and_numbers(tmp_path):
    entries = [
        entry("forward", "op", FAST, peak_bytes=dict.fromkeys(FAST, 0)),
        entry("forward+backward", "op", FAST, ops={"op": 12, "eager": 40}),
        entry("kernel backward", "kernel", {"kernel": 0.00208, "floor": 0.002}),
        entry("tap", "tap", {"tap": 0.003, "separate": 0.006, "floor": 0.0025}),
    ]
    page = page_of(tmp_path, entries)
    for text in (
        "Made-up CPU, 2 cores, 2 threads, cache 32 MiB",
        "torch 9.9",
        "abc123, with changes",
        "2000-01-01",
        "`pytest benchmarks`",
        "50 (25 [22.5–27.5]×)",
        "1.04 [0.94–1.14]",
        "33.6 GB/s",
        "| `enc1-256` float32 contiguous | 3 | 6 | 2 [1.8–2.2]× | 1.20 [1.08–1.32] |",
        "| `enc1-256` float32 contiguous | – | – | 12 | 40 |",
        "In no case does a peer take less time.",
        "Every figure is reached.",
    ):
        assert text in page


def test_the_page_tells_where_we_lose_and_what_stands_in_the_way(tmp_path):
    slow = {**FAST, "op": 0.01}
    entries = [
        entry("forward", "op", slow),
        entry("forward+backward", "op", slow),
        entry("kernel backward", "kernel", {"kernel": 0.003, "floor": 0.002}),
    ]
    page = page_of(tmp_path, entries)
    lost = page[page.index("### Where we lose") : page.index("### Over the floors")]
    reasons = read_reasons()
    for text in (
        "| forward | 1.25 times the time of `compiled` (10 ms against 8 ms",
        "| forward+backward | 1.11 times the time of `bmm` (10 ms against 9 ms",
        "| `enc1-256` float32 contiguous | forward | 5.00 | 64 |",
        "| `enc1-256` float32 contiguous | kernel backward | 1.50 | 64 |",
        "| `enc1-256` float32 contiguous | forward+backward | 5.00 | 128 |",
        "| forward | 100.0% |",
        reasons["slower large"],
        reasons["floor kernel backward"],
    ):
        assert text in lost
    assert "Every figure is reached" not in page


def test_every_figure_has_its_reason():
    assert read_reasons().keys() == FIGURES.keys()


def test_a_reason_for_no_figure_is_refused(tmp_path):
    path = tmp_path / "reasons.md"
    path.write_text("Text.\n\n## warp speed\n\nBecause.\n")
    with pytest.raises(ValueError, match=r"a heading of reasons\.md must be one of .* got 'warp speed'"):
        read_reasons(path)


def test_the_series_by_size_is_told_as_a_share_of_the_copy_rate(tmp_path):
    entries = [
        entry(mode, "op", {"op": 0.01, "eager": 0.1, "floor": 0.008}, case="scaling-64")
        for mode in ("forward", "forward+backward")
    ]
    page = page_of(tmp_path, entries)
    # 64 MiB in 10 ms are 6.7 GB/s of 20; forward and backward move twice as much.
    assert "| 64 | 34% | 42% | 3% | – | – | 67% | 84% | 7% | – | – |" in page
    assert "`scaling-64`" not in page[page.index("### Over the floors") :]


def test_the_page_takes_the_times_of_the_device_where_there_are_any(tmp_path):
    on_device = {name: spread(value / 10) for name, value in FAST.items()}
    ratios = {
        f"{a}/{b}": spread(FAST[a] / FAST[b])
        for a, b in (("eager", "op"), ("compiled", "op"), ("bmm", "op"), ("op", "floor"))
    }
    entries = [
        entry(
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
    page = page_of(tmp_path, entries, **gpu)
    assert "## Made-up GPU" in page
    assert "| `enc1-256` float32 contiguous | 0.2 | 5 (25" in page
    assert "| `enc1-256` float32 contiguous | 2 | 50 (25" in page.split("### As the host sees it")[1]
    assert "| `enc1-256` float32 contiguous | 3 | 3 | 3 | 3 |" in page


def test_the_cost_of_a_step_stands_beside_the_calls_of_its_machine(tmp_path):
    write_step(tmp_path, {"op": 1.04, "plain": 1.3})
    page = page_of(tmp_path, [entry("forward+backward", "op", FAST)])
    for text in (
        "### Cost of a training step",
        "2x3x128x128, 16 base channels",
        "| unet | compiled | 500 | 1.040 [0.936–1.144] | – | 1.300 [1.170–1.430] | 80 | 80 | – | 80 |",
        "costs at most 1.040 (unet, compiled).",
        "unet, compiled: the opaque op is faster, by 25.0% of the step.",
        "`tap` is missing: made-up reason",
    ):
        assert text in page
    assert read_steps(read_files(tmp_path), "another machine", "cpu") == []


def test_a_step_on_a_gpu_is_held_to_its_figure(tmp_path):
    write_step(tmp_path, {"op": 1.01, "tap": 1.005}, device="cuda")
    (step,) = read_steps(read_files(tmp_path), "made-up", "cuda")
    text = report.steps_section([step], "cuda")
    assert "costs at most 1.005 (unet, compiled), where at most 1.02 is asked for." in text


def test_trainings_stand_beside_those_without_the_loss(tmp_path):
    before = page_of(tmp_path, [entry("forward+backward", "op", FAST)])
    assert "## Training" not in before
    write_training(tmp_path, gpu="Made-up GPU")
    page = page_of(tmp_path, [entry("forward+backward", "op", FAST)])
    section = page[page.index("## Training") :]
    for text in (
        "- Made-up GPU, fdkernels 0.1.0, torch 9.9\n",
        "- Commit: abc123, with changes\n",
        "- Measured: 2000-01-01, by `python -m benchmarks.training`\n",
        "- Timed steps: 10; width: published width\n",
        "| unet | tnbc | 4x3x512x512 | 32-true | 100.0 [90.0–110.0] | 102.0 [91.8–112.2] | 1.020 |",
        "| 1.020 | 25.00 | 25.50 | 4.00 | 5.00 | 1.250 |",
    ):
        assert text in section
    assert page.startswith(before)


def test_trainings_of_other_precisions_have_tables_of_their_own(tmp_path):
    write_training(tmp_path, gpu="Made-up GPU")
    half = {"precision": "bf16-mixed", "channels_last": True, "compile": True, "base_channels": 16}
    write_training(tmp_path, "training-half", half, gpu="Made-up GPU")
    text = training_section(read_files(tmp_path))
    assert text.count("## Training") == 1
    assert text.count("- Made-up GPU") == text.count("| network |") == 2
    assert "| bf16-mixed, channels_last, compiled |" in text
    assert "width: 16 base channels" in text


def test_the_memory_of_a_process_is_not_listed(tmp_path):
    write_training(tmp_path)
    text = training_section(read_files(tmp_path))
    assert "- Made-up CPU, " in text
    assert "Memory is not listed: on a CPU it is that of the process since its beginning" in text
    assert "GiB" not in text


def test_a_page_of_trainings_alone_has_something_measured(tmp_path):
    write_training(tmp_path)
    page = report.report(read_files(tmp_path), read_results(tmp_path), {})
    assert "## Training" in page
    assert "Nothing has been measured yet." not in page


def test_bytes_launches_and_instructions_have_their_sections(tmp_path):
    counted = {
        "case": "enc1-512",
        "num_layers": 1,
        "feature_bytes": 100 * MIB,
        "stages": [
            {"name": "region_sums forward", "read": 101 * MIB, "written": 0},
            {"name": "region_sums backward", "read": MIB, "written": 100 * MIB},
        ],
        "tap_bytes": [201 * MIB, 401 * MIB],
        "forward": {"sums_kernel": 2, "aten::mean": 1},
        "backward": {},
    }
    write_results(tmp_path / "launches.json", header(), [counted], kind="launches")
    figure = {"figure": "kernel forward", "instructions": 1234567, "instruction_set": "avx2"}
    write_results(tmp_path / "instructions-x.json", header(), [figure], kind="instructions")
    page = page_of(tmp_path, [])
    assert "| `enc1-512` | 100 | 101 + 0 | 1 + 100 | 1.010 | 201 against 401 |" in page
    assert "| `enc1-512` | 1 | 3 | 2 × sums_kernel, 1 × aten::mean | 0 | – |" in page
    assert "| kernel forward | 1,234,567 |" in page
    assert "kernels of avx2" in page


def test_without_results_the_page_says_so(tmp_path):
    assert "Nothing has been measured yet." in report.report([], read_results(tmp_path), {})


def test_results_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "calls.json"
    write_results(path, header(), [entry("forward", "op", FAST)])
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_results(path, header(), [entry("forward", "op", FAST, feature_bytes=float("nan"))])
    assert path.read_text() == before
    assert [file.name for file in path.parent.iterdir()] == ["calls.json"]
    assert json.loads(before)["measurements"][0]["case"] == "enc1-256"


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "latest.json").write_text("")
    with pytest.raises(ValueError, match=r"latest\.json is not JSON"):
        read_results(tmp_path)


def test_pictures_are_drawn_for_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    entries = [entry(mode, "op", FAST) for mode in ("forward", "forward+backward")]
    for size in (32, 64):
        entries += [
            entry(mode, "op", FAST, case=f"scaling-{size}", feature_bytes=size * MIB)
            for mode in ("forward", "forward+backward")
        ]
    write_step(tmp_path, {"op": 1.04, "plain": 1.3})
    page_of(tmp_path, entries)
    files, results = read_files(tmp_path), read_results(tmp_path)
    pictures = report.draw_all(files, results, tmp_path, tmp_path)
    assert set(pictures) == {f"made-up/cpu-{name}" for name in ("scaling", "times", "memory", "steps")}
    for address in pictures.values():
        assert (tmp_path / address).read_bytes().startswith(b"\x89PNG")
    page = report.report(files, results, pictures)
    assert "![Cost of the loss in a training step](made-up/cpu-steps.png)" in page


def test_the_committed_page_is_made_from_the_committed_results():
    files, results = read_files(BENCHMARKS / "results"), read_results(BENCHMARKS / "results")
    page = BENCHMARKS / "README.md"
    if not results or not page.is_file():
        pytest.skip("nothing has been measured yet")
    pictures = {
        report.picture_name(part, name): f"results/{report.picture_name(part, name)}.png"
        for part in results
        for name in ("scaling", "times", "memory", "steps")
        if (BENCHMARKS / "results" / f"{report.picture_name(part, name)}.png").is_file()
    }
    assert page.read_text(encoding="utf-8") == report.report(files, results, pictures)
