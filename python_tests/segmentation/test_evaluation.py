from __future__ import annotations

import csv
import math
import shutil
import statistics
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fdkernels import __main__ as program
from fdkernels import models
from fdkernels.cli import app
from fdkernels.segmentation.data import DATASETS, SegmentationDataset
from fdkernels.segmentation.data.reading import load_pair
from fdkernels.segmentation.evaluation import EvaluationOptions, evaluate, evaluate_weights
from fdkernels.segmentation.runfiles import read_json, write_json, write_weights
from fdkernels.segmentation.saved_runs import read_run
from made_up_run import write_made_up_run
from tiny_data import SIZE, make_tiny, write_tiny_tnbc

ON_CPU = EvaluationOptions(device="cpu", workers=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_tnbc(tmp_path_factory.mktemp("tnbc"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return write_made_up_run(tmp_path_factory.mktemp("runs") / "run", data)


@pytest.fixture(scope="module")
def baseline(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "baseline"
    return write_made_up_run(folder, data, seed=1, fd_loss=False)


def _options(output, **changes):
    return EvaluationOptions(output=output, device="cpu", workers=0, **changes)


def _invoke(*arguments):
    runner = CliRunner(env={"COLUMNS": "120"})
    return runner.invoke(app, ["evaluate", *map(str, arguments)], catch_exceptions=False)


def _rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _files(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def test_a_trained_run_is_evaluated_from_the_command_line(data, tmp_path):
    run = tmp_path / "run"
    options = ["--base-channels=2", "--size=32", "--batch-size=2", "--epochs-warm=2", "--epochs-active=1"]
    trained = CliRunner().invoke(
        app,
        ["train", "--data", str(data), "--output", str(run), "--accelerator=cpu", "--lr=0.01", *options],
        catch_exceptions=False,
    )
    assert trained.exit_code == 0
    result = _invoke(run, "--device=cpu", "--masks", "--overlays")
    assert result.exit_code == 0
    rows = _rows(run / "evaluation" / "samples.csv")
    images = [entry["image"] for entry in read_json(run / "split.json")["test"]]
    assert [(row["phase"], row["image"]) for row in rows] == [
        (phase, image) for phase in ("warm", "active") for image in images
    ]
    summary = read_json(run / "evaluation" / "summary.json")
    for phase, scores in read_json(run / "metrics.json")["phases"].items():
        found = summary["phases"][phase]["sets"]["all"]
        assert found["dice"]["mean"] == pytest.approx(scores["test"]["dice"], abs=1e-6)
        assert found["iou"]["mean"] == pytest.approx(scores["test"]["iou"], abs=1e-6)
        assert found["pooled"]["dice"] == pytest.approx(scores["test"]["dice_pooled"], abs=1e-6)
        assert f"{scores['test']['dice']:.4f}" in result.output  # in the unit of `train`
        assert f"{scores['test']['dice']:.4f}" in trained.output
    pictures = [
        f"{kind}/{phase}/{image}"
        for kind in ("masks", "overlays")
        for phase in ("active", "warm")
        for image in images
    ]
    assert _files(run / "evaluation") == sorted([*pictures, "samples.csv", "summary.json"])


def test_the_table_file_holds_every_score(run, tmp_path):
    found = evaluate(run, options=_options(tmp_path / "out"))
    rows = _rows(tmp_path / "out" / "samples.csv")
    layers = [f"discrepancy_loss/{name}" for name in models.create("unet", base_channels=2).tap_names]
    assert list(rows[0]) == [
        *("phase", "image", "patient", "dice", "iou", "sensitivity", "specificity", "precision"),
        *("foreground_share", *layers),
    ]
    assert len(rows) == len(found.samples) == 10
    for row, sample in zip(rows, found.samples, strict=True):
        assert (row["image"], row["patient"], row["phase"]) == (sample.image, sample.patient, sample.phase)
        for name, value in sample.scores.items():
            assert float(row[name] or "nan") == pytest.approx(value, rel=1e-8, nan_ok=True)
        for name, value in sample.layer_losses.items():
            assert float(row[f"discrepancy_loss/{name}"]) == pytest.approx(value, rel=1e-8)
    assert read_json(tmp_path / "out" / "summary.json") == found.summary
    assert found.summary["phases"]["warm"]["discrepancy_loss"]["enc1"]["count"] == 5


def test_what_is_not_defined_is_an_empty_cell(data, tmp_path):
    moved = shutil.copytree(data, tmp_path / "data")
    run = write_made_up_run(tmp_path / "run", moved, phases=("active",), convention="region_mean")
    Image.new("L", SIZE).save(moved / "GT_02" / "02_1.png")
    found = evaluate(run, options=_options(tmp_path / "out"))
    rows = _rows(tmp_path / "out" / "samples.csv")
    assert rows[0]["image"] == "Slide_02/02_1.png"
    assert rows[0]["sensitivity"] == rows[0]["discrepancy_loss/enc1"] == ""
    assert all(row["sensitivity"] and row["discrepancy_loss/enc1"] for row in rows[1:])
    scores = found.summary["phases"]["active"]
    assert scores["sets"]["all"]["sensitivity"]["count"] == scores["discrepancy_loss"]["enc1"]["count"] == 4
    assert scores["sets"]["all"]["dice"]["count"] == 5


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_summary_does_not_depend_on_the_batches(run, batch_size):
    expected = evaluate(run, options=ON_CPU).summary["phases"]["active"]
    options = EvaluationOptions(device="cpu", workers=0, batch_size=batch_size)
    found = evaluate(run, options=options).summary["phases"]["active"]
    assert found["sets"] == expected["sets"]
    for name, layer in expected["discrepancy_loss"].items():
        assert found["discrepancy_loss"][name]["mean"] == pytest.approx(layer["mean"], abs=1e-5)


@pytest.mark.parametrize("phase", ["warm", "active"])
def test_masks_are_the_logits_above_0_at_the_size_of_the_image(run, data, tmp_path, phase):
    evaluate(run, phases=[phase], options=_options(tmp_path / "out", masks=True))
    samples, names = read_run(run).part("test")
    network = read_run(run).load_network(phase)
    for index, name in enumerate(names):
        with torch.no_grad():
            logits = network(SegmentationDataset(samples, size=32)[index]["image"][None])
        width, height = SIZE
        resized = torch.nn.functional.interpolate(logits, (height, width), mode="bilinear")[0, 0]
        with Image.open(tmp_path / "out" / "masks" / phase / name) as image:
            assert image.size == SIZE
            written = np.array(image)
        clear = resized.abs() > 1e-5  # a logit of nearly 0 may fall to either side
        assert set(np.unique(written)) <= {0, 255}
        assert np.array_equal(written[clear] == 255, (resized > 0).numpy()[clear])


def test_at_the_size_of_the_files_masks_match_the_counts(tmp_path):
    data = write_tiny_tnbc(tmp_path / "data")
    for file in data.rglob("*.png"):
        with Image.open(file) as image:
            cropped = image.crop((0, 0, 32, 32))
        cropped.save(file)
    run = write_made_up_run(tmp_path / "run", data, phases=("active",))
    found = evaluate(run, options=_options(tmp_path / "out", masks=True))
    for row in found.samples:
        with Image.open(tmp_path / "out" / "masks" / "active" / row.image) as image:
            predicted = np.array(image) == 255
        assert predicted.sum() == row.counts["true_positives"] + row.counts["false_positives"]


def test_a_comparison_is_on_the_samples_where_both_are_worst(run, baseline, tmp_path):
    output = tmp_path / "out"
    result = _invoke(
        run, "--against", baseline, "--phase=active", "--worst-off=2", "--output", output, "--device=cpu"
    )
    assert result.exit_code == 0
    ours, theirs = (
        {row["image"]: row for row in _rows(output / name)} for name in ("samples.csv", "baseline.csv")
    )
    assert list(ours) == list(theirs)
    dice = {image: (float(ours[image]["dice"]) + float(theirs[image]["dice"])) / 2 for image in ours}
    worst = sorted(dice, key=lambda image: dice[image])[:2]
    found = read_json(output / "summary.json")["phases"]["active"]
    for rows, sets in ((ours, found["sets"]), (theirs, found["baseline"]["sets"])):
        mean = statistics.fmean(float(rows[image]["dice"]) for image in worst)
        assert sets["worst_off"]["dice"]["mean"] == pytest.approx(mean, abs=1e-7)
    difference = statistics.fmean(float(ours[image]["dice"]) - float(theirs[image]["dice"]) for image in ours)
    assert found["difference"]["all"]["dice"] == pytest.approx(difference, abs=1e-7)
    assert f"{difference:+.4f}" in result.output
    compared = found["comparison"]["all"]
    low, high = compared["dice"]
    assert low <= difference <= high
    assert f"[{low:+.4f}, {high:+.4f}]" in result.output
    better = sum(float(ours[image]["dice"]) > float(theirs[image]["dice"]) for image in ours)
    assert compared["improved"] == better
    assert f"{better} better," in result.output


def test_a_run_against_itself_has_no_difference(run):
    found = evaluate(run, against=run, options=ON_CPU)
    for phase in found.summary["phases"].values():
        assert phase["difference"]["all"] == {"dice": 0, "iou": 0}


def test_runs_that_are_split_otherwise_are_not_compared(run, data, tmp_path):
    other = write_made_up_run(tmp_path / "other", data, test=slice(3, 7))
    with pytest.raises(
        ValueError, match=r"same split .* 1 of the images are not in the same part, Slide_02/02_1"
    ):
        evaluate(run, against=other, options=ON_CPU)


def test_runs_at_another_size_are_not_compared(run, data, tmp_path):
    other = write_made_up_run(tmp_path / "other", data)
    write_json(other / "config.json", {**read_json(other / "config.json"), "size": 48})
    with pytest.raises(ValueError, match=r"at the size of .*, 32, got .*, at 48"):
        evaluate(run, against=other, options=ON_CPU)


def test_both_runs_of_a_comparison_are_in_the_runs_convention(run, data, tmp_path):
    half = write_made_up_run(tmp_path / "half", data, convention="algorithm1")
    found = evaluate(half, against=run, phases=["warm"], options=ON_CPU)
    whole = evaluate(run, phases=["warm"], options=ON_CPU)
    for row, other in zip(found.baseline, whole.samples, strict=True):
        for name, value in other.layer_losses.items():
            assert row.layer_losses[name] == pytest.approx(value / 2, abs=1e-6)


def test_folds_are_evaluated_together(data, tmp_path):
    parts = [slice(1, 4), slice(4, 6)]
    for fold, part in enumerate(parts, start=1):
        write_made_up_run(tmp_path / f"fold-{fold}", data, seed=fold, test=part, phases=("active",))
    result = _invoke(tmp_path, "--device=cpu", "--masks")
    assert "Dice, mean of 2 folds" in result.output
    rows = _rows(tmp_path / "evaluation" / "samples.csv")
    assert [row["fold"] for row in rows] == ["1", "1", "1", "2", "2"]
    alone = [evaluate(tmp_path / f"fold-{fold}", options=ON_CPU) for fold in (1, 2)]
    assert [float(row["dice"]) for row in rows] == pytest.approx(
        [row.scores["dice"] for one in alone for row in one.samples]
    )
    means = [one.summary["phases"]["active"]["sets"]["all"]["dice"]["mean"] for one in alone]
    found = read_json(tmp_path / "evaluation" / "summary.json")["phases"]["active"]
    assert found["folds"]["dice"]["mean"] == pytest.approx(statistics.fmean(means))
    assert found["sets"]["all"]["images"] == 5
    assert found["sets"]["worst_off"]["images"] == 1
    masks = _files(tmp_path / "evaluation" / "masks")
    assert masks == sorted(f"active/fold-{row['fold']}/{row['image']}" for row in rows)


def test_a_fold_that_is_not_finished_is_named(data, tmp_path):
    write_made_up_run(tmp_path / "fold-1", data)
    write_made_up_run(tmp_path / "fold-2", data, phases=("warm",))
    with pytest.raises(ValueError, match="fold-2 has not finished phase active"):
        evaluate(tmp_path, options=ON_CPU)
    assert list(evaluate(tmp_path, phases=["warm"], options=ON_CPU).summary["phases"]) == ["warm"]


def test_other_symmetries_are_further_rows_that_the_sets_leave_out(run, tmp_path):
    found = evaluate(run, phases=["active"], options=_options(tmp_path / "out", augmented=True))
    rows = _rows(tmp_path / "out" / "samples.csv")
    assert len(rows) == 40
    assert sum(row["symmetry"] == "identity" for row in rows) == 5
    plain = evaluate(run, phases=["active"], options=ON_CPU).summary["phases"]["active"]
    scores = found.summary["phases"]["active"]
    assert scores["sets"] == plain["sets"]
    assert scores["discrepancy_loss"]["enc1"]["count"] == 40


def test_only_finished_phases_are_taken_unless_one_is_asked_for(data, tmp_path):
    run = write_made_up_run(tmp_path, data, phases=("warm",))
    assert list(evaluate(run, options=ON_CPU).summary["phases"]) == ["warm"]
    with pytest.raises(ValueError, match="has not finished phase active"):
        _invoke(run, "--phase=both", "--device=cpu")
    assert not (run / "evaluation").exists()
    with pytest.raises(ValueError, match="phases must be of warm, active, got third"):
        evaluate(run, phases=["third"], options=ON_CPU)


def test_a_run_without_a_finished_phase_is_refused(data, tmp_path):
    run = write_made_up_run(tmp_path, data, phases=())
    with pytest.raises(ValueError, match="has not finished a phase yet"):
        evaluate(run, options=ON_CPU)


@pytest.mark.parametrize("part", ["train", "validation"])
def test_other_parts_can_be_scored(run, part):
    found = evaluate(run, part=part, phases=["warm"], options=ON_CPU)
    assert [row.image for row in found.samples] == [
        entry["image"] for entry in read_json(run / "split.json")[part]
    ]


def test_data_that_has_moved_can_be_named(run, data, tmp_path):
    moved = shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(moved / "Slide_01")  # of which the test part has none
    found = evaluate(run, data=moved, options=ON_CPU)
    assert [row.counts for row in found.samples] == [
        row.counts for row in evaluate(run, options=ON_CPU).samples
    ]
    with pytest.raises(ValueError, match=r"01_1\.png is named in .*split\.json, but missing"):
        evaluate(run, data=moved, part="validation", options=ON_CPU)


def test_weights_in_no_run_are_scored_on_all_images(run, data, tmp_path):
    weights = run / "active" / "best.safetensors"
    arguments = ["--weights", weights, "--model=unet", "--dataset=tnbc", "--data", data, "--base-channels=2"]
    result = _invoke(*arguments, "--size=32", "--output", tmp_path / "out", "--device=cpu", "--masks")
    assert result.exit_code == 0
    rows = {row["image"]: row for row in _rows(tmp_path / "out" / "samples.csv")}
    assert len(rows) == 9
    for row in evaluate(run, phases=["active"], options=ON_CPU).samples:
        assert float(rows[row.image]["dice"]) == pytest.approx(row.scores["dice"])
    assert len(_files(tmp_path / "out" / "masks" / "weights")) == 9


@pytest.mark.parametrize("dataset", list(DATASETS))
def test_every_data_set_can_be_scored(run, tmp_path, dataset):
    data = make_tiny(dataset, tmp_path / "data", images=3)
    weights = run / "active" / "best.safetensors"
    found = evaluate_weights(
        weights,
        model="unet",
        dataset=dataset,
        data=data,
        base_channels=2,
        size=32,
        options=_options(tmp_path / "out", masks=True),
    )
    samples = DATASETS[dataset].find(data).samples
    masks = sorted((tmp_path / "out" / "masks" / "weights").rglob("*.png"))
    assert len(found.samples) == len(masks) == len(samples) >= 3
    sizes = sorted(load_pair(sample)[0].size for sample in samples)
    written = []
    for mask in masks:
        with Image.open(mask) as image:
            written.append(image.size)
    assert sorted(written) == sizes
    worst = {"monuseg": 2, "us-tnbc": 2}.get(dataset, 1)
    assert found.summary["phases"]["weights"]["sets"]["worst_off"]["images"] == worst


def test_files_that_cannot_be_used_are_refused_or_left_out_and_named(run, data, tmp_path):
    moved = shutil.copytree(data, tmp_path / "data")
    (moved / "GT_07" / "07_1.png").unlink()
    weights = run / "active" / "best.safetensors"
    arguments = ["--weights", weights, "--model=unet", "--dataset=tnbc", "--data", moved, "--size=32"]
    arguments += ["--base-channels=2", "--output", tmp_path / "out", "--device=cpu"]
    with pytest.raises(ValueError, match=r"07_1\.png"):
        _invoke(*arguments)
    result = _invoke(*arguments, "--on-problem=skip")
    assert result.output.startswith("Skipped: ")
    (skipped,) = read_json(tmp_path / "out" / "summary.json")["skipped"]
    assert "07_1.png" in skipped
    assert len(_rows(tmp_path / "out" / "samples.csv")) == 8


def test_weights_go_with_a_known_data_set(run, data):
    weights = run / "active" / "best.safetensors"
    with pytest.raises(ValueError, match=r"dataset must be one of tnbc.*, got atlas"):
        evaluate_weights(weights, model="unet", dataset="atlas", data=data)
    with pytest.raises(ValueError, match="do not fit unet with base_channels as published"):
        evaluate_weights(weights, model="unet", dataset="tnbc", data=data)


def test_output_that_holds_something_else_is_left_alone(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis\.tex"):
        evaluate(run, options=_options(tmp_path))
    assert _files(tmp_path) == ["thesis.tex"]


def test_a_second_evaluation_replaces_the_tables_and_a_failed_one_does_not(run, data, tmp_path):
    output = tmp_path / "out"
    evaluate(run, phases=["warm"], options=_options(output, masks=True))
    masks = _files(output / "masks")
    assert len(masks) == 5
    evaluate(run, phases=["active"], options=_options(output, overlays=True))
    overlays = [name.replace("warm", "active") for name in masks]
    assert _files(output / "masks") == masks
    assert _files(output / "overlays") == overlays
    assert {row["phase"] for row in _rows(output / "samples.csv")} == {"active"}
    before = (output / "samples.csv").read_bytes()
    moved = shutil.copytree(data, tmp_path / "data")
    (moved / "GT_07" / "07_1.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"07_1\.png cannot be read"):
        evaluate(run, data=moved, options=_options(output, masks=True))
    assert (output / "samples.csv").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data", "out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the folder of a run or --weights, got neither"),
        (["RUN", "--weights=x"], "got both"),
        (["RUN", "--model=unet"], "--model goes with --weights only"),
        (["RUN", "--on-problem=skip"], "--on-problem goes with --weights only"),
        (["RUN", "--base-channels=2"], "--base-channels goes with --weights only"),
        (["--weights=x", "--part=test"], "--part goes with the folder of a run only"),
        (["--weights=x"], "--output must name a folder"),
        (
            ["--weights=x", "--output=y", "--model=unet"],
            "--weights needs --model, --dataset and --data, got no --dataset or --data",
        ),
        (["RUN", "--batch-size=0"], "--batch-size must be an integer from 1 to 4096, got 0"),
        (["RUN", "--workers=-1"], "--workers must be an integer from 0 to 1024, got -1"),
        (["RUN", "--worst-off=9"], "worst_off must be from 1 to the number of samples, 5, got 9"),
        (["RUN", "--device=abacus"], "device abacus cannot be used"),
    ],
)
def test_wrong_options_are_named_in_one_sentence(run, arguments, message, monkeypatch, capsys):
    monkeypatch.delenv("FDKERNELS_TRACEBACK", raising=False)
    given = [str(run) if argument == "RUN" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["fdkernels", "evaluate", *given])
    assert program.main() == 1
    assert message in capsys.readouterr().err
    assert not (run / "evaluation").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here_is_refused(run):
    with pytest.raises(ValueError, match="device cuda cannot be used"):
        evaluate(run, options=EvaluationOptions(device="cuda"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_gives_what_the_cpu_gives(run):
    here, there = (
        evaluate(run, options=EvaluationOptions(device=device, workers=0)) for device in ("cpu", "cuda")
    )
    for one, other in zip(here.samples, there.samples, strict=True):
        assert one.scores["dice"] == pytest.approx(other.scores["dice"], abs=1e-2)
        assert one.layer_losses == pytest.approx(other.layer_losses, abs=1e-3)


def test_masks_need_a_folder():
    with pytest.raises(ValueError, match="output must name a folder where masks or overlays"):
        EvaluationOptions(masks=True)


def test_masks_of_another_run_are_not_mixed_in(run, baseline, tmp_path):
    output = tmp_path / "out"
    evaluate(baseline, phases=["warm"], options=_options(output))
    evaluate(run, phases=["warm"], options=_options(output, masks=True))
    before = _files(output)
    with pytest.raises(
        ValueError, match=r"out holds masks of .*run, which would stay beside those of .*baseline"
    ):
        evaluate(baseline, phases=["warm"], options=_options(output))
    assert _files(output) == before


@pytest.mark.parametrize("empty", [False, True], ids=["with a lesion", "empty truth"])
def test_a_network_that_puts_out_nan_is_not_scored_as_background(data, tmp_path, empty):
    moved = shutil.copytree(data, tmp_path / "data")
    run = write_made_up_run(tmp_path / "run", moved, phases=("active",))
    if empty:
        Image.new("L", SIZE).save(moved / "GT_02" / "02_1.png")
    network = read_run(run).load_network("active")
    with torch.no_grad():
        next(network.parameters()).fill_(math.inf)
    write_weights(run / "active" / "best.safetensors", network.state_dict())
    with pytest.raises(
        ValueError, match=r"Slide_02/02_1\.png cannot be scored: the network of phase active puts out NaN"
    ):
        evaluate(run, options=_options(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
