from __future__ import annotations

import pytest
import torch

from fdkernels.segmentation.runfiles import (
    read_json,
    read_weights,
    replacing,
    write_json,
    write_weights,
)


def test_json_is_read_as_written(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_json(path, {"a": [1, None, "x"]})
    assert read_json(path) == {"a": [1, None, "x"]}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, float("nan"))
    assert read_json(path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_a_written_file_is_as_readable_as_any_new_one(tmp_path):
    with replacing(tmp_path / "one") as temporary:
        temporary.write_text("1")
    (tmp_path / "other").write_text("1")
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("content", [None, "{"])
def test_a_missing_or_broken_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x.json cannot be read"):
        read_json(tmp_path / "x.json")


def test_weights_are_read_as_written(tmp_path):
    state = {"a": torch.randn(2, 3).t(), "b": torch.tensor(7)}
    write_weights(tmp_path / "w.safetensors", state, {"model": "unet"})
    read = read_weights(tmp_path / "w.safetensors")
    assert set(read) == {"a", "b"}
    assert all(torch.equal(read[name], state[name]) for name in state)
