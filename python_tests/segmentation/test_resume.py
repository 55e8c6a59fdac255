"""A run that is broken off anywhere and resumed ends with the weights of the unbroken run, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from fdkernels.segmentation import checkpoints
from fdkernels.segmentation.checkpoints import WholeFiles, read_checkpoint
from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.runfiles import read_json, read_weights
from fdkernels.segmentation.train import train
from tiny_data import make_tiny

CASES = {
    "shuffle": {"exchange": "shuffle"},
    "pooled-accumulate-workers": {"exchange": "pooled", "novel_images": 4, "accumulate": 2, "workers": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("tnbc", "udiat"):
        make_tiny(name, folder / name, images=10)
    return folder


def _config(data, **options):
    if options.get("exchange") == "pooled":
        options |= {"novel_dataset": "udiat", "novel_data": str(data / "udiat")}
    return TrainingConfig(
        dataset="tnbc",
        data=str(data / "tnbc"),
        base_channels=2,
        size=32,
        batch_size=2,
        lr=1e-2,
        alpha_lr=1e-2,
        accelerator="cpu",
        tensorboard=False,
        **{"output": "", "epochs_warm": 3, "epochs_active": 3, **options},
    )


def _same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def _assert_same_run(folder, whole):
    assert read_json(folder / "metrics.json") == read_json(whole / "metrics.json")
    for phase in ("warm", "active"):
        log = f"{phase}/logs/version_0/metrics.csv"
        assert (folder / log).read_bytes() == (whole / log).read_bytes()
        assert [path.name for path in (folder / phase / "logs").iterdir()] == ["version_0"]
        states = [torch.load(path / phase / "last.ckpt", weights_only=True) for path in (folder, whole)]
        for part in ("state_dict", "optimizer_states", "epoch", "global_step"):
            assert _same(states[0][part], states[1][part]), part
        assert _same(*(read_weights(path / phase / "best.safetensors") for path in (folder, whole)))


@pytest.fixture(scope="module", params=CASES)
def whole(request, data, tmp_path_factory):
    """The configuration of an unbroken run, its folder in it."""
    folder = tmp_path_factory.mktemp(request.param)
    config = _config(data, output=str(folder), **CASES[request.param])
    train(config, progress=False)
    return config


class _Break(Callback):
    """Breaks a run off in the middle of the epoch of that number of a phase."""

    def __init__(self, phase, epoch):
        self.place = (phase, epoch, 1)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        phase = "active" if pl_module.criterion.is_active else "warm"
        if (phase, trainer.current_epoch, batch_idx) == self.place:
            raise InterruptedError("broken off")


@pytest.mark.parametrize("phase", ["warm", "active"])
@pytest.mark.parametrize("epoch", [0, 2])
def test_broken_off_within_an_epoch(whole, tmp_path, phase, epoch):
    config = dataclasses.replace(whole, output=str(tmp_path / "run"))
    with pytest.raises(InterruptedError):
        train(config, callbacks=[_Break(phase, epoch)], progress=False)
    assert not (tmp_path / "run" / "metrics.json").exists()
    train(config, resume=True, progress=False)
    _assert_same_run(tmp_path / "run", Path(whole.output))


@pytest.mark.parametrize("lost", ["warm/result.json", "active/result.json", "metrics.json"])
def test_broken_off_between_the_last_epoch_and_the_result(whole, tmp_path, lost):
    shutil.copytree(whole.output, tmp_path / "run")
    (tmp_path / "run" / lost).unlink()
    (tmp_path / "run" / "metrics.json").unlink(missing_ok=True)
    train(dataclasses.replace(whole, output=str(tmp_path / "run")), resume=True, progress=False)
    _assert_same_run(tmp_path / "run", Path(whole.output))


def test_epochs_since_the_last_checkpoint_are_trained_again(whole, tmp_path, monkeypatch):
    config = dataclasses.replace(whole, output=str(tmp_path / "run"))
    monkeypatch.setattr(checkpoints.SaveBestAndLast, "on_train_epoch_end", _save_the_first_epoch)
    with pytest.raises(InterruptedError):
        train(config, callbacks=[_Break("active", 2)], progress=False)
    assert torch.load(tmp_path / "run" / "active" / "last.ckpt", weights_only=True)["epoch"] == 0
    monkeypatch.undo()
    train(config, resume=True, progress=False)
    _assert_same_run(tmp_path / "run", Path(whole.output))


SAVE = checkpoints.SaveBestAndLast.on_train_epoch_end


def _save_the_first_epoch(self, trainer, pl_module):
    if trainer.current_epoch == 0 or not pl_module.criterion.is_active:
        SAVE(self, trainer, pl_module)


def test_the_best_score_is_kept_when_the_folder_moves(whole, tmp_path):
    config = dataclasses.replace(whole, output=str(tmp_path / "run"))
    with pytest.raises(InterruptedError):
        train(config, callbacks=[_Break("active", 2)], progress=False)
    (tmp_path / "run").rename(tmp_path / "moved")
    last, best = (tmp_path / "moved" / "active" / name for name in ("last.ckpt", "best.ckpt"))
    checkpoint = torch.load(last, weights_only=True)
    # As released versions wrote it; no epoch reaches such a Dice.
    checkpoint["callbacks"]["SaveBestAndLast"] = {"score": 2.0, "next_epoch": checkpoint["epoch"] + 1}
    torch.save(checkpoint, last)
    before = best.read_bytes()
    train(dataclasses.replace(config, output=str(tmp_path / "moved")), resume=True, progress=False)
    assert best.read_bytes() == before
    assert torch.load(last, weights_only=True)["callbacks"]["SaveBestAndLast"]["score"] == 2


# In the background SIGINT is ignored, which a process inherits. The run waits for the signal in the fourth
# epoch of phase two, so that it is never over before.
CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
from pathlib import Path
from fdkernels.__main__ import main
from fdkernels.segmentation.module import SeedSteps
seed = SeedSteps.on_train_batch_start
def wait(self, trainer, module, batch, batch_idx):
    if module.criterion.is_active and (trainer.current_epoch, batch_idx) == (3, 1):
        Path("waiting").touch()
        while True:
            time.sleep(0.1)
    seed(self, trainer, module, batch, batch_idx)
SeedSteps.on_train_batch_start = wait
sys.exit(main())
"""
KILLS = {signal.SIGKILL: -9, signal.SIGINT: 1, signal.SIGTERM: 143}


