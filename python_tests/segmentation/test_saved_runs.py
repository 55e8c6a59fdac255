from __future__ import annotations

import shutil

import pytest
import torch

from fdkernels import models
from fdkernels.segmentation.runfiles import read_json, read_weights, write_json, write_weights
from fdkernels.segmentation.saved_runs import find_runs, load_network, read_run
from made_up_run import write_made_up_run
from tiny_data import write_tiny_tnbc


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_tnbc(tmp_path_factory.mktemp("tnbc"))


@pytest.fixture
def run(data, tmp_path):
    return write_made_up_run(tmp_path / "run", data)


def test_a_part_is_what_split_json_lists(run, data):
    samples, names = read_run(run).part("test")
    assert names == [entry["image"] for entry in read_json(run / "split.json")["test"]]
    assert [sample.image for sample in samples] == [data / name for name in names]
    assert samples[0].masks == (data / "GT_02" / "02_1.png",)
    assert samples[0].patient == "02"
    assert len(read_run(run).part("validation")[0]) == 1


def test_the_network_has_the_weights_of_the_phase(run):
    for phase in ("warm", "active"):
        network = read_run(run).load_network(phase)
        assert not network.training
        for name, tensor in read_weights(run / phase / "best.safetensors").items():
            assert torch.equal(network.state_dict()[name], tensor)


def test_data_that_has_moved_is_found_where_it_is(run, data, tmp_path):
    fields = read_json(run / "config.json")
    write_json(run / "config.json", {**fields, "data": str(tmp_path / "gone")})
    with pytest.raises(ValueError, match=r"gone of run .* must be a folder; if it has moved, say .* --data"):
        read_run(run).part("test")
    samples, _ = read_run(run).part("test", data)
    assert samples[0].image.is_file()


def test_missing_files_are_listed(run, data, tmp_path):
    moved = shutil.copytree(data, tmp_path / "moved")
    (moved / "Slide_02" / "02_1.png").unlink()
    (moved / "GT_02" / "02_3.png").unlink()
    with pytest.raises(ValueError, match=r"(?s)2 problems.*02_1.png is named in .*02_3.png is named in"):
        read_run(run).part("test", moved)


def test_an_unknown_or_empty_part_is_refused(run):
    with pytest.raises(ValueError, match="part must be one of train, validation, test, got all"):
        read_run(run).part("all")
    split = read_json(run / "split.json")
    write_json(run / "split.json", {**split, "validation": []})
    with pytest.raises(ValueError, match=r"part validation of run .* holds no image"):
        read_run(run).part("validation")


@pytest.mark.parametrize("content", [[], {"test": 1}, {"test": [{"image": "a.png"}]}, {"test": [3]}])
def test_a_split_of_another_form_is_refused(run, content):
    write_json(run / "split.json", content)
    with pytest.raises(ValueError, match=r"split\.json cannot be used"):
        read_run(run).part("test")


def test_a_run_without_its_split_is_refused(run):
    (run / "split.json").unlink()
    with pytest.raises(ValueError, match=r"split\.json cannot be read"):
        read_run(run).part("test")


def test_a_folder_without_a_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"holds no run: there is no config\.json"):
            find_runs(folder)


def test_a_configuration_of_a_newer_version_is_refused(run):
    write_json(run / "config.json", {**read_json(run / "config.json"), "teleport": True})
    with pytest.raises(ValueError, match=r"unknown fields: teleport; a run of a newer version"):
        read_run(run)


@pytest.mark.parametrize("content", [None, [1], "text"])
def test_a_configuration_that_is_none_is_refused(run, content):
    write_json(run / "config.json", content)
    with pytest.raises(ValueError, match=r"config\.json must hold an object with fields, got"):
        read_run(run)


def test_a_phase_that_is_not_finished_is_refused(run):
    (run / "active" / "result.json").unlink()
    assert read_run(run).finished_phases() == ["warm"]
    with pytest.raises(ValueError, match=r"has not finished phase active: there is no active/result\.json"):
        read_run(run).load_network("active")


def test_folds_are_found_in_their_order(data, tmp_path):
    for fold in range(1, 11):
        write_made_up_run(tmp_path / f"fold-{fold}", data, phases=())
    (tmp_path / "fold-notes").mkdir()
    write_json(tmp_path / "config.json", {"fold": "all"})
    assert [run.fold for run in find_runs(tmp_path)] == list(range(1, 11))
    with pytest.raises(ValueError, match=rf"fold-2 has not finished .* --output {tmp_path} --resume"):
        find_runs(tmp_path)[1].load_network("warm")
    shutil.rmtree(tmp_path / "fold-4")
    with pytest.raises(ValueError, match="lacks fold-4, though it has fold-10"):
        find_runs(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_weights(path, models.create("unet", base_channels=2).state_dict())
    assert load_network(path, "unet", 2).tap_names
    with pytest.raises(
        ValueError, match=r"do not fit unet with base_channels 4: size mismatch .*and \d+ more"
    ):
        load_network(path, "unet", 4)
    with pytest.raises(ValueError, match="do not fit cmunet with base_channels 2: Missing key"):
        load_network(path, "cmunet", 2)
    with pytest.raises(
        ValueError, match=r"must name a safetensors file, got .*none\.safetensors, which does not exist"
    ):
        load_network(tmp_path / "none.safetensors", "unet", 2)


class _Executed(Exception):  # noqa: N818
    """Raised by unpickling, which must never happen."""


class _Trap:
    def __reduce__(self):
        return _raise, ()


def _raise():
    raise _Executed


def test_weights_in_another_format_are_refused_and_not_executed(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"weight": _Trap()}, path)
    with pytest.raises(_Executed):
        torch.load(path, weights_only=False)
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load_network(path, "unet", 2)


def test_truncated_weights_are_refused(run):
    path = run / "warm" / "best.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        read_run(run).load_network("warm")
