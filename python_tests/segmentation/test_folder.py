from __future__ import annotations

import unicodedata

import pytest

from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.data import DATASETS
from fdkernels.segmentation.data.folder import read_patients
from fdkernels.segmentation.train import train
from tiny_data import make_tiny


@pytest.fixture
def root(tmp_path):
    """Ten images scan_1 to scan_10, of which nothing tells the patients."""
    folder = make_tiny("udiat", tmp_path / "own")
    for part, name in (("original", "images"), ("GT", "masks")):
        (folder / part).rename(folder / name)
        for path in (folder / name).iterdir():
            path.rename(path.with_name(f"scan_{int(path.stem)}.png"))
    return folder


def listing(root, text, name="patients.csv", encoding="utf-8"):
    (root / name).write_text(text, encoding)


def whole(separator=","):
    """Patients A and B in turn, with header."""
    rows = [
        separator.join(("image", "patient")),
        *(f"scan_{n}.png{separator}{'AB'[n % 2]}" for n in range(1, 11)),
    ]
    return "\n".join(rows)


@pytest.mark.parametrize("name", ["folder", "us-tnbc"])
def test_without_patients_each_image_is_its_own_and_a_note_says_so(name, root):
    found = DATASETS[name].find(root)
    assert [sample.patient for sample in found.samples] == [f"scan_{number}" for number in range(1, 11)]
    assert found.skipped == ()
    (note,) = found.notes
    assert str(root) in note
    assert "no patients.csv" in note
    assert "each of 10 images counts as a patient of its own" in note


def test_the_run_shows_the_note_once(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fdkernels.segmentation.train.train_run", lambda *given, **options: {})
    train(TrainingConfig(dataset="folder", data=str(root), output=str(tmp_path / "out"), fold=1))
    assert " ".join(capsys.readouterr().err.split()).count("has no patients.csv") == 1


def test_prepared_names_tell_the_patient_and_need_no_note(tmp_path):
    found = DATASETS["folder"].find(make_tiny("folder", tmp_path))
    assert found == DATASETS["us-tnbc"].find(tmp_path)
    assert len({sample.patient for sample in found.samples}) == 8
    assert found.notes == ()


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_patients_are_those_of_the_listing(root, separator, encoding):
    listing(root, whole(separator), "Patients.csv", encoding)
    found = DATASETS["folder"].find(root)
    assert [sample.patient for sample in found.samples] == ["B", "A"] * 5
    assert found.notes == ()


def test_the_listing_may_be_beside_the_only_folder(root):
    listing(root.parent, whole())
    assert {sample.patient for sample in DATASETS["folder"].find(root.parent).samples} == {"A", "B"}


def test_spellings_of_a_patient_in_the_listing_are_one(root):
    listing(root, "image,patient\n" + "\n".join(f"scan_{n},{'0' * n}7" for n in range(1, 11)))
    assert {sample.patient for sample in DATASETS["folder"].find(root).samples} == {"07"}


@pytest.mark.parametrize(
    "named", ["scan_3", "SCAN_3.PNG", "images/scan_3.png", "images\\scan_3.png", "./scan_3.tif"]
)
def test_an_image_may_be_listed_with_folder_suffix_and_case_of_its_own(root, named):
    listing(root, whole().replace("scan_3.png", named))
    assert len(DATASETS["folder"].find(root).samples) == 10


def test_an_image_in_a_subfolder_is_listed_by_its_name_or_its_path(root):
    for part in ("images", "masks"):
        (root / part / "x").mkdir()
        (root / part / "scan_3.png").rename(root / part / "x" / "scan_3.png")
    listing(root, whole())
    assert len(DATASETS["folder"].find(root).samples) == 10
    listing(root, whole().replace("scan_3.png,B", "x/scan_3.png,C"))
    assert [s.patient for s in DATASETS["folder"].find(root).samples if s.image.stem == "scan_3"] == ["C"]


def test_both_unicode_forms_of_a_listed_name_are_one(root):
    for part in ("images", "masks"):
        (root / part / "scan_3.png").rename(root / part / unicodedata.normalize("NFD", "é.png"))
    listing(root, whole().replace("scan_3", unicodedata.normalize("NFC", "é")))
    assert len(DATASETS["folder"].find(root).samples) == 10


def test_an_image_that_is_not_listed_is_a_problem(root):
    listing(root, whole().replace("scan_3.png", "scan_33.png"))
    with pytest.raises(ValueError, match=r"scan_3\.png is not in patients\.csv, so its patient is not known"):
        DATASETS["folder"].find(root)
    assert len(DATASETS["folder"].find(root, "skip").samples) == 9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must have the columns image and patient, got no image and no patient"),
        ("image,person\na,1", "must have the columns image and patient, got no patient"),
        ("image,patient\na,1\nb,", "must give an image and its patient in line 3"),
        ("image,patient\na", "must give an image and its patient in line 2"),
        ("image,patient\na.png,1\nA,2", "must give each image one patient, got 1 and 2 for A"),
    ],
)
def test_a_listing_that_cannot_be_used_is_refused(tmp_path, text, said):
    listing(tmp_path, text)
    with pytest.raises(ValueError, match=said) as raised:
        read_patients(tmp_path / "patients.csv")
    assert str(tmp_path / "patients.csv") in str(raised.value)


def test_a_listing_in_another_encoding_is_refused(tmp_path):
    listing(tmp_path, "image,patient\né,1", encoding="latin-1")
    with pytest.raises(ValueError, match=r"patients\.csv must be a CSV file in UTF-8"):
        read_patients(tmp_path / "patients.csv")


def test_columns_may_be_in_any_order_with_others_and_empty_lines(tmp_path):
    listing(tmp_path, 'age, Patient ,IMAGE\n7," p 1 ","a,b.png"\n\n,,\n8,p 2,c\n')
    assert read_patients(tmp_path / "patients.csv") == {"a,b": "p 1", "c": "p 2"}
