"""Common behaviour of all data sets, on synthetic data in their layouts."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from PIL import Image

from fdkernels.segmentation.data import DATASETS, SegmentationDataset
from fdkernels.segmentation.data.reading import read_image
from fdkernels.segmentation.data.scan import natural
from tiny_data import make_tiny

NAMES = sorted(DATASETS)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """All synthetic data sets, created once; tests that modify one copy it first."""
    folder = tmp_path_factory.mktemp("pristine")
    return {name: make_tiny(name, folder / name) for name in NAMES}


@pytest.fixture
def root(pristine, name, tmp_path):
    return shutil.copytree(pristine[name], tmp_path / name)


def test_every_image_is_found_with_a_mask_and_a_patient(name, pristine):
    found = DATASETS[name].find(pristine[name])
    assert len(found.samples) == 10
    assert found.skipped == ()
    assert len({sample.image for sample in found.samples}) == 10
    for sample in found.samples:
        assert sample.patient
        assert all(path.is_file() for path in (sample.image, *sample.masks))


def test_the_root_may_be_a_string_and_the_order_is_that_of_the_names(name, pristine):
    found = DATASETS[name].find(str(pristine[name]))
    assert found == DATASETS[name].find(pristine[name])
    by_folder = {}
    for sample in found.samples:
        by_folder.setdefault(sample.image.parent, []).append(sample.image.name)
    assert all(names == sorted(names, key=natural) for names in by_folder.values())


def test_items_of_any_size_become_squares_with_a_binary_mask(name, pristine):
    for item in SegmentationDataset(DATASETS[name].find(pristine[name]).samples, size=24):
        assert item["image"].shape == (3, 24, 24)
        assert item["mask"].shape == (1, 24, 24)
        assert item["image"].dtype == item["mask"].dtype == torch.float32
        assert 0 <= item["image"].min() < item["image"].max() <= 1
        assert set(item["mask"].unique().tolist()) <= {0, 1}


def test_the_mask_matches_the_image(name, pristine):
    """Discs differ from the background by more than the noise, so a misplaced mask fails the test."""
    for item in SegmentationDataset(DATASETS[name].find(pristine[name]).samples):
        grey, inside = item["image"].mean(0), item["mask"][0] == 1
        if inside.any():
            assert (grey[inside].mean() - grey[~inside].mean()).abs() > 0.35


def test_hidden_and_other_files_are_ignored(name, root):
    before = DATASETS[name].find(root)
    for sample in before.samples:
        for path in (sample.image, sample.masks[0]):
            (path.parent / f"._{path.name}").write_bytes(b"x")
            (path.parent / "Thumbs.db").write_bytes(b"x")
    (root / "__MACOSX").mkdir()
    assert DATASETS[name].find(root) == before


def test_broken_files_are_refused_in_one_report_or_left_out(name, root):
    samples = DATASETS[name].find(root).samples
    truncated, foreign, oversized = samples[1], samples[4], samples[7]
    truncated.image.write_bytes(truncated.image.read_bytes()[:-400])
    foreign.masks[0].write_bytes(b"no picture")
    with Image.open(oversized.image) as image:
        image.resize((97, 91)).save(oversized.image)
    named = (truncated.image, foreign.masks[0], oversized.image.name)
    with pytest.raises(ValueError, match="cannot be used") as raised:
        DATASETS[name].find(root)
    assert all(str(path) in str(raised.value) for path in named[:2])
    found = DATASETS[name].find(root, "skip")
    # Polygons fit an image of any size, so MoNuSeg's third image is valid.
    left_out = [truncated, foreign] + ([] if name == "monuseg" else [oversized])
    assert [sample for sample in samples if sample not in found.samples] == left_out
    assert all(any(str(path) in sentence for sentence in found.skipped) for path in named[: len(left_out)])


def test_a_file_without_its_partner_is_named(name, root):
    samples = DATASETS[name].find(root).samples
    for mask in samples[2].masks:
        mask.unlink()
    samples[6].image.unlink()
    with pytest.raises(ValueError, match="cannot be used, 2 problems"):
        DATASETS[name].find(root)
    found = DATASETS[name].find(root, on_problem="skip")
    assert len(found.skipped) == 2
    assert found.samples == tuple(sample for sample in samples if sample not in (samples[2], samples[6]))
    report = "\n".join(found.skipped)
    assert f"{samples[2].image} has no mask" in report
    orphan = samples[6].image.parent if name == "dsb2018" else samples[6].masks[0]
    assert str(orphan) in report


def test_the_same_pixels_in_another_format_are_named_as_a_pair(name, root):
    samples = DATASETS[name].find(root).samples
    first, second = samples[3], samples[5]
    with Image.open(first.image) as image:
        pixels = image.convert("RGB")
    second.image.unlink()
    pixels.save(second.image.with_suffix(".bmp"))
    if name != "monuseg":  # its polygons fit any image
        with Image.open(first.masks[0]) as mask:
            blank = Image.new("L", mask.size, 0)
        blank.paste(255, (2, 2, 9, 9))
        for path in second.masks:
            blank.save(path)
    copy = second.image.with_suffix(".bmp")
    with pytest.raises(ValueError, match="cannot be used, 1 problem:") as raised:
        DATASETS[name].find(root)
    assert f"{copy} has the same pixels as {first.image}" in str(raised.value)
    found = DATASETS[name].find(root, on_problem="skip")
    assert found.samples == tuple(sample for sample in samples if sample != second)
    assert found.skipped == (f"{copy} has the same pixels as {first.image}",)


@pytest.mark.parametrize("empties", ["tnbc", "ad-256", "ad-128"])
def test_patches_may_be_without_foreground(pristine, tmp_path, empties):
    root = shutil.copytree(pristine[empties], tmp_path / empties)
    sample = DATASETS[empties].find(root).samples[0]
    with Image.open(sample.masks[0]) as mask:
        Image.new("L", mask.size, 0).save(sample.masks[0])
    assert sample in DATASETS[empties].find(root).samples


@pytest.mark.parametrize("lesions", ["udiat", "us-tnbc", "folder", "busi", "dsb2018"])
def test_in_other_data_sets_an_empty_mask_is_a_problem(pristine, tmp_path, lesions):
    root = shutil.copytree(pristine[lesions], tmp_path / lesions)
    sample = DATASETS[lesions].find(root).samples[0]
    for path in sample.masks:
        with Image.open(path) as mask:
            Image.new("L", mask.size, 0).save(path)
    with pytest.raises(ValueError, match="has a mask without foreground") as raised:
        DATASETS[lesions].find(root)
    assert str(sample.image) in str(raised.value)
    assert sample not in DATASETS[lesions].find(root, "skip").samples


def test_two_files_of_one_name_are_a_problem(name, root):
    sample = DATASETS[name].find(root).samples[0]
    with Image.open(sample.image) as image:
        image.convert("RGB").resize((20, 20)).save(sample.image.with_suffix(".bmp"))
    with pytest.raises(ValueError, match=r"same name as|must contain one image, got 2"):
        DATASETS[name].find(root)


def test_nothing_usable_is_an_error_even_where_problems_are_skipped(name, root):
    for sample in DATASETS[name].find(root).samples:
        sample.image.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be used, 10 problems"):
        DATASETS[name].find(root, on_problem="skip")


@pytest.mark.parametrize("missing", ["nowhere", "."])
def test_a_folder_without_the_layout_is_named(name, tmp_path, missing):
    with pytest.raises(ValueError, match="data must be a folder") as raised:
        DATASETS[name].find(tmp_path / missing)
    assert str(tmp_path / missing) in str(raised.value)


def test_on_problem_is_refuse_or_skip(name, pristine):
    with pytest.raises(ValueError, match='on_problem must be "refuse" or "skip", got \'ignore\''):
        DATASETS[name].find(pristine[name], on_problem="ignore")


def test_numbers_in_names_count_as_numbers():
    names = ["a", "a1", "a1b", "a01", "a2", "a10", "a10b", "b (3)", "b (20)"]
    shuffled = random.Random(0).sample(names, len(names))
    assert sorted(shuffled, key=natural) == ["a", "a01", "a1", "a1b", "a2", "a10", "a10b", "b (3)", "b (20)"]


@pytest.mark.parametrize(
    ("name", "size", "lr", "worst_off"),
    [
        ("tnbc", 512, 1e-4, 10),
        ("monuseg", 512, 1e-4, 25),
        ("udiat", 256, 1e-4, 35),
        ("ad-256", 256, 1e-3, 500),
        ("ad-128", 128, 1e-3, 500),
        ("us-tnbc", 512, 1e-3, 10),
        ("busi", 256, 1e-4, None),
        ("dsb2018", 256, 1e-4, None),
        ("folder", 256, 1e-4, None),
    ],
)
def test_presets_are_those_of_the_paper(name, size, lr, worst_off):
    preset = DATASETS[name]
    assert (preset.size, preset.lr, preset.worst_off) == (size, lr, worst_off)


def test_made_up_data_are_the_same_each_time(name, pristine, tmp_path):
    again = make_tiny(name, tmp_path / "again")
    paths = sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert paths == sorted(p.relative_to(pristine[name]) for p in pristine[name].rglob("*") if p.is_file())
    assert all((again / path).read_bytes() == (pristine[name] / path).read_bytes() for path in paths)


def test_made_up_images_differ_in_size_where_the_real_ones_do(pristine):
    sizes = {
        name: {read_image(sample.image).size for sample in DATASETS[name].find(root).samples}
        for name, root in pristine.items()
    }
    assert all(
        (len(sizes[name]) > 1) == (name in {"udiat", "us-tnbc", "folder", "busi", "dsb2018"})
        for name in NAMES
    )
