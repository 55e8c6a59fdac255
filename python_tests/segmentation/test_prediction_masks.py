from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fdkernels.segmentation.prediction_masks import (
    CORRECT,
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    error_picture,
    keep_pictures,
    png_names,
    predicted_mask,
    write_errors,
    write_mask,
)


def test_at_the_size_of_the_network_the_mask_is_the_thresholded_logits():
    logits = torch.tensor([[[-1.0, 0.0, 1e-6], [3.0, -float("inf"), -0.0]]])
    assert predicted_mask(logits, 2, 3).tolist() == [[False, False, True], [True, False, False]]


def test_a_nan_is_no_prediction():
    with pytest.raises(ValueError, match="logits must not be NaN"):
        predicted_mask(torch.tensor([[[1.0, float("nan")]]]), 1, 2)


def test_at_another_size_the_logits_are_interpolated():
    # Bilinear between -1 and 3 over four pixels: -1, 0, 2, 3.
    logits = torch.tensor([[[-1.0, 3.0]]])
    assert predicted_mask(logits, 1, 4).tolist() == [[False, False, True, True]]
    assert predicted_mask(torch.ones(1, 8, 8), 5, 3).shape == (5, 3)


def test_images_of_one_name_in_different_folders_stay_apart():
    assert png_names(["a/1.png", "b/1.png", "b/2.tif"]) == ["a/1.png", "b/1.png", "b/2.png"]


def test_images_that_differ_in_their_ending_are_numbered():
    assert png_names(["1.tif", "1-2.tif", "1.PNG", "1.jpg"]) == ["1.png", "1-2.png", "1-3.png", "1-4.png"]


@pytest.mark.parametrize("image", ["../../a/1.png", "/a/1.png", "a/../1.png"])
def test_no_mask_leaves_the_folder(image):
    (name,) = png_names([image])
    assert name in {"a/1.png", "1.png"}


@given(st.lists(st.from_regex(r"(\.\./)?([aA]/)?[xX1](-2)?\.(png|tif)", fullmatch=True), max_size=12))
def test_no_two_images_share_a_mask(images):
    names = png_names(images)
    assert len({name.casefold() for name in names}) == len(images)


def test_a_mask_file_holds_0_and_255(tmp_path):
    mask = np.array([[True, False], [False, True]])
    write_mask(tmp_path / "new" / "mask.png", mask)
    with Image.open(tmp_path / "new" / "mask.png") as image:
        assert image.mode == "L"
        assert np.array(image).tolist() == [[255, 0], [0, 255]]


@pytest.mark.parametrize(("predicted", "truth"), [(True, False), (False, True), (True, True)])
def test_tissue_shows_through_every_colour(predicted, truth):
    image = np.zeros((1, 2, 3))
    image[0, 1] = 1
    dark, light = error_picture(image, np.full((1, 2), predicted), np.full((1, 2), truth))[0]
    assert light - dark == pytest.approx([0.45 * 0.55] * 3)  # a quarter of the image's contrast


def test_earlier_pictures_are_kept_and_newer_ones_not_touched(tmp_path):
    for place, names in (("old", ("a", "b")), ("new", ("b", "c"))):
        for name in names:
            write_mask(tmp_path / place / "masks" / f"{name}.png", np.full((1, 1), place == "new"))
    keep_pictures(tmp_path / "old", tmp_path / "new")
    kept = {file.stem: np.array(Image.open(file)).item() for file in (tmp_path / "new").rglob("*.png")}
    assert kept == {"a": 0, "b": 255, "c": 255}


def test_errors_are_red_and_background_is_grey(tmp_path):
    image = np.zeros((2, 2, 3))
    predicted = np.array([[True, True], [False, False]])
    truth = np.array([[True, False], [True, False]])
    picture = error_picture(image, predicted, truth)
    assert picture[0, 0] == pytest.approx(0.45 * 0.45 + 0.55 * np.array(CORRECT))
    assert picture[0, 1] == pytest.approx(0.45 * 0.45 + 0.55 * np.array(FALSE_POSITIVE))
    assert picture[1, 0] == pytest.approx(0.45 * 0.45 + 0.55 * np.array(FALSE_NEGATIVE))
    assert picture[1, 1] == pytest.approx([0.45] * 3)
    assert not image.any()
    write_errors(tmp_path / "errors.png", image, predicted, truth)
    with Image.open(tmp_path / "errors.png") as written:
        assert np.abs(np.array(written) / 255 - picture).max() <= 0.5 / 255 + 1e-9
