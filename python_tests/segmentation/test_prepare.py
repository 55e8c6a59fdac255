"""`prepare` end to end, from DICOM files and drawn masks to anonymous pairs, as function and command."""

from __future__ import annotations

import numpy as np
import pytest
from pydicom import dcmread
from typer.testing import CliRunner

from fdkernels import __main__ as program
from fdkernels.cli import app
from fdkernels.segmentation.data import us_tnbc
from fdkernels.segmentation.data.prepare import PrepareOptions, parse_crop, prepare
from fdkernels.segmentation.data.reading import load_pair
from fdkernels.segmentation.data.scan import natural
from made_dicom import LESION, REGION, drawn_mask, region, screen, write_dicom

X0, Y0, X1, Y1 = REGION
CUT_LESION = np.zeros((Y1 - Y0, X1 - X0), np.uint8)
CUT_LESION[LESION[1] - Y0 : LESION[3] - Y0, LESION[0] - X0 : LESION[2] - X0] = 255


def test_the_region_is_cut_out_and_the_lesion_becomes_white(study):
    study.add()
    report = study.prepare()
    assert (report.pairs, report.left_out, report.problems, report.unchanged) == (1, [], [], False)
    picture, mask = study.read()
    assert np.array_equal(picture, screen()[Y0:Y1, X0:X1])
    assert np.array_equal(mask, CUT_LESION)
    assert sorted(f.name for f in study.output.iterdir()) == ["images", "masks"]


def test_the_loader_of_us_tnbc_finds_the_pairs_and_their_patients(study):
    for number, patient in enumerate(("P1", "P2", "P1")):
        study.add(f"US{number}.dcm", PatientID=patient)
    for options in ({}, {"hash_key": b"k" * 16, "to": study.root / "hashed"}):
        study.prepare(**options)
        found = us_tnbc.find(study.output)
        assert found.skipped == ()
        assert [sample.image.stem for sample in found.samples] == sorted(study.names(), key=natural)
        assert len({sample.patient for sample in found.samples}) == 2
        for sample in found.samples:
            image, mask = load_pair(sample)
            assert image.size == mask.size == (X1 - X0, Y1 - Y0)
            assert np.array_equal(np.array(mask), CUT_LESION)


@pytest.mark.parametrize(
    ("pixels", "photometric"),
    [
        (255 - screen(), "MONOCHROME1"),
        (np.repeat(screen()[..., None], 3, 2), "RGB"),
        (np.stack([screen(), np.full_like(screen(), 128), np.full_like(screen(), 128)], 2), "YBR_FULL"),
    ],
    ids=["MONOCHROME1", "RGB", "YBR_FULL"],
)
def test_every_photometric_interpretation_gives_the_same_pair(study, pixels, photometric):
    study.add(pixels=pixels, photometric=photometric)
    study.prepare()
    assert np.array_equal(study.read()[0], screen()[Y0:Y1, X0:X1])


def test_only_frames_with_masks_are_used(study):
    frames = np.stack([screen(seed=number) for number in range(4)])
    study.add("cine.dcm", frames, mask=None, frames=4)
    study.draw("cine_frame2.png")
    study.draw("cine_frame4.tif")
    report = study.prepare()
    assert study.names() == ["patient001_1", "patient001_2"]
    assert report.left_out == ["cine: 2 of 4 frames have no mask"]
    for name, number in (("patient001_1", 1), ("patient001_2", 3)):
        assert np.array_equal(study.read(name)[0], frames[number][Y0:Y1, X0:X1])


def test_a_recording_whose_masks_name_no_frame_or_one_too_many_is_a_problem(study):
    study.add("cine.dcm", np.stack([screen()] * 2), frames=2)
    study.draw("cine_frame3.png")
    with pytest.raises(ValueError, match="2 problems:") as caught:
        study.prepare()
    first, second = str(caught.value).splitlines()[1:3]
    assert "cine.png must name one of the 2 frames of" in first
    assert first.endswith("cine_frameN")
    assert second.endswith("cine.dcm has frames 1 to 2, got frame 3")
    assert not study.output.exists()


