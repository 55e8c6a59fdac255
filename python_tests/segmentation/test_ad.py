from __future__ import annotations

import shutil

import pytest

from fdkernels.segmentation.data import DATASETS, split_samples
from fdkernels.segmentation.data.ad import find
from fdkernels.segmentation.data.reading import read_mask
from tiny_data import make_tiny


@pytest.fixture
def root(tmp_path):
    return make_tiny("ad-128", tmp_path / "ad", images=12)


def test_patch_and_mask_of_a_number_belong_together_and_the_slide_is_the_patient(root):
    samples = find(root, side=128).samples
    assert len(samples) == 12
    assert {sample.patient for sample in samples} == {folder.name for folder in (root / "128x128").iterdir()}
    for sample in samples:
        slide = root / "128x128" / sample.patient
        assert sample.image.parent == slide / "macenko"
        assert sample.masks == (slide / "masks" / sample.image.name.replace("patch", "mask"),)


def test_patches_with_the_plaque_in_a_corner_are_patches_like_any_other(root):
    names = [sample.image.stem for sample in find(root, side=128).samples]
    assert sum(name.endswith("_C1") for name in names) == 4


def test_the_colours_can_be_chosen(root):
    own, normalised = (find(root, side=128, colours=colours).samples for colours in ("patches", "macenko"))
    assert [sample.masks for sample in own] == [sample.masks for sample in normalised]
    assert {sample.image.parent.name for sample in own} == {"patches"}
    with pytest.raises(ValueError, match="colours must be one of macenko, patches, vahadane, got 'grey'"):
        find(root, side=128, colours="grey")


def test_a_slide_without_the_colours_is_named_with_those_it_has(root):
    shutil.rmtree(root / "128x128" / "new_wsi_00" / "macenko")
    with pytest.raises(
        ValueError, match=r"new_wsi_00 contains no patches in .*macenko; available colours: patches"
    ):
        find(root, side=128)
    patients = {sample.patient for sample in find(root, "skip", side=128).samples}
    assert patients == {folder.name for folder in (root / "128x128").iterdir()} - {"new_wsi_00"}


def test_a_patch_with_two_names_is_a_problem(root):
    folder = root / "128x128" / "new_wsi_00" / "macenko"
    shutil.copy(folder / "patch_0000.png", folder / "0000.png")
    with pytest.raises(ValueError, match=r"patch_0000.png has the same name as 0000.png"):
        find(root, side=128)


def test_both_sizes_can_be_in_one_folder(root):
    make_tiny("ad-256", root)
    for side in (128, 256):
        samples = DATASETS[f"ad-{side}"].find(root).samples
        assert {sample.image.parents[2].name for sample in samples} == {f"{side}x{side}"}


def test_patches_of_the_other_size_are_rejected(root):
    with pytest.raises(ValueError, match=r"12 problems:(?s:.*)must have 256x256 pixels, got 128x128"):
        find(root / "128x128", side=256)
    with pytest.raises(ValueError, match="data must be a folder in the AD plaques layout"):
        find(root, side=256)


def test_no_slide_is_in_two_parts_of_a_split(root):
    split = split_samples(find(root, side=128).samples)
    slides = [{sample.patient for sample in part} for part in (split.train, split.test, split.validation)]
    assert sum(map(len, slides)) == len(set.union(*slides)) == 5


def test_a_patch_without_a_plaque_is_kept(root):
    empty = [sample for sample in find(root, side=128).samples if not read_mask(sample.masks[0]).any()]
    assert len(empty) == 3
