"""Two processes with half of each batch train to the weights of one process with all of it."""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fdkernels import models
from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.runfiles import read_json, read_weights
from fdkernels.segmentation.train import train

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)

CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "shuffle": {"exchange": "shuffle", "accumulate": 2},
    "pooled": {"exchange": "pooled", "convention": "region_mean"},
    "without the loss": {"fd_loss": False},
}


CREATE = models.create


def _without_batch_norm(*arguments: Any, **options: Any) -> Any:
    """A network whose output for a sample does not depend on the other samples."""
    network = CREATE(*arguments, **options)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, child.num_features))
    return network


def _config(folder: Path, name: str) -> TrainingConfig:
    options = {
        "dataset": "tnbc",
        "data": str(folder / "tnbc"),
        "output": str(folder / name.replace(" ", "-")),
        "base_channels": 2,
        "size": 32,
        "batch_size": 4,
        "epochs_warm": 1,
        "epochs_active": 2,
        "lr": 1e-3,
        "alpha_lr": 1e-2,
        "accelerator": "cpu",
        "precision": "64-true",
        "workers": 0,
        **CASES[name],
    }
    if name == "pooled":
        options |= {"novel_dataset": "udiat", "novel_data": str(folder / "udiat"), "novel_images": 3}
    return TrainingConfig(**options)


def work(folder: Path) -> None:
    """Both ranks; Lightning starts the second by running this file once more."""
    # A rank that waits for the other for ever would hold up all tests.
    faulthandler.dump_traceback_later(200, exit=True)
    torch.set_num_threads(1)
    models.create = _without_batch_norm
    for name in CASES:
        config = _config(folder, name)
        half = dataclasses.replace(
            config, output=config.output + "-ranks", batch_size=2, devices="2", strategy="ddp"
        )
        metrics = train(half, progress=False)
        if os.environ["LOCAL_RANK"] == "1":
            torch.save(metrics, folder / f"{name}.pt")
    dist.barrier()
    # Without cleaning up: gloo's threads and the destructor of their group may wait for each other.
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    from tiny_data import make_tiny

    folder = tmp_path_factory.mktemp("ranks")
    for name, images in (("tnbc", 16), ("udiat", 6)):
        make_tiny(name, folder / name, images=images)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module", params=CASES)
def pair(ranks, request):
    """The folders of the run in one process and of that on two ranks, and their metrics."""
    config = _config(ranks, request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "create", _without_batch_norm)
        alone = train(config, progress=False)
    second = torch.load(ranks / f"{request.param}.pt", weights_only=True)
    return Path(config.output), Path(config.output + "-ranks"), alone, second


def test_weights_and_alpha_are_those_of_one_process(pair):
    alone, shared, *_ = pair
    for phase in ("warm", "active"):
        states = [
            torch.load(folder / phase / "last.ckpt", weights_only=True)["state_dict"]
            for folder in (alone, shared)
        ]
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(states[1][name], value, rtol=1e-7, atol=1e-9)
        best = [read_weights(folder / phase / "best.safetensors") for folder in (alone, shared)]
        for name, value in best[0].items():
            torch.testing.assert_close(best[1][name], value, rtol=1e-7, atol=1e-9)


def test_evaluation_counts_no_sample_twice(pair):
    _, shared, alone, second = pair
    parts = read_json(shared / "split.json")
    assert len(parts["test"]) % 2 or len(parts["validation"]) % 2
    for phase, result in read_json(shared / "metrics.json")["phases"].items():
        assert result["test"]["images"] == len(parts["test"])
        assert result["test"] == pytest.approx(alone["phases"][phase]["test"])
        assert result["validation_dice"] == pytest.approx(alone["phases"][phase]["validation_dice"])
        assert second["phases"][phase] == result


def test_only_the_first_rank_writes(pair):
    _, shared, *_ = pair
    for phase in ("warm", "active"):
        assert [path.name for path in (shared / phase / "logs").iterdir()] == ["version_0"]
        assert len(list((shared / phase / "tensorboard" / "version_0").glob("events.*"))) == 1
    assert not list(shared.rglob(".*"))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
