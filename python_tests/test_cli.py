from __future__ import annotations

import dataclasses
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

import fdkernels as fdk
from fdkernels import __main__ as program
from fdkernels.cli import app
from fdkernels.conventions import CONVENTIONS
from fdkernels.info import info_text
from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.runfiles import read_json
from tiny_data import make_tiny, write_tiny_tnbc

ROOT = Path(__file__).resolve().parents[1]
SHORT = [
    "--base-channels=2",
    "--size=32",
    "--batch-size=2",
    "--epochs-warm=1",
    "--epochs-active=1",
    "--limit-batches=2",
    "--accelerator=cpu",
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_tnbc(tmp_path_factory.mktemp("tnbc"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A short run by the command line: its folder and what was printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = _invoke("train", "--data", data, "--output", folder, *SHORT)
    assert result.exit_code == 0
    return folder, result.output


def _invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def _main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fdkernels", *map(str, arguments)])
    return program.main()


def test_info_names_versions_backends_and_the_choice_of_auto():
    text = info_text()
    assert f"fdkernels {fdk.__version__}" in text
    assert f"Python {platform.python_version()}, torch {torch.__version__}" in text
    assert f"CPU threads: {torch.get_num_threads()}" in text
    for name, reason in fdk.backends().items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {name} ")]
        assert line.endswith(reason or "available")
    assert 'backend="auto" takes ' in text


def test_info_command_prints_the_text():
    assert _invoke("info").output.strip() == info_text()


def test_only_commands_that_exist_are_listed():
    listed = _invoke("--help").output
    for name in ("train", "evaluate", "experiment", "report", "demo", "info"):
        assert f"{name} " in listed
    for name in ("bench",):
        assert name not in listed


def test_train_trains_and_prints_a_table(run):
    folder, output = run
    metrics = read_json(folder / "metrics.json")
    for result in metrics["phases"].values():
        assert f"{result['test']['dice']:.4f}" in output
    assert "phase 2, alpha active" in output


def test_train_takes_every_option(data, tmp_path):
    options = [
        *SHORT,
        "--dataset=tnbc",
        "--model=unet",
        "--lr=0.01",
        "--alpha-lr=0.02",
        "--alpha-target=-7",
        "--alpha-max=0.1",
        "--alpha-rule=ascent",
        "--convention=region_mean",
        "--exchange=shuffle",
        "--backend=reference",
        "--no-fd-loss",
        "--seed=3",
        "--workers=0",
        "--precision=bf16-mixed",
        "--fold=2",
        "--on-problem=skip",
        "--accumulate=2",
        "--devices=1",
        "--num-nodes=1",
        "--strategy=auto",
        "--no-sync-batchnorm",
        "--channels-last",
        "--no-tensorboard",
    ]
    assert _invoke("train", "--data", data, "--output", tmp_path, *options).exit_code == 0
    saved = read_json(tmp_path / "config.json")
    assert saved["lr"] == 0.01
    assert saved["alpha_target"] == -7
    assert saved["alpha_max"] == 0.1
    assert saved["convention"] == "region_mean"
    assert saved["fd_loss"] is False
    assert saved["precision"] == "bf16-mixed"
    assert saved["fold"] == 2
    assert saved["on_problem"] == "skip"
    assert saved["accumulate"] == 2
    assert saved["channels_last"] is True
    assert (saved["tensorboard"], saved["sync_batchnorm"]) == (False, False)


def test_train_has_an_option_with_help_for_every_field_of_a_run():
    options = {option.name: option for option in get_command(app).commands["train"].params}
    fields = {field.name: field for field in dataclasses.fields(TrainingConfig)}
    assert set(options) - {"help"} == {*fields, "preset", "resume"}
    for name, field in fields.items():
        assert options[name].opts == ["--" + name.replace("_", "-")]
        assert options[name].help == field.metadata["help"]
        assert name in ("data", "output", "dataset") or options[name].default == field.default
    assert options["dataset"].default == "tnbc"
    assert [name for name, option in options.items() if option.required] == ["output"]
    for name in CONVENTIONS:
        assert name in options["convention"].help


def test_a_preset_sets_what_is_not_given(data, tmp_path):
    options = ["--preset=tnbc-nucleisegnet", *SHORT, "--epochs-active=0"]
    assert _invoke("train", "--data", data, "--output", tmp_path, *options).exit_code == 0
    saved = read_json(tmp_path / "config.json")
    assert (saved["dataset"], saved["model"], saved["lr"]) == ("tnbc", "nucleisegnet", 1e-4)
    assert (saved["size"], saved["batch_size"]) == (32, 2)
    assert _invoke("train", "--output", tmp_path, "--resume", *options).exit_code == 0


def test_an_unknown_preset_is_refused_with_those_that_come_close(data, tmp_path):
    with pytest.raises(ValueError, match="got tnbc-nuclei; did you mean tnbc-nucleisegnet"):
        _invoke("train", "--data", data, "--output", tmp_path, "--preset=tnbc-nuclei")


def test_all_folds_are_trained_and_go_on_where_they_were(data, tmp_path):
    options = [*SHORT, "--fold=all", "--epochs-active=0", "--no-tensorboard", "--limit-batches=1"]
    done = _invoke("train", "--data", data, "--output", tmp_path, *options)
    summary = read_json(tmp_path / "folds.json")
    assert "Fold 5 of 5" in done.output
    assert f"{summary['phases']['warm']['dice']['mean']:.4f} ±" in done.output
    (tmp_path / "folds.json").unlink()
    assert _invoke("train", "--output", tmp_path, "--resume").exit_code == 0
    assert read_json(tmp_path / "folds.json") == summary


def test_a_second_data_set_is_pooled(data, tmp_path):
    novel = make_tiny("udiat", tmp_path / "udiat", images=4)
    options = ["--exchange=pooled", "--novel-dataset=udiat", f"--novel-data={novel}", "--novel-images=3"]
    folder = tmp_path / "run"
    done = _invoke("train", "--data", data, "--output", folder, *SHORT, *options, "--epochs-active=0")
    assert "and 3 of udiat to train on" in done.output
    assert len(read_json(folder / "split.json")["novel"]) == 3


def test_resume_takes_the_options_of_the_run(run):
    folder, _ = run
    before = (folder / "metrics.json").read_bytes()
    assert _invoke("train", "--output", folder, "--resume").exit_code == 0
    assert (folder / "metrics.json").read_bytes() == before


def test_resume_with_another_option_is_refused(run):
    folder, _ = run
    with pytest.raises(ValueError, match=r"--batch-size is 4, but the run in .* began with 2"):
        _invoke("train", "--output", folder, "--resume", "--batch-size=4")


def test_resume_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run to resume"):
        _invoke("train", "--output", tmp_path, "--resume")


def test_a_users_error_is_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("FDKERNELS_TRACEBACK", raising=False)
    assert _main(monkeypatch, "train", "--output", tmp_path, "--data", tmp_path) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("fdkernels: data must be a folder in the TNBC layout")
    assert "Traceback" not in printed.err + printed.out


def test_a_wrong_accelerator_is_one_sentence(monkeypatch, capsys, data, tmp_path):
    arguments = ["train", "--output", tmp_path, "--data", data, "--size=32", "--accelerator=abacus"]
    assert _main(monkeypatch, *arguments) == 1
    assert "abacus" in capsys.readouterr().err


def test_the_traceback_is_shown_where_it_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("FDKERNELS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="TNBC layout"):
        _main(monkeypatch, "train", "--output", tmp_path, "--data", tmp_path)


def test_missing_data_is_named(monkeypatch, capsys, tmp_path):
    assert _main(monkeypatch, "train", "--output", tmp_path) == 1
    assert "--data must name the folder" in capsys.readouterr().err


def _without(monkeypatch, *missing):
    """Makes the import of these packages fail as if they were not installed."""
    for name in (*missing, *sys.modules):
        if name.partition(".")[0] in missing:
            monkeypatch.setitem(sys.modules, name, None)
    for name in list(sys.modules):
        if name == "fdkernels.cli" or name.startswith("fdkernels.segmentation"):
            monkeypatch.delitem(sys.modules, name)


def test_info_works_without_typer(monkeypatch, capsys):
    _without(monkeypatch, "typer", "rich")
    assert _main(monkeypatch, "info") == 0
    assert capsys.readouterr().out.strip() == info_text()


EXTRAS = {
    "train": "train",
    "evaluate": "train",
    "report": "train,report",
    "prepare": "train,dicom",
    "demo": "demo",
}


@pytest.mark.parametrize("command", [*EXTRAS, None])
def test_other_commands_without_typer_say_what_to_install(monkeypatch, capsys, command):
    _without(monkeypatch, "typer")
    assert _main(monkeypatch, *([] if command is None else [command, "--output", "x"])) == 1
    extra = EXTRAS.get(command, "train")
    said = capsys.readouterr().err
    assert f"pip install 'fdkernels[{extra}]', or in its sources pip install '.[{extra}]'" in said


@pytest.mark.parametrize(
    ("module", "command"),
    [("lightning", "train"), ("skimage", "demo"), ("lightning", "demo"), ("jinja2", "report")],
)
def test_a_missing_extra_is_named(monkeypatch, capsys, tmp_path, module, command):
    _without(monkeypatch, module)
    options = {"train": ["--data", tmp_path, "--size=32"], "report": [tmp_path]}.get(command, [])
    assert _main(monkeypatch, command, *options, "--output", tmp_path / "x") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"fdkernels: {module}")
    assert f"is not installed: pip install 'fdkernels[{EXTRAS[command]}]', or in its sources" in said


def test_the_readme_names_the_extras_of_the_hints():
    readme = (ROOT / "README.md").read_text("utf-8")
    for extra in ("train,report", "train,dicom"):
        assert f"pip install '.[{extra}]'" in readme


def test_the_version_is_printed_with_and_without_typer(monkeypatch, capsys):
    assert _invoke("--version").output == f"fdkernels {fdk.__version__}\n"
    _without(monkeypatch, "typer")
    assert _main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"fdkernels {fdk.__version__}\n"


WRONG = {
    "--size=250": "--size must be a multiple of 16 from 32 to 4096, got 250; try 240 or 256",
    "--workers=1000000": "--workers must be an integer from 0 to 1024, got 1000000",
    "--workers=1024": "--workers must be at most ",
    "--devices=999": "--devices must be at most ",
    "--batch-size=1000000000": "--batch-size must be an integer from 1 to 4096, got 1000000000",
    "--epochs-warm=1000000000": "--epochs-warm must be an integer from 0 to 100000, got 1000000000",
    "--base-channels=1000000": "--base-channels must be an integer from 1 to 512, got 1000000",
    "--accumulate=0": "--accumulate must be an integer from 1 to 10000, got 0",
    "--precision=8": "--precision must be 32-true, ",
    "--strategy=x": "--strategy must be auto, ddp, ",
    "--backend=fpga": "--backend must be auto, cuda, triton, cpu or reference, got 'fpga'",
    "--convention=x": "--convention must be paper, ",
    "--lr=nan": "--lr must be a number above 0 and at most 10, got nan",
    "--dataset=cats": "--dataset must be tnbc, ",
}


@pytest.mark.parametrize("option", WRONG)
def test_a_wrong_option_is_refused_by_its_name_before_the_data_is_read(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    options = ["--data", tmp_path / "none", "--output", tmp_path / "run", "--size=32", "--accelerator=cpu"]
    with pytest.raises(ValueError, match=f"^{re.escape(WRONG[option])}"):
        _invoke("train", *options, option)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--accelerator=cuda"], "CUDAAccelerator"),
        (["--backend=cuda"], "backend='cuda' "),
        (["--model=attention_unet", "--base-channels=3"], "base_channels must be even"),
    ],
)
def test_what_the_machine_or_network_cannot_do_is_refused_before_the_data_is_read(tmp_path, options, message):
    if torch.cuda.is_available() and "cuda" in options[0]:
        pytest.skip("this machine can")
    fixed = ["--data", tmp_path / "none", "--output", tmp_path / "run", "--size=32"]
    with pytest.raises(Exception, match=message):
        _invoke(
            "train", *fixed, *([] if "--accelerator=cuda" in options else ["--accelerator=cpu"]), *options
        )


def test_a_file_in_place_of_the_output_is_refused_before_the_data_is_read(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        ValueError, match=r"--output must be a folder, got \S+/file/run, where \S+/file is a file"
    ):
        _invoke("train", "--data", tmp_path / "none", "--output", tmp_path / "file" / "run", "--size=32")


@pytest.mark.parametrize("option", ["--size=250", "--batch-size=0", "--workers=1000000", "--base-channels=0"])
def test_evaluate_refuses_a_wrong_option_by_its_name(tmp_path, option):
    arguments = ["--weights", tmp_path / "none", "--model=unet", "--dataset=tnbc", "--data", tmp_path]
    with pytest.raises(ValueError, match=f"^{option.partition('=')[0]} must be "):
        _invoke("evaluate", *arguments, "--output", tmp_path / "out", option)


@pytest.mark.parametrize("name", ["[lr=1e-3]", "a[/b]", "[bold]:fire:[/]", "[link=x]y"])
def test_names_with_brackets_and_colons_are_printed_as_they_are(data, tmp_path, name):
    folder = tmp_path / name
    options = [*SHORT, "--epochs-active=0", "--limit-batches=1", "--no-tensorboard"]
    trained = _invoke("train", "--data", data, "--output", folder, *options)
    assert trained.exit_code == 0
    assert trained.output.splitlines()[-1] == f"Weights, logs and results are in {folder}."
    scored = _invoke("evaluate", folder, "--device=cpu")
    assert scored.output.splitlines()[-1] == f"samples.csv and summary.json are in {folder}/evaluation."


def test_python_m_fdkernels_info_runs(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "fdkernels", "info"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"fdkernels {fdk.__version__}\n")
    assert done.stderr == ""
