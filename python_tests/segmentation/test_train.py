from __future__ import annotations

import csv
import dataclasses
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fdkernels as fdk
from fdkernels import models
from fdkernels.segmentation import logs
from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.module import SegmentationModule
from fdkernels.segmentation.runfiles import read_json, read_weights
from fdkernels.segmentation.train import train
from tiny_data import write_tiny_tnbc


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_tnbc(tmp_path_factory.mktemp("tnbc"))


@pytest.fixture(scope="module")
def config(data):
    return TrainingConfig(
        dataset="tnbc",
        data=str(data),
        output="",
        base_channels=2,
        size=32,
        batch_size=2,
        epochs_warm=1,
        epochs_active=1,
        lr=1e-2,
        alpha_lr=1e-2,
        accelerator="cpu",
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A run with the loss: its folder and its metrics."""
    folder = tmp_path_factory.mktemp("runs") / "with"
    return folder, train(dataclasses.replace(config, output=str(folder)), progress=False)


def _logged(folder, phase, column):
    (log,) = (folder / phase / "logs").glob("version_*/metrics.csv")
    with log.open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


def test_tensorboard_gets_what_the_csv_gets(run):
    folder, _ = run
    for phase in ("warm", "active"):
        (log,) = (folder / phase / "logs").glob("version_*/metrics.csv")
        with log.open(newline="") as file:
            columns = set(csv.DictReader(file).fieldnames) - {"epoch", "step"}
        events = EventAccumulator(str(folder / phase / "tensorboard" / "version_0"))
        events.Reload()
        assert set(events.Tags()["scalars"]) - {"epoch"} == columns
        for name in ("train/loss", "val/dice", "alpha/enc1", "discrepancy_loss/bottleneck", "lr/network"):
            logged = [event.value for event in events.Scalars(name)]
            assert logged == pytest.approx(_logged(folder, phase, name), rel=1e-6)


def test_versions_and_seed_lie_in_the_configuration(run):
    folder, _ = run
    written = read_json(folder / "config.json")
    assert written["seed"] == 0
    assert written["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert set(written["versions"]) == {"fdkernels", "python", "torch", "lightning", "torchmetrics", "numpy"}


def test_a_run_says_on_what_it_computes(config, tmp_path, capsys):
    config = dataclasses.replace(config, output=str(tmp_path), epochs_active=0, precision="bf16-mixed")
    train(config)
    said = capsys.readouterr().out
    images = {
        part: len(entries) for part, entries in read_json(tmp_path / "split.json").items() if part in PARTS
    }
    assert f"unet on tnbc at 32x32: {images['train']} images to train on" in said
    assert f"{images['validation']} to validate, {images['test']} to test" in said
    assert "cpu, bf16-mixed, batches of 2, loss backend cpu, seed 0" in said


class NanInValidation(Callback):
    """Let the network put out NaN on validation images in given epochs, counted from 0."""

    def __init__(self, *epochs):
        self.epochs = epochs

    def on_validation_epoch_start(self, trainer, module):
        self.kept = {name: value.clone() for name, value in module.model.state_dict().items()}
        if trainer.current_epoch in self.epochs:
            for name, value in module.model.named_buffers():
                if name.endswith("running_mean"):
                    value.fill_(float("nan"))

    def on_validation_epoch_end(self, trainer, module):
        module.model.load_state_dict(self.kept)


def test_an_epoch_with_nan_in_validation_is_not_the_best(config, tmp_path):
    config = dataclasses.replace(config, output=str(tmp_path), epochs_warm=2, epochs_active=0)
    with pytest.warns(UserWarning, match="puts out NaN on validation images in epoch 1"):
        metrics = train(config, callbacks=[NanInValidation(0)], progress=False)
    warm = metrics["phases"]["warm"]
    assert warm["best_epoch"] == 2
    assert 0 <= warm["validation_dice"] <= 1


@pytest.mark.filterwarnings("ignore:the network puts out NaN")
def test_a_phase_with_nan_in_every_validation_ends_in_a_sentence(config, tmp_path):
    config = dataclasses.replace(config, output=str(tmp_path), epochs_warm=2, epochs_active=0)
    with pytest.raises(
        RuntimeError, match="none of 2 epochs has a validation Dice: the network puts out NaN"
    ):
        train(config, callbacks=[NanInValidation(0, 1)], progress=False)
    assert not (tmp_path / "warm" / "best.ckpt").exists()


def test_without_tensorboard_there_is_no_such_folder(config, tmp_path):
    config = dataclasses.replace(config, output=str(tmp_path), epochs_active=0, tensorboard=False)
    train(config, progress=False)
    assert not (tmp_path / "warm" / "tensorboard").exists()


def test_a_broken_run_does_not_wait_for_ever_for_tensorboard(tmp_path, monkeypatch):
    logger = logs.InterruptibleTensorBoard(tmp_path, name="tensorboard")
    logger.log_metrics({"train/loss": 1.0}, step=0)
    release, begun = threading.Event(), threading.Event()
    # As after a Ctrl-C within a write: the writer thread never says that it is done.
    monkeypatch.setattr(logger.experiment, "flush", lambda: (begun.set(), release.wait(60)))
    monkeypatch.setattr(logs, "_SECONDS_TO_CLOSE", 0.2)
    start = time.monotonic()
    logger.finalize("failed")
    assert begun.is_set()
    assert time.monotonic() - start < 30
    release.set()


PARTS = ("train", "validation", "test")


def _same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_alpha_is_zero_in_phase_one_and_moves_in_phase_two(run):
    folder, metrics = run
    names = models.create("unet", base_channels=2).tap_names
    for name in names:
        assert _logged(folder, "warm", f"alpha/{name}") == [0]
        assert _logged(folder, "active", f"alpha/{name}")[0] > 0
    assert list(metrics["phases"]["active"]["final_alpha"]) == names
    assert all(value == 0 for value in metrics["phases"]["warm"]["final_alpha"].values())
    assert all(value > 0 for value in metrics["phases"]["active"]["final_alpha"].values())


def test_metrics_json_holds_both_phases(run):
    folder, metrics = run
    assert read_json(folder / "metrics.json") == metrics
    assert list(metrics["phases"]) == ["warm", "active"]
    for phase, result in metrics["phases"].items():
        assert set(result["test"]) == {"dice", "iou", "dice_pooled", "iou_pooled", "images"}
        assert 0 <= result["test"]["iou"] <= result["test"]["dice"] <= 1
        assert result["validation_dice"] == pytest.approx(_logged(folder, phase, "val/dice")[0])
        assert result["best_epoch"] == result["epochs"] == 1
        assert result["test"]["images"] == len(read_json(folder / "split.json")["test"])


def test_configuration_and_split_lie_beside_the_run(run, config):
    folder, _ = run
    saved = TrainingConfig.from_json(read_json(folder / "config.json"))
    assert saved == dataclasses.replace(config, output=str(folder))
    split = read_json(folder / "split.json")
    parts = [split[part] for part in ("train", "test", "validation")]
    patients = [{entry["patient"] for entry in part} for part in parts]
    assert split["seed"] == 0
    assert len(set.union(*patients)) == sum(map(len, patients)) == 5


@pytest.mark.parametrize("phase", ["warm", "active"])
def test_the_best_weights_load_into_a_fresh_network(run, phase):
    folder, metrics = run
    model = models.create("unet", base_channels=2)
    weights = read_weights(folder / metrics["phases"][phase]["weights"])
    model.load_state_dict(weights)
    checkpoint = torch.load(folder / metrics["phases"][phase]["checkpoint"], weights_only=True)
    saved = {
        name.removeprefix("model."): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith("model.")
    }
    assert _same(saved, weights)


def test_the_target_of_alpha_lies_below_every_layer_of_phase_two(run):
    _, metrics = run
    phase = metrics["phases"]["active"]
    assert phase["alpha_target"] < min(phase["final_layer_losses"].values())
    assert min(phase["final_alpha"].values()) > 0


def test_the_same_seed_gives_the_same_weights(run, config, tmp_path):
    folder, metrics = run
    again = train(dataclasses.replace(config, output=str(tmp_path)), progress=False)
    assert again == metrics
    weights = "active/best.safetensors"
    assert _same(read_weights(folder / weights), read_weights(tmp_path / weights))


def test_without_the_loss_phase_one_is_the_same_and_phase_two_is_not(run, config, tmp_path):
    folder, _ = run
    metrics = train(dataclasses.replace(config, output=str(tmp_path), fd_loss=False), progress=False)
    for phase, same in (("warm", True), ("active", False)):
        weights = f"{phase}/best.safetensors"
        assert _same(read_weights(folder / weights), read_weights(tmp_path / weights)) == same
    assert "final_alpha" not in metrics["phases"]["active"]
    assert len(_logged(tmp_path, "active", "train/loss")) == 1


class _Stop(Callback):
    """Breaks a run off in the middle of an epoch of phase two."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.criterion.is_active and trainer.current_epoch == 1 and batch_idx == 1:
            raise InterruptedError("stopped")


def test_a_resumed_run_ends_like_an_unbroken_one(config, tmp_path):
    config = dataclasses.replace(config, epochs_active=3, exchange="shuffle")
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    broken = dataclasses.replace(config, output=str(tmp_path / "broken"))
    expected = train(whole, progress=False)
    with pytest.raises(InterruptedError):
        train(broken, callbacks=[_Stop()], progress=False)
    assert not (tmp_path / "broken" / "metrics.json").exists()
    warm = (tmp_path / "broken" / "warm" / "result.json").stat().st_mtime_ns
    resumed = train(broken, resume=True, progress=False)
    assert (tmp_path / "broken" / "warm" / "result.json").stat().st_mtime_ns == warm
    assert resumed == expected
    states = [
        torch.load(tmp_path / name / "active" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "broken")
    ]
    states = [
        {name: value for name, value in state.items() if isinstance(value, torch.Tensor)} for state in states
    ]
    assert _same(*states)


def test_a_run_that_is_complete_is_not_trained_again(run, config):
    folder, metrics = run
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.ckpt")}
    assert train(dataclasses.replace(config, output=str(folder)), resume=True) == metrics
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*.ckpt")}


def test_a_folder_with_a_run_is_not_overwritten(run, config):
    folder, _ = run
    with pytest.raises(ValueError, match="already holds a run"):
        train(dataclasses.replace(config, output=str(folder)))


def test_resuming_with_other_data_is_refused(run, config, tmp_path):
    folder, _ = run
    other = write_tiny_tnbc(tmp_path, {"01": [1], "02": [1], "03": [1], "05": [1]})
    with pytest.raises(ValueError, match="no longer splits as"):
        train(dataclasses.replace(config, output=str(folder), data=str(other)), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"convention": "none"}, "convention"),
        ({"alpha_rule": "up"}, "alpha_rule"),
        ({"backend": "fpga"}, "backend"),
        ({"size": 40}, "a multiple of 16 from 32 to 4096, got 40; try 32 or 48"),
    ],
)
def test_a_wrong_choice_can_be_corrected_in_the_same_folder(config, tmp_path, changes, message):
    config = dataclasses.replace(config, output=str(tmp_path / "run"), epochs_active=0)
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config, **changes), progress=False)
    assert not list(tmp_path.rglob("*.ckpt"))
    train(config, progress=False)


