"""Layouts that copies of the data sets have: each is read, or refused with where the data lies."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fdkernels.segmentation.data import DATASETS
from fdkernels.segmentation.data.layout import child
from tiny_data import imagescope

BARCODE = "TCGA-AA-0001-01Z-00-DX1"
TRAINING = "MoNuSeg 2018 Training Data"


def write(root, *paths):
    """Write an image with pixels of its own to each path, or two polygons to one that ends in .xml.

    In files that are masks by their name or folder the foreground is a square.
    """
    for number, path in enumerate(paths):
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        side = 128 if target.name.startswith(("patch_", "mask_")) else 32
        if target.suffix == ".xml":
            target.write_text(imagescope([np.array([(5, 5), (20, 5), (20, 20)])]), "utf-8")
        elif any(word in path.lower() for word in ("mask", "gt")):
            truth = np.zeros((side, side), np.uint8)
            truth[5:20, 5:20] = 255
            Image.fromarray(truth).save(target)
        else:
            pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(target)
    return root


# Data set, then image, patient and masks of each sample.
READ = {
    "TNBC unpacked into a folder of its own name": (
        "tnbc",
        ("A/A/Slide_01/01_1.png", "01", "A/A/GT_01/01_1.png"),
    ),
    "TNBC in lower case": ("tnbc", ("slide_02/02_1.png", "02", "gt_02/02_1.png")),
    "TNBC flattened": (
        "tnbc",
        ("images/01_1.png", "01", "masks/01_1.png"),
        ("images/01_2.png", "01", "masks/01_2.png"),
        ("images/11_1.png", "11", "masks/11_1.png"),
    ),
    "TNBC with a zero more in one folder": ("tnbc", ("Slide_1/1_1.png", "01", "GT_01/1_1.png")),
    "TNBC with one patient under two numbers": (
        "tnbc",
        ("Slide_01/01_1.png", "01", "GT_01/01_1.png"),
        ("Slide_1/01_2.png", "01", "GT_1/01_2.png"),
    ),
    "MoNuSeg unpacked into a folder of its own name, beside the test set": (
        "monuseg",
        (
            f"{TRAINING}/{TRAINING}/Tissue Images/{BARCODE}.tif",
            "TCGA-AA-0001",
            f"{TRAINING}/{TRAINING}/Annotations/{BARCODE}.xml",
        ),
        ("MoNuSegTestData/TCGA-AA-0002-01A.tif", "TCGA-AA-0002", "MoNuSegTestData/TCGA-AA-0002-01A.xml"),
    ),
    "MoNuSeg with masks": (
        "monuseg",
        (f"Tissue Images/{BARCODE}.tif", "TCGA-AA-0001", f"GT/{BARCODE}_mask.png"),
    ),
    "MoNuSeg with other names of folders": (
        "monuseg",
        (f"tissue_image/{BARCODE}.tif", "TCGA-AA-0001", f"annotations/{BARCODE}.xml"),
    ),
    "MoNuSeg in parts": (
        "monuseg",
        ("test/images/tcga_aa_0003_01.png", "TCGA-AA-0003", "test/masks/tcga_aa_0003_01.png"),
        (f"train/images/{BARCODE}.png", "TCGA-AA-0001", f"train/masks/{BARCODE}.png"),
        ("train/images/TCGA-AA-0001-DX2_7.png", "TCGA-AA-0001", "train/masks/TCGA-AA-0001-DX2_7.png"),
    ),
    "BUSI with folders in each class": (
        "busi",
        ("benign/images/benign (1).png", "benign (1)", "benign/mask/benign (1)_mask.png"),
        (
            "malignant/images/malignant (1).png",
            "malignant (1)",
            "malignant/mask/malignant (1)_mask.png",
            "malignant/mask/malignant (1)_mask_1.png",
        ),
    ),
    "BUSI with folders for all classes": (
        "busi",
        ("images/benign (1).png", "benign (1)", "masks/0/benign (1).png"),
        ("images/malignant (1).png", "malignant (1)", "masks/0/malignant (1).png"),
    ),
    "BUSI with classes in the folders": (
        "busi",
        ("images/benign/1.png", "benign/1", "masks/benign/1.png"),
        ("images/malignant/1.png", "malignant/1", "masks/malignant/1.png"),
    ),
    "BUSI in one folder": (
        "busi",
        ("benign (1).png", "benign (1)", "benign (1)_mask.png", "benign (1)_mask_1.png"),
        ("malignant_1.png", "malignant_1", "malignant_1_mask.png"),
    ),
    "BUSI with capital letters, in an archive": (
        "busi",
        ("archive/X/Benign/benign (1).png", "benign (1)", "archive/X/Benign/benign (1)_mask.png"),
        ("archive/X/MALIGNANT/b.png", "b", "archive/X/MALIGNANT/B_Mask.png"),
    ),
    "UDIAT beside data set A": ("udiat", ("Dataset B/original/1.png", "1", "Dataset B/GT/1.png")),
    "UDIAT in lower case": ("udiat", ("original/1.png", "1", "gt/1.png")),
    "UDIAT with endings": ("udiat", ("original/1.png", "1", "GT/1_mask.png")),
    "UDIAT by class": (
        "udiat",
        ("Benign/images/1.png", "1", "Benign/masks/1.png"),
        ("Malignant/images/2.png", "2", "Malignant/masks/2.png"),
    ),
    "UDIAT with masks of one class": ("udiat", ("images/1.png", "1", "masks/0/1.png")),
    "AD below two folders": (
        "ad-128",
        ("a/128x128/s/macenko/patch_0.png", "s", "a/128x128/s/masks/mask_0.png"),
    ),
    "DSB in an archive": (
        "dsb2018",
        (
            "a/stage1_train/i/images/i.png",
            "i",
            "a/stage1_train/i/masks/1.png",
            "a/stage1_train/i/masks/2.png",
        ),
    ),
    "DSB with folders in the singular": ("dsb2018", ("i/image/i.png", "i", "i/mask/1.png")),
    "DSB with one mask an image": ("dsb2018", ("images/i.png", "i", "masks/0/i.png")),
    "DSB by kind of image": (
        "dsb2018",
        ("purple/i/images/i.png", "i", "purple/i/masks/1.png"),
        ("white/k/images/k.png", "k", "white/k/masks/1.png"),
    ),
    "own images with folders in folders": (
        "folder",
        ("Image/a/1.png", "a/1", "Labels/a/1_mask.png"),
        ("Image/b/1.png", "b/1", "Labels/b/1_mask.png"),
    ),
}


@pytest.mark.parametrize("title", READ)
def test_the_layout_is_read(title, tmp_path):
    name, *expected = READ[title]
    write(tmp_path, *(path for image, _, *masks in expected for path in (image, *masks)))
    if title == "UDIAT beside data set A":
        write(tmp_path, "Dataset A/7.png")
    found = DATASETS[name].find(tmp_path)
    assert [
        (
            sample.image.relative_to(tmp_path).as_posix(),
            sample.patient,
            *(mask.relative_to(tmp_path).as_posix() for mask in sample.masks),
        )
        for sample in found.samples
    ] == expected
    assert found.skipped == ()


# Data set, the part of the data set that lacks, then the files.
INCOMPLETE = {
    "BUSI without a folder": (
        "busi",
        "class malignant",
        "benign/benign (1).png",
        "benign/benign (1)_mask.png",
    ),
    "BUSI told by name": ("busi", "class benign", "images/malignant (1).png", "masks/malignant (1).png"),
    "UDIAT without a folder": ("udiat", "folder malignant", "benign/original/1.png", "benign/GT/1.png"),
}


@pytest.mark.parametrize("title", INCOMPLETE)
@pytest.mark.parametrize("on_problem", ["refuse", "skip"])
def test_a_part_that_is_not_there_is_said(title, on_problem, tmp_path):
    name, said, *paths = INCOMPLETE[title]
    found = DATASETS[name].find(write(tmp_path, *paths), on_problem)
    assert len(found.samples) == 1
    (sentence,) = found.skipped
    assert said in sentence
    assert str(tmp_path) in sentence


# Data set, what the message says after the folder's name, then the files.
REFUSED = {
    "one level deeper, beside another": (
        "tnbc",
        "which contains no Slide_ and no GT_ folder; the layout lies one level deeper: {root}/data",
        *("data/Slide_01/01_1.png", "data/GT_01/01_1.png", "notes/a.png"),
    ),
    "two levels deeper, twice": (
        "udiat",
        "GT; the layout lies 2 levels deeper, in 2 folders ({root}/a/x, {root}/a/y): name one of them",
        *("a/x/original/1.png", "a/x/GT/1.png", "a/y/original/1.png", "a/y/GT/1.png", "b/1.png"),
    ),
    "masks are missing": ("udiat", "which contains no folder GT", "original/1.png"),
    "images are missing": ("folder", "which contains no folder images", "masks/1.png"),
    "MoNuSeg without annotations": (
        "monuseg",
        "which contains no folder Annotations and no folder masks",
        f"Tissue Images/{BARCODE}.tif",
    ),
    "the other size of AD": (
        "ad-256",
        "which contains 128x128, the data set ad-128, and no folder 256x256",
        *("128x128/s/macenko/patch_0.png", "128x128/s/masks/mask_0.png"),
    ),
    "two folders of one name": (
        "udiat",
        "{root} must have one folder GT, got GT and gt",
        *("original/1.png", "GT/1.png", "gt/1.png"),
    ),
    "TNBC flattened without patients": (
        "tnbc",
        "images/a.png must have a name such as 01_1, which begins with the patient",
        *("images/a.png", "masks/a.png"),
    ),
    "BUSI told by name, without one": (
        "busi",
        "images/1.png must have a name that begins with benign or malignant or normal",
        *("images/benign (2).png", "masks/benign (2).png", "images/1.png", "masks/1.png"),
    ),
    "two masks that are not numbered": (
        "udiat",
        "GT/1_mask.png is a second mask of 1.png, beside 1.png",
        *("original/1.png", "GT/1.png", "GT/1_mask.png"),
    ),
    "a folder of images that no mask belongs to": (
        "folder",
        "images/b/1.png has no mask",
        *("images/1.png", "images/b/1.png", "masks/1.png"),
    ),
}


@pytest.mark.parametrize("title", REFUSED)
def test_the_layout_is_refused_and_what_is_wrong_is_named(title, tmp_path):
    name, said, *paths = REFUSED[title]
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the sentence is below
        DATASETS[name].find(write(tmp_path, *paths))
    assert said.format(root=tmp_path) in str(raised.value)


def test_a_folder_within_the_layout_is_told_to_be_too_deep(tmp_path):
    write(tmp_path, "original/1.png", "GT/1.png")
    with pytest.raises(ValueError, match="the layout lies one level higher: ") as raised:
        DATASETS["udiat"].find(tmp_path / "original")
    assert str(raised.value).endswith(str(tmp_path))


def test_slides_of_brain_are_a_problem_that_can_be_skipped_or_asked_for(tmp_path):
    pairs = [f"{part}_{slide}/{slide}_1.png" for slide in ("11", "12", "14") for part in ("Slide", "GT")]
    root = write(tmp_path, *(f"TNBC_and_Brain_dataset/{path}" for path in pairs))
    with pytest.raises(ValueError, match=r"holds 2 images of brain \(Slide_12, Slide_14\)"):
        DATASETS["tnbc"].find(root)
    found = DATASETS["tnbc"].find(root, "skip")
    assert [sample.patient for sample in found.samples] == ["11"]
    assert "brain" in found.skipped[0]
    everything = DATASETS["tnbc"].find(root, brain=True)
    assert [sample.patient for sample in everything.samples] == ["11", "12", "14"]


def test_what_was_made_of_the_download_beside_it_is_not_read(tmp_path):
    """Cut and resized copies of the images would be pooled with them."""
    cases = {
        "tnbc": ("TNBC_NucleiSegmentation/Slide_01/01_1.png", "TNBC_NucleiSegmentation/GT_01/01_1.png"),
        "busi": (
            "Dataset_BUSI_with_GT/benign/benign (1).png",
            "Dataset_BUSI_with_GT/benign/benign (1)_mask.png",
        ),
        "udiat": ("BUS/original/1.png", "BUS/GT/1.png"),
        "dsb2018": ("stage1_train/i/images/i.png", "stage1_train/i/masks/1.png"),
        "monuseg": (f"MoNuSegTestData/{BARCODE}.tif", f"MoNuSegTestData/{BARCODE}.xml"),
    }
    for name, paths in cases.items():
        root = write(tmp_path / name, *paths, "images/benign_01_1.png", "masks/benign_01_1.png")
        (sample,) = DATASETS[name].find(root).samples
        assert sample.image == root / paths[0]


def test_a_part_of_monuseg_that_is_not_read_is_said(tmp_path):
    official = [
        f"{TRAINING}/{part}/{BARCODE}{end}"
        for part, end in (("Tissue Images", ".tif"), ("Annotations", ".xml"))
    ]
    write(tmp_path, *official, "Test/images/TCGA-AA-0009.png", "Test/masks/TCGA-AA-0009.png")
    found = DATASETS["monuseg"].find(tmp_path)
    assert [sample.image.name for sample in found.samples] == [f"{BARCODE}.tif"]
    (sentence,) = found.skipped
    assert sentence.startswith(f"{tmp_path / 'Test'} is not read")


def test_the_list_of_problems_ends_with_the_option_that_skips(tmp_path):
    write(tmp_path, "original/1.png", "GT/1.png", "original/2.png")
    with pytest.raises(
        ValueError, match=r"2\.png has no mask\nFix them, or skip them with --on-problem skip\.$"
    ):
        DATASETS["udiat"].find(tmp_path)
    (tmp_path / "GT" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"2\.png has no mask$"):  # nothing would be left
        DATASETS["udiat"].find(tmp_path)


@pytest.mark.parametrize("name", ["Tissue Images", "tissue_images", "TISSUE-IMAGES", "TissueImages"])
def test_folders_are_found_whatever_their_case_and_spacing(name, tmp_path):
    (tmp_path / name).mkdir()
    assert child(tmp_path, "masks", "tissue images") == tmp_path / name
    assert child(tmp_path, "tissue") is None


def test_circles_of_links_end(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match="data must be a folder in the TNBC layout"):
        DATASETS["tnbc"].find(tmp_path)
