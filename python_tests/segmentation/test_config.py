from __future__ import annotations

import dataclasses
import json

import pytest

from fdkernels.segmentation import config as config_module
from fdkernels.segmentation.config import TrainingConfig, check_processes
from fdkernels.segmentation.fields import FieldError, check_field
from fdkernels.segmentation.saved_runs import read_config

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


ODD = [
    *(None, "", "x", "eight", "3", "../../etc", "[/x]", "\0", "\ud800", "a" * 10_000),
    *(True, False, -1, 0, 1, 3, 250, 10**9, 10**400, -(10**30)),
    *(0.5, -0.0, 1e30, float("nan"), float("inf"), float("-inf")),
    *([], [1], {}, {"a": 1}, [[[]]]),
]
# What of these a field may hold, None and its own default aside.
LEGAL = {
    **dict.fromkeys(
        ("data", "output", "novel_data"), ("", "x", "eight", "3", "../../etc", "[/x]", "a" * 10_000)
    ),
    **dict.fromkeys(("dataset", "novel_dataset"), ("x", "eight", "3")),
    **dict.fromkeys(("mask_values", "novel_mask_values"), ("3",)),
    **dict.fromkeys(("base_channels", "batch_size", "accumulate", "num_nodes"), (1, 3, 250)),
    **dict.fromkeys(("novel_images", "limit_batches"), (1, 3, 250)),
    **dict.fromkeys(("epochs_warm", "epochs_active", "workers"), (0, 1, 3, 250)),
    **dict.fromkeys(("lr", "alpha_lr"), (1, 3, 0.5)),
    **dict.fromkeys(
        ("fd_loss", "channels_last", "compile", "fuse", "tensorboard", "sync_batchnorm"), (True, False)
    ),
    "alpha_max": (1, 3, 250, 0.5),
    "alpha_target": (-1, 0, 1, 3, 250, 0.5, -0.0),
    "seed": (0, 1, 3, 250, 10**9),
    "fold": (1, 3),
    "devices": ("3",),
}
FIELDS = {field.name: field for field in dataclasses.fields(TrainingConfig)}


def _equal(one, other):
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_takes_what_it_means_and_refuses_the_rest_by_name(name):
    optional = FIELDS[name].default is None
    for value in ODD:
        legal = any(_equal(value, one) for one in LEGAL.get(name, ())) or (optional and value is None)
        if legal:
            check_field(TrainingConfig, name, value)
            continue
        with pytest.raises(FieldError, match=f"^{name} must be ") as refused:
            dataclasses.replace(CONFIG, **{name: value})
        assert refused.value.field == name
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize("name", FIELDS)
def test_a_file_with_a_wrong_field_is_refused_by_the_name_of_both(tmp_path, name):
    path = tmp_path / "config.json"
    for value in ODD:
        path.write_text(json.dumps({**CONFIG.as_json(), name: value}))
        try:
            read_config(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} ")  # noqa: PT017 - some values are taken
            assert name in str(error)  # noqa: PT017


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "nul", '{"seed": 1' + "0" * 5000 + "}", "\xff"])
def test_a_file_that_is_no_configuration_is_refused_by_its_name(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json cannot be read: "):
        read_config(path)


def test_the_sizes_that_work_are_named():
    for size, near in ((250, "240 or 256"), (33, "32 or 48"), (31, "32"), (4095, "4080 or 4096")):
        with pytest.raises(ValueError, match=f"a multiple of 16 from 32 to 4096, got {size}; try {near}$"):
            dataclasses.replace(CONFIG, size=size)


def test_processes_are_bounded_by_the_cores_of_the_machine(monkeypatch):
    monkeypatch.setattr(config_module, "cores", lambda: 2)
    check_processes("workers", 8)
    with pytest.raises(FieldError, match="workers must be at most 8 on this machine with 2 cores, got 9"):
        check_processes("workers", 9)
