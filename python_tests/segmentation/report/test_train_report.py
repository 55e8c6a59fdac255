"""The report of runs of `fdkernels train`."""

from __future__ import annotations

import re

import pytest

from fdkernels.models.blocks import TAP_NAMES
from fdkernels.segmentation.report import write_report
from fdkernels.segmentation.runfiles import write_json
from made_up_report import PageReader, write_logged_run
from made_up_run import write_made_up_run
from tiny_data import write_tiny_tnbc


def read(folder, **options) -> PageReader:
    page, text = write_report([folder], **options)
    markdown = text.read_text("utf-8")
    named = re.findall(r"^!\[.*\]\((\S+)\)$", markdown, flags=re.MULTILINE)
    reader = PageReader(page.read_text("utf-8"))
    assert len(named) == len(reader.images)
    assert all((text.parent / path).is_file() for path in named)
    assert all(image["alt"] for image in reader.images)
    assert not re.search("https?:", page.read_text("utf-8"))
    # None is blank.
    assert all(len(picture.resize((64, 64)).getcolors(4096)) > 8 for picture in reader.pictures())
    return reader


def test_a_run_with_its_numbers(tmp_path):
    reader = read(write_logged_run(tmp_path / "first", dice=0.8, alpha_end=0.25))
    results = reader.table("Results of the best epoch")
    assert results[1:] == [
        ["first", "one (α = 0)", "4", "2", "0.6100", "0.7000", "0.5000", "7"],
        ["first", "two", "4", "2", "0.6100", "0.8000", "0.6000", "7"],
    ]
    layers = reader.table("Final α and L_fd")
    assert layers[0] == ["layer", "final α", "L_fd after phase one", "L_fd after phase two"]
    assert layers[1:] == [
        [name, "0.2500", *(f"{depth - 1.5:.3f}".replace("-", "−") for _ in range(2))]
        for depth, name in enumerate(TAP_NAMES)
    ]
    assert ["base_channels", "2"] in reader.table("Settings of the run")
    assert reader.table("Every run")[1][:6] == ["first", "finished", "0.1.0", "2.13.0", "0", "–"]
    assert len(reader.images) == 3  # learning curves, layers, final alpha
    assert "has a Dice of 0.800 and an IoU of 0.600 in the mean over 7 test images" in reader.text
    assert "Nor do they say what the loss does" in reader.text
    assert "No images of first: data nowhere of run" in reader.text


def test_the_paper_is_beside_the_run_on_its_data_set(tmp_path):
    reader = read(write_logged_run(tmp_path / "mine", model="nucleisegnet"))
    table = reader.table("Table 2")
    at = [row[2] for row in table].index("mine")
    assert [row[:4] for row in table[at - 3 : at]] == [
        ["NuSegNet", "TNBC", kind, "published"] for kind in ("without", "with", "difference")
    ]
    assert table[at - 2][4:] == ["79.40", "68.42", "88.82", "72.58", "82.65", "70.58"]
    assert table[at - 1][4:] == ["+2.11", "+0.42", "+2.33", "+1.29", "+0.96", "+1.36"]
    assert table[at][4:] == ["–", "–", "–", "–", "80.00", "60.00"]
    assert table[at][3] == "32×32, width 2, 4 + 4 epochs, with the loss, 1 seed, one split, 7 images"
    assert reader.table("Table 3, TNBC")[-1][2:] == ["80.00", "60.00"]
    assert "AttnUNet on UDIAT, worst-off, without the loss: Dice 22.42 and IoU 29.47" in reader.text


def test_an_own_data_set_has_its_own_table(tmp_path):
    reader = read(write_logged_run(tmp_path / "mine", dataset="busi"))
    assert reader.table("Own numbers on data sets")[1][:3] == ["UNet", "BUSI", "mine"]


def test_an_unfinished_run_is_shown_as_far_as_it_is(tmp_path):
    folder = write_logged_run(tmp_path / "run", finished=["warm"])
    reader = read(folder)
    assert reader.table("Every run")[1][1] == "unfinished: 4 of 4 epochs of phase 2"
    assert reader.table("Results of the best epoch")[2][2:] == ["–"] * 6
    assert "1 of 1 run is not finished (run)" in reader.text
    assert len(reader.images) == 3


def test_a_run_that_has_only_begun(tmp_path):
    reader = read(write_logged_run(tmp_path / "run", phases=[], finished=[]))
    assert reader.images == []
    assert "No phase of run is finished" in reader.text
    assert reader.table("Every run")[1][1] == "not begun"


def test_alpha_stuck_at_a_bound_is_said(tmp_path):
    for name, end, said in (
        ("zero", 0.0, "Every α is 0 at the end of zero"),
        ("top", 1.0, "Every α has reached its upper bound in top"),
    ):
        assert said in read(write_logged_run(tmp_path / name, alpha_end=end)).text
    text = read(write_logged_run(tmp_path / "ramp", alpha_end=1.0, alpha_rule="ramp")).text
    assert "upper bound" not in text  # it ends there by design


