"""What files do not say themselves is said once, by options, and holds wherever samples are read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.data import DATASETS, ReadingRules, SegmentationDataset, SegmentationSample
from fdkernels.segmentation.data.reading import load_pair
from fdkernels.segmentation.run_data import find_data, split_data
from fdkernels.segmentation.saved_runs import SavedRun, begin_run
from made_images import png
from tiny_data import make_tiny

NOVEL = {"novel_dataset": "tnbc", "novel_data": "nowhere"}


@pytest.fixture
def labelled(tmp_path):
    """A data set whose masks are 1 in the lesion and 255 in a margin of three rows."""
    root = make_tiny("udiat", tmp_path / "udiat")
    for path in (root / "GT").iterdir():
        with Image.open(path) as image:
            values = np.array(image) // 255
        values[:3] = 255
        Image.fromarray(values).save(path)
    return root


@pytest.fixture
def deep(tmp_path):
    """A data set whose images use 12 of 16 bits, and do not say so."""
    root = make_tiny("udiat", tmp_path / "deep")
    for path in (root / "original").iterdir():
        with Image.open(path) as image:
            values = np.array(image).astype(np.uint16) * 16
        Image.fromarray(values).save(path)
    return root


def test_labels_are_one_problem_a_mask_until_their_value_is_named(labelled):
    with pytest.raises(ValueError, match="10 problems:") as raised:
        DATASETS["udiat"].find(labelled)
    assert str(raised.value).count("0, 1 and 255; say which values are foreground with --mask-values") == 10
    found = DATASETS["udiat"].samples(labelled, rules=ReadingRules(mask_values="1"))
    for sample in found.samples:
        _, mask = load_pair(sample)
        with Image.open(sample.masks[0]) as stored:
            assert np.array_equal(np.array(mask) > 0, np.array(stored) == 1)


def test_values_that_no_mask_has_are_refused(labelled, tmp_path):
    root = make_tiny("tnbc", tmp_path / "tnbc")  # its masks may be empty
    with pytest.raises(ValueError, match=r"mask_values must be values of the masks in .*tnbc, got 7"):
        DATASETS["tnbc"].samples(root, "skip", ReadingRules(mask_values="7"))
    with pytest.raises(ValueError, match="has a mask without foreground"):
        DATASETS["udiat"].samples(labelled, rules=ReadingRules(mask_values="7"))


def test_12_of_16_bits_are_one_problem_an_image_until_they_are_named(deep):
    with pytest.raises(ValueError, match="10 problems:") as raised:
        DATASETS["udiat"].find(deep)
    assert str(raised.value).count("say it with --image-bits") == 10
    found = DATASETS["udiat"].samples(deep, rules=ReadingRules(image_bits=12))
    assert found.notes == ()
    assert max(item["image"].max() for item in SegmentationDataset(found.samples)) > 0.9


def test_bits_that_files_say_are_said_once(tmp_path):
    root = make_tiny("udiat", tmp_path / "udiat")
    for number, path in enumerate(sorted((root / "original").iterdir())):
        if number < 4:
            with Image.open(path) as image:
                values = np.array(image).astype(np.uint16)[..., None] * 16 + 1
            path.write_bytes(png(values, 0, 16, 12))
    (note,) = DATASETS["udiat"].find(root).notes
    assert note.endswith(
        "has 4 images that use 12 of 16 bits, as their files say; they are scaled by 255/4095"
    )


def test_rules_hold_inside_their_block_only():
    rules = ReadingRules("1", 12)
    with rules.applied():
        inside = SegmentationSample("a.png", ("b.png",), "p")
    assert inside.rules == rules
    assert SegmentationSample("a.png", ("b.png",), "p").rules == ReadingRules()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_values": "one"}, "mask_values must be values of the mask .* got 'one'"),
        ({"novel_mask_values": "9-1", **NOVEL}, 'novel_mask_values must be numbers and ranges .* got "9-1"'),
        ({"novel_mask_values": "1"}, "novel_dataset, which must be given with it, got 1 and no"),
        ({"image_bits": 8}, "image_bits must be an integer from 9 to 16, got 8"),
        ({"image_bits": 17}, "image_bits must be an integer from 9 to 16, got 17"),
    ],
)
def test_rules_that_cannot_be_are_refused_before_anything_is_read(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig("udiat", "nowhere", "out", **fields)


def test_a_run_and_its_evaluation_read_by_the_rules_of_the_run(labelled, tmp_path):
    config = TrainingConfig("udiat", str(labelled), str(tmp_path / "run"), mask_values="1", image_bits=12)
    config = config.resolved()
    (data,) = split_data(config, *find_data(config)).values()
    assert {sample.rules for sample in data.split.train} == {ReadingRules("1", 12)}
    begin_run(config, data.as_json(config), resume=False)
    samples, _ = SavedRun(tmp_path / "run", config).part("test")
    assert samples == list(data.split.test)


def test_each_data_set_has_its_own_mask_values(labelled, tmp_path):
    novel = make_tiny("us-tnbc", tmp_path / "novel")
    config = TrainingConfig(
        *("udiat", str(labelled), str(tmp_path / "run")),
        mask_values="1",
        novel_dataset="us-tnbc",
        novel_data=str(novel),
        image_bits=12,
    )
    base, added = find_data(config.resolved())
    assert {sample.rules for sample in base.samples} == {ReadingRules("1", 12)}
    assert {sample.rules for sample in added.samples} == {ReadingRules(None, 12)}
    other = dataclasses.replace(config, novel_mask_values="128-255")
    assert find_data(other)[1].samples[0].rules == ReadingRules("128-255", 12)