@pytest.mark.parametrize("deadly", KILLS, ids=lambda number: number.name)
def test_killed_by_a_signal(data, tmp_path, deadly):
    config = _config(data, output=str(tmp_path / "whole"), epochs_warm=1, epochs_active=5)
    train(config, progress=False)
    broken = dataclasses.replace(config, output=str(tmp_path / "run"))
    options = [
        f"--{name.replace('_', '-')}={getattr(broken, name)}"
        for name in (
            *("data", "output", "base_channels", "size", "batch_size", "epochs_warm"),
            *("epochs_active", "lr", "alpha_lr", "accelerator"),
        )
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, "train", *options],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (tmp_path / "waiting").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(deadly)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == KILLS[deadly]
    assert ("Continue with: fdkernels train" in said) == (deadly != signal.SIGKILL)
    assert not (tmp_path / "run" / "active" / "result.json").exists()
    train(broken, resume=True, progress=False)
    _assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert not list((tmp_path / "run").rglob("*.unfinished"))


def test_a_checkpoint_that_cannot_be_finished_leaves_the_one_before(tmp_path):
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"epoch": 1}, path)
    with pytest.raises(AttributeError, match="local object"):
        WholeFiles().save_checkpoint({"epoch": 2, "bad": lambda: None}, path)
    assert read_checkpoint(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


class _Evil:
    """Executed by unpickling, which must never happen."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_loading_a_checkpoint_executes_nothing(tmp_path):
    torch.save({"state": _Evil(tmp_path / "executed")}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt is damaged, or fdkernels did not write it") as refused:
        WholeFiles().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert not (tmp_path / "executed").exists()
    assert "weights_only=False" not in str(refused.value)


def _without(*names):
    return lambda checkpoint: {name: value for name, value in checkpoint.items() if name not in names}


def _with(**changes):
    return lambda checkpoint: {**checkpoint, **changes}


def _first_weights(checkpoint, change):
    name = next(iter(checkpoint["state_dict"]))
    return {**checkpoint, "state_dict": {**checkpoint["state_dict"], name: change}}


TAMPERED = {
    "empty": lambda checkpoint: {},
    "a list": lambda checkpoint: [1, 2],
    "a tensor": lambda checkpoint: torch.zeros(3),
    "no weights": _without("state_dict"),
    "no optimizer": _without("optimizer_states"),
    "no loops": _without("loops"),
    "no best score": _with(callbacks={}),
    "no epoch": _without("epoch"),
    "no version": _without("pytorch-lightning_version"),
    "weights as text": _with(state_dict="weights"),
    "no weight left": _with(state_dict={}),
    "optimizer as number": _with(optimizer_states=3),
    "an empty optimizer": _with(optimizer_states=[{}]),
    "loops as list": _with(loops=[]),
    "loops of none": _with(loops={"fit_loop": None}),
    "callbacks as text": _with(callbacks="x"),
    "score as text": _with(callbacks={"SaveBestAndLast": {"score": "high"}}),
    "version as number": _with(**{"pytorch-lightning_version": 2}),
    "a weight of another shape": lambda checkpoint: _first_weights(checkpoint, torch.zeros(7)),
    "a weight as text": lambda checkpoint: _first_weights(checkpoint, "zero"),
}


@pytest.fixture(scope="module")
def broken(data, tmp_path_factory):
    """A run that was broken off in phase one."""
    config = _config(data, output=str(tmp_path_factory.mktemp("broken")), epochs_active=0, alpha_target=-9.0)
    with pytest.raises(InterruptedError):
        train(config, callbacks=[_Break("warm", 2)], progress=False)
    return config


def _refused(config):
    sentence = (
        r"^checkpoint \S+/warm/last\.ckpt is damaged, or fdkernels did not write it \(.*Put back the file"
    )
    with pytest.raises(ValueError, match=sentence) as refused:
        train(config, resume=True, progress=False)
    assert "weights_only=False" not in str(refused.value)


@pytest.mark.parametrize("change", TAMPERED)
def test_a_checkpoint_that_is_not_ours_is_refused_by_name(broken, tmp_path, change):
    shutil.copytree(broken.output, tmp_path / "run")
    last = tmp_path / "run" / "warm" / "last.ckpt"
    torch.save(TAMPERED[change](torch.load(last, weights_only=True)), last)
    _refused(dataclasses.replace(broken, output=str(tmp_path / "run")))


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04.", b"not a checkpoint" * 100], ids=range(4))
def test_a_file_that_is_no_checkpoint_is_refused_by_name(broken, tmp_path, content):
    shutil.copytree(broken.output, tmp_path / "run")
    (tmp_path / "run" / "warm" / "last.ckpt").write_bytes(content)
    _refused(dataclasses.replace(broken, output=str(tmp_path / "run")))


def test_a_checkpoint_with_code_in_it_is_refused_and_not_executed(broken, tmp_path):
    shutil.copytree(broken.output, tmp_path / "run")
    last = tmp_path / "run" / "warm" / "last.ckpt"
    torch.save({**torch.load(last, weights_only=True), "hparams": _Evil(tmp_path / "executed")}, last)
    _refused(dataclasses.replace(broken, output=str(tmp_path / "run")))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "result.json",
            {"best_epoch": "x"},
            r"result\.json must hold a number as best_epoch, got 'x'; remove",
        ),
        ("result.json", {"test": 3}, r"result\.json must hold a number as test\.dice, got None"),
        (
            "result.json",
            {"final_layer_losses": {}},
            r"must hold a number as final_layer_losses\.enc1, got None",
        ),
        ("../split.json", None, r"split\.json must hold an object with fields, got list"),
    ],
)
def test_a_tampered_result_or_split_is_refused_by_name(whole, tmp_path, file, change, message):
    shutil.copytree(whole.output, tmp_path / "run")
    path = tmp_path / "run" / "warm" / file
    path.write_text(json.dumps([] if change is None else {**read_json(path), **change}))
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(whole, output=str(tmp_path / "run")), resume=True, progress=False)


def test_best_weights_that_are_damaged_are_refused_by_name(whole, tmp_path):
    shutil.copytree(whole.output, tmp_path / "run")
    config = dataclasses.replace(whole, output=str(tmp_path / "run"))
    (tmp_path / "run" / "warm" / "best.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"best\.safetensors must be a whole safetensors file"):
        train(config, resume=True, progress=False)
    (tmp_path / "run" / "warm" / "result.json").unlink()
    torch.save({"state_dict": {}}, tmp_path / "run" / "warm" / "best.ckpt")
    with pytest.raises(
        ValueError, match=r"checkpoint .*best\.ckpt is damaged, or fdkernels did not write it"
    ):
        train(config, resume=True, progress=False)