def test_the_frame_number_may_be_given_for_a_single_frame_and_be_part_of_a_name(study):
    study.add("one.dcm", mask=None)
    study.draw("one_frame1.png")
    study.add("two_frame7.dcm")
    assert study.prepare().pairs == 2


def test_files_are_paired_across_subfolders_and_with_masks_beside_them(study):
    study.add("a/US1.dcm", mask=None)
    study.draw("b/c/US1.png")
    (study.dicom / "DICOMDIR").write_bytes(b"index")
    (study.dicom / ".DS_Store").write_bytes(b"")
    write_dicom(study.dicom / "1.2.840.77", screen(seed=9), regions=[region(REGION)])  # a name without suffix
    study.draw("1.2.840.77.png")
    assert study.prepare().pairs == 2
    for mask in study.masks.rglob("*.png"):
        mask.rename(study.dicom / mask.name)
    assert prepare(study.dicom, study.dicom, study.root / "again").pairs == 2


def test_masks_below_the_dicom_folder_are_no_dicom_files(study):
    study.add()
    study.masks = study.masks.rename(study.dicom / "masks")
    assert study.prepare().pairs == 1


@pytest.mark.parametrize("tag", ["YES", "yes "])
def test_a_file_tagged_as_annotated_is_left_out(study, tag):
    study.add("marked.dcm", BurnedInAnnotation=tag.strip().upper())
    study.add("bare.dcm", BurnedInAnnotation="NO")
    report = study.prepare()
    assert report.left_out == ["marked: the tag Burned In Annotation is YES"]
    assert report.pairs == 1
    assert (
        prepare(study.dicom, study.masks, study.root / "b", PrepareOptions(annotations="pixels")).pairs == 2
    )
    assert prepare(study.dicom, study.masks, study.root / "c", PrepareOptions(force={"marked"})).pairs == 2


def annotated(colour):
    picture = np.repeat(screen()[..., None], 3, 2)
    picture[Y0 + 5 : Y0 + 15, X0 + 9] = picture[Y0 + 10, X0 + 5 : X0 + 15] = colour
    return picture


@pytest.mark.parametrize(
    ("colour", "seen"),
    [((255, 255, 0), "coloured pixels"), ((255, 255, 255), "pixels of thin bright strokes")],
)
def test_a_frame_with_a_caliper_in_the_region_is_left_out_unless_forced(study, colour, seen):
    frames = np.stack([annotated(colour), np.repeat(screen()[..., None], 3, 2)])
    study.add("cine.dcm", frames, "none", "RGB", frames=2)
    (study.masks / "cine.png").unlink()
    study.draw("cine_frame1.png")
    study.draw("cine_frame2.png")
    report = study.prepare()
    (line,) = report.left_out
    assert line.startswith("cine_frame1: ")
    assert line.endswith(f"{seen} inside the crop look like annotation")
    assert np.array_equal(study.read()[0], screen()[Y0:Y1, X0:X1])
    for number, options in enumerate(
        ({"annotations": "none"}, {"annotations": "tag"}, {"force": {"cine_frame1"}})
    ):
        assert (
            prepare(study.dicom, study.masks, study.root / str(number), PrepareOptions(**options)).pairs == 2
        )


def test_annotation_outside_the_region_does_not_matter(study):
    picture = np.repeat(screen()[..., None], 3, 2)
    picture[2:10, 2:100] = (255, 200, 0)
    study.add(pixels=picture, photometric="RGB")
    assert study.prepare().left_out == []


def test_an_excluded_file_is_left_out_even_if_it_is_unusable(study):
    study.add("good.dcm")
    study.add("bare.dcm", mask=None)
    study.add("two.dcm")
    report = study.prepare(exclude={"bare", "two_frame1"})
    assert report.left_out == ["bare is excluded", "two is excluded"]
    assert report.pairs == 1


@pytest.mark.parametrize("option", ["force", "exclude"])
def test_a_forced_or_excluded_frame_that_does_not_exist_is_rejected(study, option):
    study.add()
    with pytest.raises(ValueError, match=rf"{option} must name a DICOM file, STEM, or .*, got 'US1_frame2'"):
        study.prepare(**{option: {"US1", "US1_frame2"}})