def test_a_run_without_the_loss(tmp_path):
    reader = read(write_logged_run(tmp_path / "run", fd_loss=False))
    assert "The loss was not used." in reader.text
    assert len(reader.images) == 1


def test_folds_are_one_training(tmp_path):
    for fold in (1, 2, 4):
        write_logged_run(tmp_path / f"fold-{fold}", fold=fold, dice=0.7 + 0.02 * fold)
    (tmp_path / "fold-4" / "config.json").write_text("{")
    reader = read(tmp_path)
    assert len(reader.table("Results of the best epoch")) == 5
    assert "Over 2 folds test Dice is 0.730 in the mean, from 0.720 to 0.740." in reader.text
    assert "lacks fold-3, though it has fold-4" in reader.text
    assert "Left out" in reader.text
    assert "fold-4/config.json cannot be read" in reader.text


def test_a_folder_of_several_runs(tmp_path):
    write_logged_run(tmp_path / "arms" / "with" / "seed_0")
    write_logged_run(tmp_path / "arms" / "without" / "seed_0", fd_loss=False, seed=3)
    reader = read(tmp_path)
    assert [row[0] for row in reader.table("Results of the best epoch")[1:]] == [
        *["arms/with/seed_0"] * 2,
        *["arms/without/seed_0"] * 2,
    ]
    assert reader.table("Settings that differ")[0] == ["run", "fd_loss"]
    assert [row[-3] for row in reader.table("Every run")[1:]] == ["0", "3"]
    assert "tests no difference between them" in reader.text


def test_runs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arm in ("a", "b"):
        write_logged_run(tmp_path / arm / "seed_0", fd_loss=False, phases=[], finished=[])
    page, _ = write_report(["a/seed_0", "b/seed_0", "a/seed_0"], "out")
    table = PageReader(page.read_text("utf-8")).table("Every run")
    assert [row[0] for row in table[1:]] == ["a/seed_0", "b/seed_0"]


def test_a_result_without_its_numbers_is_named(tmp_path):
    folder = write_logged_run(tmp_path / "run")
    write_json(folder / "active" / "result.json", {"epochs": 4})
    reader = read(folder)
    assert "must hold a number as best_epoch" in reader.text
    assert reader.table("Every run")[1][1].startswith("unfinished")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with weights, which says nothing of its scores."""
    root = tmp_path_factory.mktemp("trained")
    run = write_made_up_run(root / "run", write_tiny_tnbc(root / "data"))
    result = {"epochs": 4, "best_epoch": 2, "validation_dice": 0.5}
    for phase in ("warm", "active"):
        test = {"test": {"dice": 0.4, "iou": 0.3, "images": 5}}
        write_json(run / phase / "result.json", {**result, **test})
    return run


def test_the_worst_and_the_best_image_are_those_of_evaluate(trained):
    from fdkernels.segmentation.evaluation import evaluate

    rows = [row for row in evaluate(trained, phases=["active"]).samples if row.phase == "active"]
    expected = sorted((row.scores["dice"], row.image) for row in rows)
    table = read(trained).table("The images above, of 5 scored")
    assert [row[1] for row in table[1:]] == ["worst"] * 3 + ["best"] * 2
    assert [row[4] for row in table[1:4]] == [f"{dice:.3f}" for dice, _ in expected[:3]]
    assert (table[1][2], table[4][2]) == (expected[0][1], expected[-1][1])


def test_scores_of_an_evaluation_choose_the_images(trained, tmp_path):
    (trained / "evaluation").mkdir()
    split = (trained / "split.json").read_text()
    lines = ["phase,image,patient,dice"]
    tested = re.findall(r'"image": "([^"]+)"', split[split.index('"test"') :])[:5]
    lines += [f"active,{name},p,{0.1 * place}" for place, name in enumerate(tested)]
    (trained / "evaluation" / "samples.csv").write_text("\n".join(lines))
    table = read(trained, output=tmp_path).table("The images above")
    assert table[1][2] == tested[0]
    assert table[1][4] == "0.000"


def test_data_that_has_moved(trained, tmp_path):
    data = trained.parent / "data"
    moved = data.rename(trained.parent / "moved")
    try:
        assert "No images of run" in read(trained, output=tmp_path).text
        assert read(trained, output=tmp_path, data=moved).table("The images above")
    finally:
        moved.rename(data)


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_a_folder_that_holds_neither_is_a_sentence(tmp_path, kind):
    folder = tmp_path / "x"
    if kind == "file":
        folder.write_text("")
    if kind == "empty":
        folder.mkdir()
    said = "holds neither config.json nor scores.csv" if kind == "empty" else "which is none"
    with pytest.raises(ValueError, match=said):
        write_report([folder])
    with pytest.raises(ValueError, match="got none"):
        write_report([])


def test_the_command(tmp_path, monkeypatch, capsys):
    from fdkernels.__main__ import main

    run = write_logged_run(tmp_path / "run")
    monkeypatch.setattr("sys.argv", ["fdkernels", "report", str(run), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "The report is in " in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "out" / "report.md").is_file()
    assert not (run / "report.html").exists()
