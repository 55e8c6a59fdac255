from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import page as pages
from benchmarks.cases import write_results
from benchmarks.page import ROWS, TARGETS, machines_of, missed_targets, page, read_files, tables

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MIB = 2**20
FAST = {"op": 0.002, "eager": 0.05, "compiled": 0.008, "bmm": 0.009, "floor": 0.002}
SLOW = {**FAST, "op": 0.06}
BOTH = ("forward", "forward+backward")
GPU = {"gpu": "Made-up GPU", "gpu_memory_bytes": 2**34, "gpu_cache_bytes": 2**25}


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


def measured(folder, entries, machine="made-up", **about):
    """The files of a folder, in which a machine has these calls."""
    write_results(folder / machine / "calls.json", header(**about), entries)
    (folder / "summary.json").write_text('{"steps": []}')  # of the suite, no measurement
    return read_files(folder)


def lost(seconds=SLOW, **changes):
    """Entries that miss every target."""
    kernel = {"kernel": 0.003, "floor": 0.002}
    calls = [entry(mode, "op", {**seconds, "single calls": 0.05}, **changes) for mode in BOTH]
    small = entry("forward+backward", "op", SLOW, case="enc1-128", feature_bytes=MIB, layers=["1x1"])
    return [*calls, entry("kernel backward", "kernel", kernel, **changes), small]


def a_step(ratios, **changes):
    return {
        "network": "unet",
        "mode": "compiled",
        "device": "cpu",
        "images": "2x3x128x128",
        "base_channels": 16,
        "rounds": 7,
        "seconds": {"without": spread(0.5), **{name: spread(0.5 * ratio) for name, ratio in ratios.items()}},
        "ratios": {f"{name}/without": spread(ratio) for name, ratio in ratios.items()},
        "peak_bytes": dict.fromkeys(("without", *ratios), 80 * MIB),
        "launches": {},
        "errors": {},
        "left_out": {"tap": "made-up reason"},
        **changes,
    }


def test_the_page_names_the_machine_and_its_numbers(tmp_path):
    kernels = [
        entry(f"kernel {way}", "kernel", {"kernel": 0.00208, "floor": 0.002})
        for way in ("forward", "backward")
    ]
    files = measured(
        tmp_path, [*(entry(mode, "op", FAST) for mode in BOTH), *kernels], instruction_set="avx2"
    )
    text = page(files, "results")
    for part in (
        "- **A**: [Made-up CPU](results/made-up/tables.md), 2 cores, avx2, cache 32 MiB,",
        "a copy moves 20 GB/s; torch 9.9,",
        "commit abc123,",
        "4 times as fast as the best peer",
        "25 times as fast as eager",
        "| `enc1-256` float32 contiguous | 1.04 | 1.04 | 25× | 4× | 4.5× |",
    ):
        assert part in " ".join(text.split("\n  "))


def test_where_nothing_is_lost_the_page_says_so(tmp_path):
    files = measured(
        tmp_path,
        [entry(mode, "op", FAST, peak_bytes={"op": 64 * MIB * (mode != "forward")}) for mode in BOTH],
    )
    assert missed_targets(machines_of(files)[0]) == []
    assert "Nowhere: every figure is held." in page(files)


def test_the_page_tells_where_we_lose_and_why(tmp_path):
    text = page(measured(tmp_path, lost()))
    assert "**0.833×** | **0.133×** | **0.15×**" in text
    lines = " ".join(text[text.index("## Where we lose") :].split())
    assert "A 7.50 times the time of `compiled` (`enc1-256` float32 contiguous" in lines
    assert "A 1.50 (`enc1-256` float32 contiguous)." in lines  # the backward kernel
    for name in ("forward", "kernel backward", "slower, beyond the cache", "slower, in the cache", "memory"):
        assert TARGETS[name]["reason"] in lines


def test_a_loss_within_the_quartiles_is_called_noise(tmp_path):
    files = measured(tmp_path, [entry("forward", "op", {**FAST, "op": 0.0085})])
    (miss,) = (miss for miss in missed_targets(machines_of(files)[0]) if "slower" in miss.target)
    assert miss.text == "1.06 times the time of `compiled`, within the noise"


def test_every_target_can_be_missed(tmp_path):
    machine = machines_of(measured(tmp_path, [*lost(), *lost(case="pyramid-32", feature_bytes=MIB)]))[0]
    assert {miss.target for miss in missed_targets(machine)} == TARGETS.keys()


