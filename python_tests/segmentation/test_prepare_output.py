"""The output contains no patient data and is written completely or not at all."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdkernels.segmentation.data.prepare import PrepareOptions, output, prepare, read_patients
from fdkernels.segmentation.data.prepare.names import PairNames
from made_dicom import IDENTITY, LESION, PATIENT_NAME, REGION, drawn_mask, screen

X0, Y0, X1, Y1 = REGION
CUT_LESION = np.zeros((Y1 - Y0, X1 - X0), np.uint8)
CUT_LESION[LESION[1] - Y0 : LESION[3] - Y0, LESION[0] - X0 : LESION[2] - X0] = 255


def test_nothing_of_the_patient_is_in_the_output(study):
    """Checks all file names and contents; the input contains the identity in many places."""
    name = PATIENT_NAME.replace("^", "_") + "_4711.dcm"
    path = study.add(name)
    assert all(part in path.read_bytes() for part in IDENTITY)
    Image.fromarray(drawn_mask()).save(study.masks / f"{Path(name).stem}.png", pnginfo=_text_of_patient())
    study.prepare()
    written = [file for file in study.output.rglob("*") if file.is_file()]
    assert len(written) == 2
    for file in written:
        content = file.read_bytes()
        for part in IDENTITY:
            assert part.lower() not in content.lower()
            assert part.lower() not in str(file.relative_to(study.output)).lower().encode()
        assert _png_chunks(content) == {b"IHDR", b"IDAT", b"IEND"}
    assert sorted(file.name for file in study.root.iterdir()) == ["dicom", "made", "masks"]


def _text_of_patient():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Patient", PATIENT_NAME)
    return info


def _png_chunks(content):
    kinds, at = set(), 8
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        kinds.add(content[at + 4 : at + 8])
        at += 12 + length
    return kinds


def test_pictures_of_one_patient_share_the_first_part_of_their_names(study):
    for number, patient in enumerate(("P1", "P2", "P1", "")):
        study.add(f"US{number}.dcm", PatientID=patient)
    report = study.prepare(without_patient_id="separate")
    assert report.notes == ["US3.dcm has no Patient ID: each counts as another patient"]
    assert study.names() == ["patient001_1", "patient001_2", "patient002_1", "patient003_1"]
    assert prepare(study.dicom, study.masks, study.root / "b", PrepareOptions(group_by="file")).pairs == 4
    assert sorted(f.stem for f in (study.root / "b" / "masks").iterdir()) == [
        "patient001_1",
        "patient002_1",
        "patient003_1",
        "patient004_1",
    ]


def test_files_without_patient_id_are_asked_for_once(study):
    for number, patient in enumerate(("P1", "", "")):
        study.add(f"US{number}.dcm", PatientID=patient)
    with pytest.raises(ValueError, match=r"1 problem:\n  2 files \(US1\.dcm, US2\.dcm\) have no Patient ID"):
        study.prepare()
    report = study.prepare(on_problem="skip")
    assert (report.pairs, len(report.problems)) == (1, 1)
    assert study.prepare(to=study.root / "b", group_by="file").notes == []
    listed = study.root / "patients.csv"
    listed.write_text("\ufefffile;patient\nUS1;P1\nUS2.dcm;P7\n", "utf-8")
    report = study.prepare(to=study.root / "c", patients=read_patients(listed))
    assert (report.pairs, report.notes) == (3, [])
    assert study.names() == ["patient001_1", "patient001_2", "patient002_1"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,patient\nUS1,P1\n", "must have the columns file and patient, got 'name,patient'"),
        ("file,patient\nUS1,\n", "must have a file and a patient in line 2"),
        ("file,patient\nUS1,P1\nUS1,P2\n", "must have one patient for US1, got P1 and P2"),
        ("file,patient\nUS9,P1\n", r"patients must name DICOM files of .*, got 'US9'"),
    ],
)
def test_a_list_of_patients_that_cannot_be_used_is_named(study, text, said):
    study.add()
    listed = study.root / "patients.csv"
    listed.write_text(text)
    with pytest.raises(ValueError, match=said):
        study.prepare(patients=read_patients(listed))


def test_hashed_names_depend_on_key_and_recording_and_not_on_the_others(study):
    study.add("b.dcm")
    study.prepare(hash_key=b"k" * 16)
    (first,) = study.names()
    study.add("a.dcm")
    study.prepare(to=study.root / "b", hash_key=b"k" * 16)
    both = set(study.names())
    assert first in both
    assert len({name.partition("_")[0] for name in both}) == 1  # one patient
    study.prepare(to=study.root / "c", hash_key=b"K" * 16)
    assert not both & set(study.names())


def test_a_hash_is_the_hmac_of_what_it_names():
    """HMAC-SHA256 of "group\\0P1" and "image\\0P1\\0x" with a key of sixteen k, computed with openssl."""
    assert PairNames(b"k" * 16).next("P1", "x") == "patient51b49d44c6e67a2b_1409bb60a31789da"


def test_a_short_key_and_unknown_choices_are_rejected():
    with pytest.raises(ValueError, match="hash_key must have at least 16 bytes, got 4"):
        PrepareOptions(hash_key=b"1234")
    with pytest.raises(ValueError, match="mask_polarity must be one of auto, dark, light, got 'white'"):
        PrepareOptions(mask_polarity="white")
    with pytest.raises(ValueError, match="on_problem must be one of refuse, skip, got 'stop'"):
        PrepareOptions(on_problem="stop")
    with pytest.raises(ValueError, match="must not name the same frame, got a in both"):
        PrepareOptions(force={"a"}, exclude={"a"})


def test_the_mapping_says_where_each_pair_came_from_and_only_its_owner_reads_it(study):
    path = study.add("cine.dcm", np.stack([screen()] * 2), mask=None, frames=2)
    mask = study.draw("cine_frame2.png")
    mapping = study.root / "secret" / "mapping.csv"
    study.prepare(mapping=mapping)
    with mapping.open(newline="", encoding="utf-8") as lines:
        assert list(csv.reader(lines)) == [
            ["name", "dicom", "frame", "mask", "x0", "y0", "x1", "y1"],
            ["patient001_1", str(path), "2", str(mask), "24", "16", "88", "64"],
        ]
    assert mapping.stat().st_mode & 0o077 == 0


def test_a_mapping_in_the_output_or_over_another_file_is_rejected(study):
    study.add()
    with pytest.raises(ValueError, match="mapping must be outside the output folder"):
        study.prepare(mapping=study.output / "images" / "mapping.csv")
    notes = study.root / "notes.csv"
    notes.write_text("mine")
    with pytest.raises(ValueError, match=r"mapping must be a new file, got .*notes\.csv"):
        study.prepare(mapping=notes)
    with pytest.raises(ValueError, match="mapping must be a file, got the folder"):
        study.prepare(mapping=study.masks)
    assert notes.read_text() == "mine"
    assert not study.output.exists()


def test_a_second_run_changes_nothing_and_other_pairs_are_rejected(study):
    study.add("a.dcm")
    mapping = study.root / "mapping.csv"
    study.prepare(mapping=mapping)
    before = {file: file.stat().st_mtime_ns for file in study.output.rglob("*.png")}
    assert study.prepare(mapping=mapping).unchanged
    assert {file: file.stat().st_mtime_ns for file in study.output.rglob("*.png")} == before
    study.add("b.dcm")
    with pytest.raises(ValueError, match=r"output must be new or empty, got .*, which contains other pairs"):
        study.prepare()
    assert study.names() == ["patient001_1"]


def test_an_empty_output_folder_is_accepted(study):
    (study.output / "images").mkdir(parents=True)
    study.add()
    assert study.prepare().pairs == 1
    assert study.output.stat().st_mode == study.masks.stat().st_mode


def test_a_link_to_an_empty_folder_is_followed(study):
    study.add()
    (study.root / "place").mkdir()
    study.output.symlink_to(study.root / "place", target_is_directory=True)
    assert study.prepare().pairs == 1
    assert study.output.is_symlink()
    assert study.names() == ["patient001_1"]


@pytest.mark.parametrize("foreign", ["notes.txt", "images/notes.txt", "images/a/b.png", "other/x.png"])
def test_an_output_folder_with_other_files_is_rejected(study, foreign):
    study.add()
    (study.output / foreign).parent.mkdir(parents=True)
    (study.output / foreign).write_text("mine")
    with pytest.raises(ValueError, match=f"output must be new or empty, got .*, which contains {foreign}"):
        study.prepare()
    assert (study.output / foreign).read_text() == "mine"


def test_an_output_inside_an_input_or_that_is_a_file_is_rejected(study):
    study.add()
    for place in (study.dicom, study.dicom / "made", study.masks / "made"):
        with pytest.raises(ValueError, match="output must be outside the input folders"):
            prepare(study.dicom, study.masks, place)
    study.output.write_text("mine")
    with pytest.raises(ValueError, match="output must be a folder, got the file"):
        study.prepare()
    assert study.output.read_text() == "mine"


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_run_leaves_nothing_and_the_next_one_completes(study, monkeypatch, failure):
    for number in range(3):
        study.add(f"US{number}.dcm")
    add, calls = output.PairWriter.add, []

    def breaking(writer, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise failure
        add(writer, *arguments)

    monkeypatch.setattr(output.PairWriter, "add", breaking)
    with pytest.raises(type(failure)):
        study.prepare(mapping=study.root / "mapping.csv")
    assert sorted(file.name for file in study.root.iterdir()) == ["dicom", "masks"]
    monkeypatch.undo()
    assert study.prepare(mapping=study.root / "mapping.csv").pairs == 3