def test_without_regions_the_bright_part_of_the_screen_is_kept(study):
    study.add(regions=None)
    study.prepare()
    assert np.array_equal(study.read()[0], screen()[Y0:Y1, X0:X1])


def test_of_two_regions_the_one_with_the_lesion_is_kept(study):
    study.add(regions=[region((0, 0, 30, 80)), region((34, 20, 70, 60))])
    study.prepare()
    assert np.array_equal(study.read()[0], screen()[20:60, 34:70])


def test_a_given_crop_is_used(study):
    study.add()
    study.prepare(crop=parse_crop("30, 20,70,50"))
    picture, mask = study.read()
    assert np.array_equal(picture, screen()[20:50, 30:70])
    assert np.array_equal(mask, 255 - drawn_mask()[20:50, 30:70])


def test_a_crop_outside_a_frame_or_through_the_lesion_is_a_problem(study):
    study.add()
    with pytest.raises(ValueError, match=r"has 120x80 pixels, so the crop 0,0,121,80 exceeds it"):
        study.prepare(crop=parse_crop("0,0,121,80"))
    with pytest.raises(ValueError, match=r"US1\.png has 50% of its lesion outside the crop 24,16,50,64"):
        study.prepare(crop=parse_crop("24,16,50,64"))


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "1,2,3,4,5", ""])
def test_a_crop_that_is_not_four_numbers_is_rejected(text):
    with pytest.raises(ValueError, match="crop must be four integers"):
        parse_crop(text)


@pytest.mark.parametrize("text", ["5,0,5,9", "-1,0,5,9", "0,9,5,2"])
def test_an_empty_crop_is_rejected(text):
    with pytest.raises(ValueError, match=f"0 <= x0 < x1 and 0 <= y0 < y1, got {text}"):
        PrepareOptions(crop=parse_crop(text))


def test_all_unusable_input_is_reported_in_one_list_or_skipped(study):
    study.add("good.dcm")
    study.add("alone.dcm", mask=None)
    study.draw("orphan.png")
    study.draw("good.tif")
    (study.dicom / "notes.dcm").write_text("no picture")
    (study.masks / "rois.zip").write_bytes(b"")
    study.add("other/good.dcm", mask=None)
    copy = dcmread(study.dicom / "good.dcm")
    copy.save_as(study.dicom / "copy.dcm")
    study.draw("copy.png")
    study.add("black.dcm", np.zeros((80, 120), np.uint8))
    study.add("dark.dcm", np.zeros((80, 120), np.uint8), regions=None)
    with pytest.raises(ValueError, match="nothing was written, 9 problems:") as caught:
        study.prepare()
    said = str(caught.value)
    for part in (
        "alone.dcm has no mask alone.png or alone_frameN.png",
        "orphan.png has no DICOM file named orphan",
        "good.tif is a second mask of the same frame as",
        "notes.dcm is not a DICOM file",
        "rois.zip is not a PNG or TIFF file",
        "has the same name as",
        "good.dcm has the same pixels as frame 1 of",
        "black.dcm is blank in frame 1: every pixel of the crop is 0",
        "dark.dcm is black, so no ultrasound region can be detected",
    ):
        assert part in said
    assert not study.output.exists()
    report = study.prepare(on_problem="skip")
    assert len(report.problems) == 9
    assert study.names() == ["patient001_1"]


def test_what_systems_and_viewers_leave_is_passed_over_and_said_once(study):
    study.add("US1")  # DICOM without a suffix
    for stray in (
        "Thumbs.db",
        "README.txt",
        "viewer/start.exe",
        "viewer/logo.gif",
        "DICOMDIR",
        ".DS_Store",
    ):
        path = study.dicom / stray
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 300)
    (study.masks / "desktop.ini").write_bytes(b"x")
    (study.dicom / "__MACOSX").mkdir()
    (study.dicom / "__MACOSX" / "US1.dcm").write_bytes(b"x")
    report = study.prepare()
    assert (report.pairs, report.problems) == (1, [])
    assert report.notes == [
        "Passed over 5 files that are no image: README.txt, Thumbs.db, logo.gif, start.exe, desktop.ini"
    ]
    assert report.notes[0] in invoke(study).output


