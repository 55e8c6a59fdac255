from __future__ import annotations

import pytest

from fdkernels import models
from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.data import DATASETS
from fdkernels.segmentation.presets import PRESETS, TABLE_2, preset_fields

# Sections 3.1 and A.4: side of the images and learning rate.
PAPER = {
    "tnbc": (512, 1e-4),
    "udiat": (256, 1e-4),
    "ad-256": (256, 1e-3),
    "ad-128": (128, 1e-3),
    "us-tnbc": (512, 1e-3),
}


def test_there_is_every_network_on_every_data_set_and_table_2_comes_first():
    assert len(set(TABLE_2)) == 9
    assert list(PRESETS.values())[:9] == list(TABLE_2)
    assert set(PRESETS) == {f"{dataset}-{model}" for dataset in DATASETS for model in models.names()}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_a_configuration(name):
    config = TrainingConfig(data="data", output="out", **preset_fields(name))
    assert config == config.resolved()
    assert name == f"{config.dataset}-{config.model}"
    assert config.model in models.names()
    assert config.batch_size * config.size**2 in (4 * 512**2, 8 * 256**2, 16 * 128**2)


@pytest.mark.parametrize("dataset", PAPER)
def test_size_and_rate_are_those_of_the_paper(dataset):
    fields = preset_fields(f"{dataset}-unet")
    assert (fields["size"], fields["lr"]) == PAPER[dataset]


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("tnbc-nucleisegne", "did you mean tnbc-nucleisegnet"),
        ("udiat-attention-unet", "did you mean udiat-attention_unet"),
        ("TNBC-UNet", "did you mean tnbc-unet"),
        ("?", "there are udiat-attention_unet, "),
    ],
)
def test_an_unknown_name_is_refused_with_those_that_come_close(name, close):
    with pytest.raises(ValueError, match=rf"DATASET-MODEL, got .*{close}"):
        preset_fields(name)
