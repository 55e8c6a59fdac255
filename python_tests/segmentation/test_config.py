from __future__ import annotations

import dataclasses

import pytest

from fdkernels.segmentation.config import TrainingConfig

CONFIG = TrainingConfig("tnbc", "data", "out")


def test_the_defaults_are_those_of_the_paper():
    config = CONFIG.resolved()
    assert (config.epochs_warm, config.epochs_active) == (100, 75)
    assert config.lr == 1e-4
    assert config.size == 512


def test_what_is_given_goes_before_the_preset():
    config = dataclasses.replace(CONFIG, size=64, lr=0.5).resolved()
    assert (config.size, config.lr) == (64, 0.5)


def test_json_gives_the_same_configuration():
    assert TrainingConfig.from_json(CONFIG.as_json()) == CONFIG


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer from 1 to 4096, got 0"),
        ({"seed": -1}, "seed must be an integer from 0 to 4294967295, got -1"),
        ({"lr": 0.0}, "lr must be a number above 0 and at most 10, got 0.0"),
        ({"alpha_lr": float("nan")}, "alpha_lr must be a number above 0 and at most 10, got nan"),
        ({"epochs_warm": 0, "epochs_active": 0}, "must not both be 0"),
        ({"model": "vnet"}, "model must be unet, .* or cmunet, got 'vnet'"),
        ({"exchange": "mixed"}, "exchange must be none, shuffle or pooled, got 'mixed'"),
        ({"exchange": "pooled"}, "novel_dataset and novel_data must name the second"),
        ({"novel_dataset": "monuseg"}, "must be given together"),
        ({"novel_images": 3}, "novel_dataset, which must be given with it"),
        ({"fold": 6}, "fold must be 1, 2, 3, 4, 5 or all, got 6"),
        ({"on_problem": "ask"}, "on_problem must be refuse or skip, got 'ask'"),
        ({"accumulate": 0}, "accumulate must be an integer from 1 to 10000, got 0"),
        ({"exchange": "shuffle", "batch_size": 1}, "batch_size must be at least 2"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_one_image_a_device_can_be_exchanged_among_several():
    config = dataclasses.replace(CONFIG, exchange="shuffle", batch_size=1, devices="2")
    assert config.exchanges


def test_versions_beside_the_configuration_are_left_alone():
    assert TrainingConfig.from_json({**CONFIG.as_json(), "versions": {"torch": "2"}}) == CONFIG


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match=r"dataset must be tnbc, .*, got 'cats'"):
        dataclasses.replace(CONFIG, dataset="cats").resolved()


def test_a_file_with_other_fields_is_refused():
    with pytest.raises(ValueError, match="unknown fields: colour"):
        TrainingConfig.from_json({**CONFIG.as_json(), "colour": 1})
    with pytest.raises(ValueError, match="missing fields: output"):
        TrainingConfig.from_json({"dataset": "tnbc", "data": "x"})
