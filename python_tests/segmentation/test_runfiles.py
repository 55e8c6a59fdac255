from __future__ import annotations

import pytest
import torch

from fdkernels.segmentation.runfiles import (
    read_json,
    read_weights,
    replacing,
    replacing_folder,
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


def _names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "out"
    for name in ("one", "two"):
        with replacing_folder(path, ["one", "two"]) as temporary:
            (temporary / name).write_text(name)
            assert _names(temporary) == [name]
        assert _names(path) == [name]
    assert _names(tmp_path) == ["out"]


def test_a_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    (path / "one").write_text("before")

    def fail(folder):
        (folder / "one").write_text("after")
        raise KeyError

    with pytest.raises(KeyError), replacing_folder(path, ["one"]) as temporary:
        fail(temporary)
    assert (path / "one").read_text() == "before"
    assert _names(tmp_path) == ["out"]


def test_a_folder_with_something_else_in_it_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with (
        pytest.raises(ValueError, match=r"holds notes\.txt, which is none of one, two; move that away"),
        replacing_folder(tmp_path, ["one", "two"]),
    ):
        pytest.fail("began to write")
    assert _names(tmp_path) == ["notes.txt"]


def test_what_was_put_there_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "out"

    def work():
        path.mkdir()
        (path / "notes.txt").write_text("mine")

    with pytest.raises(ValueError, match=r"holds notes\.txt"), replacing_folder(path, ["one"]):
        work()
    assert _names(path) == ["notes.txt"]
    assert _names(tmp_path) == ["out"]


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    with (
        pytest.raises(ValueError, match="output must be a folder, got the file"),
        replacing_folder(tmp_path / "out", []),
    ):
        pytest.fail("began to write")


def test_a_folder_behind_a_link_is_replaced_and_the_link_kept(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replacing_folder(tmp_path / "link", ["one"]) as temporary:
        (temporary / "one").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert _names(tmp_path / "real") == ["one"]


def test_a_written_folder_is_as_readable_as_any_new_one(tmp_path):
    with replacing_folder(tmp_path / "one", []):
        pass
    (tmp_path / "other").mkdir()
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "other").stat().st_mode