def test_machines_stand_side_by_side_on_one_short_page(tmp_path):
    name = "A processor of a made-up maker with a long name @ 2.00GHz"
    for machine, letter in (("first", "A"), ("second", "B"), ("third", "C")):
        entries = [*lost(), *lost(case="pyramid-32", feature_bytes=MIB)]
        for case, dtype, layout in ROWS:
            entries += lost(case=case, dtype=dtype, layout=layout)
        files = measured(tmp_path, entries, machine, cpu_model=f"{name} {letter}")
        write_results(tmp_path / machine / "steps.json", header(), [a_step({"op": 1.04})], "steps")
    text = page(read_files(tmp_path), "results", pages.PICTURES)
    lines = text.splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 200
    assert "| case | A forward | A backward | A eager | A compiled | A bmm | B forward |" in text
    assert sum(line.startswith("| `") for line in lines) == pages.MAX_ROWS
    assert len(files) == 5
    for machine, letter in (("first", "A"), ("second", "B"), ("third", "C")):
        assert f"**{letter}**: [{name} {letter}](results/{machine}/tables.md)" in " ".join(text.split("\n  "))


def test_rows_that_all_machines_have_come_before_others(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "MAX_ROWS", 1)
    measured(tmp_path, [entry("forward+backward", "op", FAST)], "first")
    other = {"case": "pyramid-32", "layers": ["1x1"]}
    measured(tmp_path, [entry("forward+backward", "op", FAST, **other)], "first")
    files = measured(
        tmp_path,
        [entry("forward+backward", "op", FAST, **other), entry("forward+backward", "op", FAST)],
        "second",
    )
    rows = [line for line in page(files).splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["pyramid-32"]


def test_cpus_and_gpus_have_tables_of_their_own(tmp_path):
    measured(tmp_path, [entry("forward+backward", "op", FAST)], "first")
    files = measured(tmp_path, [entry("forward+backward", "op", FAST, device="cuda")], "second", **GPU)
    heads = [line for line in page(files).splitlines() if line.startswith("| case")]
    assert [head.split(" | ")[1] for head in heads] == ["A forward", "B forward"]


def test_the_page_tells_what_a_training_step_costs(tmp_path):
    measured(tmp_path, [entry("forward+backward", "op", FAST)])
    steps = [a_step({"op": 1.04, "tap": 1.02, "plain": 1.01}), a_step({"op": 1.3, "tap": 1.4}, mode="eager")]
    steps += [a_step({"op": 1.2}, mode="amp"), a_step({"op": 9.0}, device="cuda")]
    write_results(tmp_path / "made-up" / "steps.json", header(), steps, "steps")
    write_results(tmp_path / "other" / "steps.json", header(), [a_step({"op": 5.0})], "steps")
    text = " ".join(page(read_files(tmp_path)).split())
    assert "A training step with the loss on nine layers takes 1.2 to 1.3 times as long as without." in text
    assert "A compiled one with the loss on nine layers takes 1.02 times as long as without." in text


def test_the_times_are_those_of_the_device_where_there_are_any(tmp_path):
    on_device = {name: spread(value / 10) for name, value in FAST.items()}
    host = {**FAST, "op": 0.025}
    ratios = entry("forward", "op", FAST)["ratios"]
    times = {"device_seconds": on_device, "device_ratios": ratios, "launches": dict.fromkeys(FAST, 3)}
    files = measured(tmp_path, [entry(mode, "op", host, device="cuda", **times) for mode in BOTH], **GPU)
    assert "[Made-up GPU](made-up/tables.md)" in page(files)
    assert "| – | – | 25× | 4× | 4.5× |" in page(files)
    text = tables(files)
    assert "| `enc1-256` float32 contiguous | 64 | 0.2, 1 [0.9–1.1] | 5, 25 [22.5–27.5] |" in text
    assert "| `enc1-256` float32 contiguous | 64 | 25, 12.5 [11.2–13.8] | 50, 2 [1.8–2.2] |" in text
    assert "### Launches, forward+backward" in text
    assert "| `enc1-256` float32 contiguous | 64 | 3 | 3 | 3 | 3 | 3 |" in text


def test_the_tables_have_conditions_and_all_numbers(tmp_path):
    entries = [
        *(entry(mode, "op", SLOW) for mode in BOTH),
        entry("tap", "tap", {"tap": 0.003, "separate": 0.006, "floor": 0.0025}),
    ]
    text = tables(measured(tmp_path, entries))
    for part in (
        "- Made-up CPU, 2 threads, Linux x86_64; a copy moves 20 GB/s, 4e+03 GB/s",
        "fdkernels 0.1.0, torch 9.9, python 3.99",
        "- Commit abc123, with changes, 2000-01-01, `pytest benchmarks`",
        "| `enc1-256` float32 contiguous | 64 | 60, 30 [27–33] | 50, 0.833 [0.75–0.917] |",
        "| case | MiB | tap | separate | floor |",
        "| `enc1-256` float32 contiguous | 64 | 3, 1.2 [1.08–1.32] | 6, 2 [1.8–2.2] | 2.5 |",
        "| `enc1-256` float32 contiguous | 64 | 100.0% | 100.0% |",
        "| `enc1-256` float32 contiguous | forward | memory | 100.0% |",
        "| `enc1-256` float32 contiguous | forward+backward | slower, beyond the cache | 7.50 times",
    ):
        assert part in text
    assert "As the host sees it" not in text


def test_steps_and_trainings_have_tables(tmp_path):
    write_results(tmp_path / "steps.json", header(), [a_step({"op": 1.04, "plain": 1.3})], "steps")
    training = a_step({"op": 1.02}, preset="tnbc-unet", base_channels=None, left_out={}, peak_bytes={})
    write_results(tmp_path / "training.json", header(), [training], "training")
    text = tables(read_files(tmp_path))
    row = "| unet | compiled | 2x3x128x128, 16 | 500 | 1.04 [0.936–1.14] | – | – | – | 1.3 [1.17–1.43] | – |"
    assert row in text
    assert "| 80 / 80 / – / – / – / 80 |" in text
    assert "- `tap`: made-up reason" in text
    assert "## Training" in text
    assert "| tnbc-unet | compiled | 2x3x128x128, published | 500 | 1.02 [0.918–1.12] | – | – | – |" in text


def test_launches_bytes_and_instructions_have_tables(tmp_path):
    counted = {
        "case": "enc1-512",
        "num_layers": 1,
        "feature_bytes": 100 * MIB,
        "stages": [
            {"name": "sums", "read": 101 * MIB, "written": 0},
            {"name": "gradient", "read": MIB, "written": 100 * MIB},
        ],
        "tap_bytes": [201 * MIB, 401 * MIB],
        "forward": {"sums_kernel": 2, "aten::mean": 1},
        "backward": {},
    }
    write_results(tmp_path / "launches.json", header(), [counted], "launches")
    figure = {"figure": "kernel forward", "instructions": 1234567, "instruction_set": "avx2"}
    write_results(tmp_path / "instructions-x.json", header(), [figure], "instructions")
    text = tables(read_files(tmp_path))
    assert "| `enc1-512` | 1 | 1.010 | 201 / 401 | 2 × sums_kernel, 1 × aten::mean |  |" in text
    assert "| kernel forward | 1,234,567 | avx2 |" in text


def test_without_results_the_page_says_so(tmp_path):
    assert "Nothing has been measured yet." in page(read_files(tmp_path))


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
        read_files(tmp_path)


def test_two_pictures_are_drawn_for_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    entries = [
        entry("forward+backward", "op", FAST, layout=layout) for layout in ("contiguous", "channels_last")
    ]
    series = [{"case": f"scaling-{size}", "feature_bytes": size * MIB} for size in (32, 64)]
    entries += [entry("forward+backward", "op", FAST, **changes) for changes in series]
    measured(tmp_path, entries, "first")
    files = measured(tmp_path, entries[:1], "second")
    names = pages.draw(machines_of(files), tmp_path)
    assert names == list(pages.PICTURES)
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "](results/times.png)" in page(files, "results", names)
    assert pages.draw([], tmp_path) == []


def test_the_committed_pages_are_made_from_the_committed_results():
    files, results = read_files(BENCHMARKS / "results"), BENCHMARKS / "results"
    drawn = [name for name in pages.PICTURES if (results / f"{name}.png").is_file()]
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert text == page(files, "results", drawn)
    assert len(text.splitlines()) <= 120
    assert max(map(len, text.splitlines())) <= 200
    for folder in {file.folder for file in files}:
        expected = tables([file for file in files if file.folder == folder])
        assert (results / folder / "tables.md").read_text(encoding="utf-8") == expected
