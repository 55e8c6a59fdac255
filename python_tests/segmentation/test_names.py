"""Names of files and folders in both Unicode forms, in other encodings, and the patients they tell."""

from __future__ import annotations

import os
import shutil
import unicodedata

import pytest

from fdkernels.segmentation.data import DATASETS, Split
from fdkernels.segmentation.data.names import folder_key, patient_key, printable
from fdkernels.segmentation.data.prepare.pairing import pair
from tiny_data import make_tiny

LATIN_1 = os.fsdecode(b"caf\xe9")  # what an archive of Windows unpacks to on Linux


def decomposed(text):
    return unicodedata.normalize("NFD", text)


def composed(text):
    return unicodedata.normalize("NFC", text)


@pytest.fixture
def root(request, tmp_path):
    name = request.getfixturevalue("name")
    return make_tiny(name, tmp_path / name)


@pytest.fixture
def other_encoding(tmp_path):
    folder = tmp_path / LATIN_1
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system holds names in UTF-8 only")
    return folder


def accented(path, form):
    """Rename the file: "é" in one of the two forms before its stem's last word, so that endings stay."""
    stem, ending = path.stem, ""
    if "_mask" in stem:  # BUSI
        stem, ending = stem[: stem.index("_mask")], stem[stem.index("_mask") :]
    return path.rename(path.with_name(form(f"{stem}é{ending}{path.suffix}")))


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"dsb2018"}))
@pytest.mark.parametrize("forms", [(decomposed, composed), (composed, decomposed)], ids=["mac", "other"])
def test_both_forms_of_a_name_pair(name, root, forms):
    before = DATASETS[name].find(root)
    sample = before.samples[0]
    image = accented(sample.image, forms[0])
    masks = tuple(accented(mask, forms[1]) for mask in sample.masks)
    found = DATASETS[name].find(root)
    assert len(found.samples) == len(before.samples)
    (changed,) = (each for each in found.samples if each.image == image)
    assert changed.masks == masks
    assert changed.patient == composed(changed.patient)


@pytest.mark.parametrize("name", ["udiat"])
def test_names_that_differ_in_their_form_alone_are_duplicates(name, root):
    first = root / "original" / composed("é.png")
    second = root / "original" / decomposed("é.png")
    sources = sorted((root / "original").iterdir())
    shutil.copy(sources[0], first)
    shutil.copy(sources[1], second)
    if len(list((root / "original").iterdir())) == len(sources) + 1:
        pytest.skip("this file system takes both names for one")
    shutil.copy(root / "GT" / sources[0].name, root / "GT" / "é.png")
    with pytest.raises(ValueError, match=r"é\.png has the same name as .*, in another Unicode form"):
        DATASETS[name].find(root)


@pytest.mark.parametrize("name", DATASETS)
def test_folders_whose_names_utf8_cannot_hold_are_refused_for_each_image(name, root, other_encoding):
    root.rename(other_encoding / "data")
    with pytest.raises(ValueError, match="cannot be used") as raised:
        DATASETS[name].find(other_encoding.parent)
    message = str(raised.value)
    assert message.count("has a name that UTF-8 cannot hold") == 10
    assert message.count(r"caf\udce9") == message.encode().decode().count(r"caf\udce9") >= 10


@pytest.mark.parametrize("name", ["udiat"])
def test_files_whose_names_utf8_cannot_hold_are_named_and_can_be_skipped(name, root, other_encoding):
    samples = DATASETS[name].find(root).samples
    for path in (samples[0].image, samples[0].masks[0], samples[1].image):
        path.rename(path.with_name(f"{LATIN_1} {path.name}"))
    with pytest.raises(
        ValueError, match=r"original/caf\\udce9 000001\.png has a name that UTF-8 cannot hold"
    ):
        DATASETS[name].find(root)
    found = DATASETS[name].find(root, "skip")
    assert found.samples == samples[2:]
    assert len(found.skipped) == 3
    "".join(found.skipped).encode()  # printing never fails


def test_the_folder_of_the_data_needs_a_name_that_utf8_can_hold(other_encoding):
    make_tiny("udiat", other_encoding)
    with pytest.raises(
        ValueError, match=r"data must be a folder whose name UTF-8 can hold, got .*caf\\udce9"
    ):
        DATASETS["udiat"].find(other_encoding)
    with pytest.raises(ValueError, match=r"caf\\udce9/none, which is not one"):
        DATASETS["udiat"].find(other_encoding / "none")


def test_a_message_on_the_layout_is_printable_too(tmp_path, other_encoding):
    make_tiny("udiat", other_encoding / "data")
    (tmp_path / "beside").mkdir()
    with pytest.raises(ValueError, match=r"the layout lies 2 levels deeper: .*caf\\udce9/data$"):
        DATASETS["udiat"].find(tmp_path)


@pytest.mark.parametrize("field", ["patient", "image", "masks"])
def test_a_split_with_names_that_utf8_cannot_hold_is_refused(field, tmp_path):
    entry = {"patient": "p", "image": "a.png", "masks": ["b.png"]}
    split = {"train": [entry], "test": [], "validation": []}
    assert len(Split.from_json(split, tmp_path).train) == 1
    entry[field] = [LATIN_1] if field == "masks" else LATIN_1
    with pytest.raises(ValueError, match="train must have names that UTF-8 can hold"):
        Split.from_json(split, tmp_path)


@pytest.mark.parametrize(
    ("one", "other"),
    [("1", "01"), ("Slide_1", "slide_001"), ("a 0", "A 00"), (decomposed("é"), composed("É")), ("x ", "x")],
)
def test_spellings_of_one_patient_are_one(one, other):
    assert patient_key(one) == patient_key(other)


@pytest.mark.parametrize(("one", "other"), [("1", "10"), ("1_1", "11"), ("a1b", "a1"), ("e", "é")])
def test_different_patients_stay_apart(one, other):
    assert patient_key(one) != patient_key(other)


def test_names_of_folders_differ_in_more_than_spacing():
    assert (
        folder_key("Ground Truth")
        == folder_key("ground_truth")
        == folder_key("GROUND-TRUTH")
        == "groundtruth"
    )
    assert folder_key("GT") != folder_key("GT_2")


def test_text_that_utf8_cannot_hold_is_printable():
    assert printable("caf\udce9 é") == "caf\\udce9 é"


@pytest.mark.parametrize("name", ["ad-128"])
def test_slides_whose_names_differ_in_case_or_zeros_are_one_patient(name, root):
    inner = root / "128x128"
    (inner / "new_wsi_01").rename(inner / "NEW_WSI_0")
    patients = {sample.patient for sample in DATASETS[name].find(root).samples}
    assert len(patients) == 4


def test_drawn_masks_pair_with_dicom_files_in_either_form(tmp_path):
    for file in (decomposed("é.dcm"), composed("é_frame2.png"), composed("ü"), decomposed("ü.png")):
        (tmp_path / file).write_bytes(bytes(128) + b"DICM")
    found = pair(tmp_path, tmp_path)
    assert found.problems == []
    assert [(each.stem, list(each.masks)) for each in found.recordings] == [("é", [2]), ("ü", [None])]


def test_dicom_files_and_drawn_masks_need_names_that_utf8_can_hold(tmp_path, other_encoding):
    (other_encoding / "a.dcm").write_bytes(bytes(128) + b"DICM")
    (tmp_path / f"{LATIN_1}.png").write_bytes(b"")
    found = pair(tmp_path, tmp_path)
    assert found.recordings == []
    assert len(found.problems) == 2
    assert all("has a name that UTF-8 cannot hold" in problem for problem in found.problems)
    "".join(found.problems).encode()
