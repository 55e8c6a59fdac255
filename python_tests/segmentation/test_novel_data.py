from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.data import DATASETS, FoundSamples, SegmentationSample
from fdkernels.segmentation.novel_data import check_apart, draw_novel
from fdkernels.segmentation.run_data import find_data, split_data
from fdkernels.segmentation.runfiles import read_json
from fdkernels.segmentation.train import train
from tiny_data import make_tiny

SAMPLES = tuple(SegmentationSample(Path(f"{n}.png"), (Path(f"{n}_m.png"),), str(n)) for n in range(9))


def test_fewer_images_are_among_more():
    found = FoundSamples(SAMPLES)
    drawn = [draw_novel(found, count, seed=3) for count in (2, 5, None)]
    assert drawn[0] == drawn[1][:2]
    assert drawn[1] == drawn[2][:5]
    assert sorted(drawn[2], key=lambda sample: sample.patient) == list(SAMPLES)
    assert draw_novel(FoundSamples(SAMPLES[::-1]), 5, seed=3) == drawn[1]
    assert draw_novel(found, 5, seed=4) != drawn[1]


def test_more_images_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"novel_images must be at most the 9 images .*, got 10"):
        draw_novel(FoundSamples(SAMPLES), 10, seed=0)


def test_the_same_images_in_both_sets_are_refused():
    check_apart(SAMPLES[:4], SAMPLES[4:])
    with pytest.raises(ValueError, match=r"other images than data, got 3\.png in both"):
        check_apart(SAMPLES[:4], SAMPLES[3:])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return TrainingConfig(
        dataset="us-tnbc",
        data=str(make_tiny("us-tnbc", folder / "base")),
        novel_dataset="udiat",
        novel_data=str(make_tiny("udiat", folder / "novel", images=7)),
        output="",
    ).resolved()


def test_novel_images_are_trained_on_and_never_evaluated(config):
    (data,) = split_data(config, *find_data(config)).values()
    base = {sample.image for sample in DATASETS["us-tnbc"].find(config.data).samples}
    parts = (data.split.train, data.split.validation, data.split.test)
    assert {sample.image for part in parts for sample in part} == base
    assert len(data.novel) == 7
    assert not {sample.image for sample in data.novel} & base


def test_what_was_left_out_is_told_and_written(config, tmp_path, capsys):
    folder = tmp_path / "novel"
    shutil.copytree(config.novel_data, folder)
    (folder / "original" / "000003.png").write_bytes(b"no image")
    options = {"novel_data": str(folder), "output": str(tmp_path / "run")}
    broken = {**config.as_json(), **options}
    with pytest.raises(ValueError, match=r"000003\.png cannot be read"):
        train(TrainingConfig(**broken))
    small = {
        "size": 32,
        "base_channels": 2,
        "epochs_warm": 1,
        "epochs_active": 0,
        "limit_batches": 1,
        "accelerator": "cpu",
        "on_problem": "skip",
        "exchange": "pooled",
    }
    train(TrainingConfig(**{**broken, **small}))
    split = read_json(tmp_path / "run" / "split.json")
    assert len(split["novel"]) == 6
    (sentence,) = split["skipped"]
    assert "000003.png" in sentence
    assert "Left out: " in capsys.readouterr().err