def test_one_phase_can_be_left_out(config, tmp_path):
    config = dataclasses.replace(
        config, output=str(tmp_path), epochs_warm=0, alpha_target=-9.0, limit_batches=1
    )
    metrics = train(config, progress=False)
    assert list(metrics["phases"]) == ["active"]
    assert metrics["phases"]["active"]["alpha_target"] == -9


def test_exchange_drops_a_last_batch_of_one(config, tmp_path):
    sizes = []

    class Record(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sizes.append(len(batch["image"]))

    config = dataclasses.replace(config, output=str(tmp_path), batch_size=2, exchange="shuffle")
    train(config, callbacks=[Record()], progress=False)
    images = len(read_json(tmp_path / "split.json")["train"])
    assert sizes == [2] * (images // 2) * 2


def test_a_module_needs_a_learning_rate(config):
    with pytest.raises(ValueError, match="lr must be given"):
        SegmentationModule.from_config(dataclasses.replace(config, lr=None))


def test_fused_normalisations_train_to_the_same_losses(config, run, tmp_path, monkeypatch):
    folder, metrics = run
    fused: list[dict[str, str]] = []
    fuse_norms = fdk.fuse_norms

    def record(*given):
        fused.append(fuse_norms(*given))
        return fused[-1]

    monkeypatch.setattr(fdk, "fuse_norms", record)
    apart = dataclasses.replace(config, output=str(tmp_path / "apart"), fuse=False)
    other = train(apart, progress=False)
    assert fused == []
    again = train(dataclasses.replace(config, output=str(tmp_path / "again")), progress=False)
    assert all(said.startswith("fused") for said in fused[0].values())
    dice = {
        name: of["phases"]["active"]["test"]["dice"]
        for name, of in {"run": metrics, "apart": other, "again": again}.items()
    }
    assert dice["again"] == dice["run"]
    assert dice["apart"] == pytest.approx(dice["run"], abs=0.02)
    # Not the weights: Adam takes a whole step on the rounding in the gradient of a bias before a norm.
    for phase in ("warm", "active"):
        for column in ("train/loss", "train/segmentation_loss", "alpha/enc1"):
            wanted = pytest.approx(_logged(tmp_path / "apart", phase, column), rel=1e-3)
            assert _logged(folder, phase, column) == wanted


@pytest.mark.parametrize(
    ("sync", "gpus", "processes", "fused"),
    [
        (None, True, 2, False),
        (None, True, 1, True),
        (None, False, 2, True),
        (False, True, 2, True),
        (True, False, 2, False),
        (True, True, 1, True),
    ],
)
def test_norms_that_are_to_be_synchronised_are_not_fused(config, monkeypatch, sync, gpus, processes, fused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(SegmentationModule, "trainer", SimpleNamespace(world_size=processes))
    asked = dataclasses.replace(config, sync_batchnorm=sync, accelerator="auto")
    module = SegmentationModule.from_config(asked)
    monkeypatch.setattr(torch.distributed, "group", SimpleNamespace(WORLD="all processes"))
    module.setup("fit")
    assert any(isinstance(child, fdk.NormAct) for child in module.modules()) == fused


def test_taps_are_set_once_an_epoch_and_not_while_evaluating(config, tmp_path, monkeypatch):
    made = []

    class Counted(fdk.FeatureTaps):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            made.append(self)

    class Look(Callback):
        def __init__(self):
            self.hooks = {"training": [], "evaluating": []}

        def see(self, module, when):
            found = sum(len(child._forward_hooks) for child in module.model.modules())
            self.hooks[when].append(found)

        def on_train_batch_end(self, trainer, module, *_):
            self.see(module, "training")
            (taps,) = made[-1:]
            assert taps.given_mask is None
            with pytest.raises(RuntimeError):  # neither do they hold features
                _ = taps.features

        def on_validation_batch_start(self, trainer, module, *_):
            self.see(module, "evaluating")

        def on_test_batch_start(self, trainer, module, *_):
            self.see(module, "evaluating")

    monkeypatch.setattr(fdk, "FeatureTaps", Counted)
    look = Look()
    run = dataclasses.replace(config, output=str(tmp_path / "run"))
    train(run, callbacks=[look], progress=False)
    assert len(made) == run.epochs_warm + run.epochs_active
    assert look.hooks["evaluating"] == [0] * len(look.hooks["evaluating"])
    assert min(look.hooks["training"]) > 0


def test_a_run_from_before_norms_were_fused_goes_on_without():
    fields = TrainingConfig(dataset="tnbc", data="", output="").as_json()
    del fields["fuse"]
    assert TrainingConfig.from_json(fields).fuse is False
