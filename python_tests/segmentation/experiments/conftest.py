from __future__ import annotations

import dataclasses

import pytest

from fdkernels.segmentation.config import TrainingConfig
from tiny_data import make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The options of the smallest experiment; `output` is to be set."""
    data = make_tiny("tnbc", tmp_path_factory.mktemp("tnbc"))
    return TrainingConfig(
        dataset="tnbc",
        data=str(data),
        output="",
        base_channels=2,
        size=32,
        batch_size=2,
        epochs_warm=2,
        epochs_active=2,
        lr=1e-2,
        alpha_lr=1e-2,
        accelerator="cpu",
        tensorboard=False,
    )


@pytest.fixture(scope="session")
def ablation(tiny, tmp_path_factory):
    """A finished ablation of two seeds and two folds: its options, and the content of summary.json."""
    from fdkernels.segmentation.experiments.engine import run_experiment

    config = dataclasses.replace(tiny, output=str(tmp_path_factory.mktemp("experiments") / "ablation"))
    return config, run_experiment("ablation", config, seeds=2, folds=2, jobs=1, progress=False)
