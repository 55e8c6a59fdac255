"""A run that is broken off anywhere and resumed ends with the weights of the unbroken run, bit for bit."""

from __future__ import annotations

import dataclasses
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
from fdkernels.segmentation.checkpoints import WholeFiles
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


@pytest.mark.parametrize("deadly", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_killed_by_a_signal(data, tmp_path, deadly):
    config = _config(data, output=str(tmp_path / "whole"), epochs_warm=1, epochs_active=8)
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
        [sys.executable, "-m", "fdkernels", "train", *options],
        env=environment,
        cwd=tmp_path,  # `-m` would find a source tree in the folder of this process first
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.monotonic() + 120
    while not (tmp_path / "run" / "active" / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(deadly)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert ("Continue with: fdkernels train" in said) == (deadly == signal.SIGINT)
    assert not (tmp_path / "run" / "active" / "result.json").exists()
    train(broken, resume=True, progress=False)
    _assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert not list((tmp_path / "run").rglob("*.unfinished"))


def test_a_checkpoint_that_cannot_be_finished_leaves_the_one_before(tmp_path):
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"epoch": 1}, path)
    with pytest.raises(AttributeError, match="local object"):
        WholeFiles().save_checkpoint({"epoch": 2, "bad": lambda: None}, path)
    assert WholeFiles().load_checkpoint(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_loading_a_checkpoint_executes_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"state": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt is damaged, or fdkernels did not write it"):
        WholeFiles().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert not (tmp_path / "executed").exists()