def test_a_picture_among_the_masks_that_is_no_mask_file_is_a_problem(study):
    study.add(mask=None)
    (study.masks / "US1.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"US1\.jpg is not a PNG or TIFF file"):
        study.prepare()


def test_a_name_that_utf_8_cannot_hold_is_a_problem(study):
    study.add()
    name = b"\xfc.dcm".decode("utf-8", "surrogateescape")  # a u with dots in Latin-1
    try:
        (study.dicom / "US1.dcm").rename(study.dicom / name)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    with pytest.raises(ValueError, match=r"\\udcfc\.dcm has a name that UTF-8 cannot hold; rename it"):
        study.prepare()


@pytest.mark.parametrize(
    ("pixels", "tags", "said"),
    [
        (
            np.eye(80, 120, dtype=np.uint8),
            {},
            "blank in frame 1: the crop has only 2 grey levels, from 0 to 1;",
        ),
        (
            screen().astype(np.uint16),
            {"WindowCenter": 32768, "WindowWidth": 65536},
            "the crop has only 2 grey levels, from 0 to 1;",
        ),
    ],
    ids=["two values", "a window far too wide"],
)
def test_a_picture_of_a_few_levels_is_a_problem(study, pixels, tags, said):
    study.add(pixels=pixels, **tags)
    with pytest.raises(ValueError, match="nothing was written") as caught:
        study.prepare(annotations="none")
    assert said in str(caught.value)


def test_no_pair_at_all_is_rejected_with_the_reasons(study):
    study.add(BurnedInAnnotation="YES")
    with pytest.raises(ValueError, match=r"no pair of .* is usable:\n  US1: the tag Burned In"):
        study.prepare(on_problem="skip")
    assert not study.output.exists()


def test_an_input_that_is_not_a_folder_is_rejected(study):
    with pytest.raises(ValueError, match=r"dicom must be a folder, got .*/none, which is not one"):
        prepare(study.root / "none", study.masks, study.output)
    with pytest.raises(ValueError, match=r"masks must be a folder, got .*/none, which is not one"):
        prepare(study.dicom, study.root / "none", study.output)


def invoke(study, *options):
    arguments = [
        "prepare",
        f"--dicom={study.dicom}",
        f"--masks={study.masks}",
        f"--output={study.output}",
        *options,
    ]
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_the_command_reports_pairs_what_was_left_out_and_what_was_skipped(study):
    for name in ("a.dcm", "b.dcm", "c.dcm"):
        study.add(name)
    study.add("alone.dcm", mask=None)
    key = study.root / "key"
    key.write_bytes(b"k" * 32)
    result = invoke(
        study, "--exclude=b", "--exclude=c", "--force=a", "--crop=24,16,80,60", "--mask-polarity=dark",
        "--annotations=pixels", "--on-problem=skip", "--group-by=file", f"--hash-key={key}",
        f"--mapping={study.root / 'mapping.csv'}",
    )  # fmt: skip
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0] == f"{study.output} contains 1 pair."
    assert lines[1:4] == ["Left out:", "  b is excluded", "  c is excluded"]
    assert lines[4] == "Skipped:"
    assert lines[5].endswith("alone.dcm has no mask alone.png or alone_frameN.png")
    assert lines[6].startswith("Check every image by eye before you share it")
    assert study.read(*study.names())[0].shape == (44, 56)


def test_the_command_says_that_a_repeated_run_changed_nothing(study):
    study.add()
    invoke(study)
    assert f"{study.output} contains 1 pair, unchanged." in invoke(study).output


def test_without_pydicom_the_command_says_what_to_install(study, monkeypatch, capsys):
    import sys

    for name in list(sys.modules):
        if name.partition(".")[0] == "pydicom":
            monkeypatch.setitem(sys.modules, name, None)
        if name.startswith("fdkernels.segmentation.data.prepare"):
            monkeypatch.delitem(sys.modules, name)
    arguments = [f"--dicom={study.dicom}", f"--masks={study.masks}", f"--output={study.output}"]
    monkeypatch.setattr(sys, "argv", ["fdkernels", "prepare", *arguments])
    assert program.main() == 1
    assert "is not installed: pip install 'fdkernels[train,dicom]'" in capsys.readouterr().err
