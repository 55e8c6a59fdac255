"""The report of experiments: tables with hand-made numbers, and what is said of them."""

from __future__ import annotations

import json
import shutil

import pytest

from fdkernels.segmentation.report import write_report
from made_up_report import PageReader, made_up_rows, write_experiment, write_logged_run, write_scores


def read(folder) -> PageReader:
    page, _ = write_report([folder])
    reader = PageReader(page.read_text("utf-8"))
    assert all(image["alt"] for image in reader.images)
    assert all(len(picture.resize((64, 64)).getcolors(4096)) > 8 for picture in reader.pictures())
    return reader


def test_ablation_with_its_numbers(tmp_path):
    rows = made_up_rows({"without": 0.5, "with": 0.6})
    comparisons = [
        {"arm": "with", "baseline": "without", "set": "all", "score": "dice", "mean": 0.1, "p_holm": 0.012}
    ]
    reader = read(write_experiment(tmp_path / "ex", "ablation", rows, results={"comparisons": comparisons}))
    table = reader.table("Dice and IoU in percent")
    scores = ["Dice", "Δ Dice", "95 % interval", "p", "IoU", "Δ IoU", "95 % interval", "p"]
    assert table[0] == ["samples", "arm", "images", "patients", *scores]
    gain = ["+10.00", "+10.00 to +10.00"]
    nothing = ["–"] * 3
    assert table[1:] == [
        ["worst-off", "without", "2", "1", "50.50", *nothing, "40.50", *nothing],
        ["worst-off", "with", "2", "1", "60.50", "+10.00", "–", "–", "50.50", "+10.00", "–", "–"],
        ["best-off", "without", "6", "3", "54.50", *nothing, "44.50", *nothing],
        ["best-off", "with", "6", "3", "64.50", *gain, "–", "54.50", *gain, "–"],
        ["all", "without", "8", "4", "53.50", *nothing, "43.50", *nothing],
        ["all", "with", "8", "4", "63.50", *gain, "0.012", "53.50", *gain, "–"],
    ]
    assert (
        "Over all samples Dice under with differs from that under without by +10.00 points (95 % interval "
        "+10.00 to +10.00): the interval excludes 0" in reader.text
    )
    assert "8 images of 4 patients and 2 seeds" in reader.text
    assert "4 patients are few" in reader.text
    assert reader.table("Every run")[1][-1] == "1 min 1 s"
    assert reader.table("Every run")[1][2:4] == ["0.1.0", "2.13.0"]
    own = [row for row in reader.table("Table 2") if row[2] == "ablation: with"]
    assert [row[4:] for row in own] == [["60.50", "50.50", "64.50", "54.50", "63.50", "53.50"]]
    assert own[0][3] == "32×32, width 2, 4 + 4 epochs, 2 seeds, 2 folds, 8 images"


def test_an_interval_with_zero_shows_nothing(tmp_path):
    rows = made_up_rows({"without": 0.5, "with": 0.5}, seeds=[0])
    for row in rows:  # two patients gain what two others lose
        row["dice"] += (0.1 if row["patient"] in ("p0", "p1") else -0.1) * (row["arm"] == "with")
    text = read(write_experiment(tmp_path, "ablation", rows)).text
    assert "the interval includes 0, so that these numbers show neither a gain nor a loss" in text
    assert "excludes 0, and" not in text
    assert "With one seed the intervals do not hold" in text


def test_samples_are_paired_by_seed_fold_and_sample(tmp_path):
    rows = made_up_rows({"without": 0.5, "with": 0.6})
    # Only the pairs count: what one arm alone has changes no difference.
    rows = [row for row in rows if not (row["arm"] == "without" and row["seed"] == 1)]
    rows += [{**rows[-1], "sample": "p9_0.png", "patient": "p9", "dice": 0.0, "iou": 0.0}]
    table = read(write_experiment(tmp_path, "ablation", rows)).table("Dice and IoU in percent")
    assert [row[5] for row in table if row[:2] == ["all", "with"]] == ["+10.00"]


def test_inflated_features_are_said(tmp_path):
    def of(norm, apart):
        return {
            "enc1": {"norm": norm, "relative_discrepancy": apart},
            "dec1": {"norm": 1, "relative_discrepancy": 1},
        }

    results = {"features": {"without": of(1.0, 0.5), "with": of(3.0, 0.5)}}
    rows = made_up_rows({"without": 0.5, "with": 0.6})
    text = read(write_experiment(tmp_path, "ablation", rows, results=results, runs=False)).text
    assert "are larger than under without in 1 of 2 layers" in text
    assert "relative to their size is larger in 0" in text


def test_an_arm_without_the_loss_has_no_curves_of_it(tmp_path):
    rows = made_up_rows({"without": 0.5, "with": 0.6}, patients=2, seeds=[0])
    write_experiment(tmp_path, "ablation", rows)
    # Its first phase is that of the other arm, which has logged the loss.
    shutil.copytree(
        tmp_path / "runs/with/seed0/fold1/warm",
        tmp_path / "runs/without/seed0/fold1/warm",
        dirs_exist_ok=True,
    )
    alts = [image["alt"] for image in read(tmp_path).images]
    assert sum("a curve for each of 9 layers" in alt for alt in alts) == 1


def test_correlation_by_layer(tmp_path):
    reader = read(write_experiment(tmp_path, "correlation", made_up_rows({"with": 0.5}), runs=False))
    table = reader.table("Correlation r")
    assert table[1] == ["enc1", "8", "4", "−1.000", "−1.000 to −1.000", "−0.333"]
    assert len(table) == 10
    assert "lies below 0 in 9 of 9 layers, above 0 in 0, and holds 0 in 0" in reader.text
    assert any("Scatter charts for 9 layers" in image["alt"] for image in reader.images)


def test_shift_shows_both_distributions(tmp_path):
    rows = made_up_rows({"before": 0.5, "after": 0.6})
    reader = read(write_experiment(tmp_path, "shift", rows, runs=False))
    table = reader.table("The distributions above")[1:]
    assert table[0][:4] == ["Dice", "before", "16", "0.535"]
    assert table[1][:4] == ["Dice", "after", "16", "0.635"]
    assert len(table) == 4


def test_alpha_by_rule(tmp_path):
    write_experiment(tmp_path, "alpha", made_up_rows({"ascent": 0.5, "clipped": 0.5}))
    run = tmp_path / "runs" / "clipped" / "seed0" / "fold1"
    shutil.rmtree(run)
    write_logged_run(run, alpha_end=0.0, alpha_rule="clipped", fold=1)
    reader = read(tmp_path)
    table = reader.table("The final α of the figure above")
    # Three of the four runs of "clipped" end at 0.25, one at 0.
    assert table[:2] == [["layer", "ascent", "clipped"], ["enc1", "0.2500", "0.1875"]]
    assert "Every α is 0 at the end of clipped (seed 0, fold 1)" in reader.text
    assert sum("a curve for each of 9 layers" in image["alt"] for image in reader.images) == 2


def test_addition_by_method_and_batch(tmp_path):
    arms = {"plain-0": 0.5, "plain-10": 0.5, "loss-0": 0.6, "loss-10": 0.6}
    reader = read(write_experiment(tmp_path, "addition", made_up_rows(arms), runs=False))
    table = reader.table("Scores on the first data set")
    assert [row[:3] for row in table[1:]] == [
        ["plain", "0", "53.50"],
        ["plain", "10", "53.50"],
        ["loss", "0", "63.50"],
        ["loss", "10", "63.50"],
    ]


def test_addition_takes_its_arms_from_the_results(tmp_path):
    # Without an added image there is no exchange: one arm stands for two methods.
    arms = {"none+0": 0.5, "none+10": 0.4, "fd+0": 0.6, "fd+10": 0.6, "exchange+10": 0.7}
    places = {"none": (0, 10), "fd": (0, 10), "exchange": (0, 10)}
    curves = {
        method: [
            {"images": count, "arm": "fd+0" if (method, count) == ("exchange", 0) else f"{method}+{count}"}
            for count in counts
        ]
        for method, counts in places.items()
    }
    pairs = [("fd+0", "none+0"), ("fd+10", "none+10"), ("exchange+10", "none+10"), ("none+10", "none+0")]
    comparisons = [
        {"arm": arm, "baseline": baseline, "set": "all", "score": "dice", "p_holm": None}
        for arm, baseline in [*pairs, ("fd+10", "fd+0")]
    ]
    results = {"curves": curves, "comparisons": comparisons}
    rows = made_up_rows(arms, seeds=[0])
    reader = read(write_experiment(tmp_path, "addition", rows, results=results, runs=False))
    scores = [row[:3] for row in reader.table("Scores on the first data set")[1:]]
    assert scores[-2:] == [["exchange", "0", "63.50"], ["exchange", "10", "73.50"]]
    table = reader.table("Dice and IoU in percent")
    gains = {row[1]: (row[2], row[6]) for row in table if row[0] == "all"}
    assert gains == {
        "none+0": ("–", "–"),
        "none+10": ("none+0", "−10.00"),
        "fd+0": ("none+0", "+10.00"),
        "fd+10": ("none+10", "+20.00"),
        "exchange+10": ("none+10", "+30.00"),
    }
    assert "Dice under fd+10 differs from that under none+10 by +20.00 points" in reader.text


@pytest.mark.parametrize("key", ["shown", "samples"])
def test_qualitative_shows_each_sample_once(tmp_path, key):
    from PIL import Image

    files = {}
    for name in ("image", "truth", "without_errors", "with_errors"):
        files[name] = f"pictures/01/{name}.png"
        (tmp_path / "pictures" / "01").mkdir(parents=True, exist_ok=True)
        Image.radial_gradient("L").save(tmp_path / files[name])
    files["with_enc1_array"] = "pictures/01/with_enc1.npy"
    sample = {"sample": "p0_0.png", "patient": "p0", "dice": {"without": 0.5, "with": 0.6}, "files": files}
    rows = made_up_rows({"without": 0.5, "with": 0.6})
    write_experiment(tmp_path, "qualitative", rows, results={key: [sample]}, runs=False)
    reader = read(tmp_path)
    assert reader.table("The samples above")[1] == ["1", "p0_0.png", "p0", "0.500", "0.600"]
    shown = [image["alt"] for image in reader.images if image["alt"].startswith("Picture")]
    assert shown == [
        "Pictures of sample 1: image, truth, without errors, with errors. Dice: without 0.500, with 0.600."
    ]
    (tmp_path / files["truth"]).unlink()
    assert "Sample 1: truth cannot be read" in read(tmp_path).text


def test_bound_by_layer(tmp_path):
    one = {
        "samples": 8,
        "holds": 2,
        "holds_derived": 8,
        "needed_k": {"median": 1.5},
        "fails": {"constant": 6},
    }
    results = {"lemmas": {"lemma7": {"after": {"enc1": one, "dec1": {**one, "holds": 4}}}}}
    rows = made_up_rows({"after": 0.5})
    reader = read(write_experiment(tmp_path, "bound", rows, results=results, runs=False))
    (alt,) = [image["alt"] for image in reader.images if "share of samples" in image["alt"]]
    assert "after, k as stated: enc1 0.250, dec1 0.500; after, k as derived: enc1 1.000" in alt
    assert "lemma 7 holds with the k that is stated for 6 of 16 samples and layers" in reader.text
    assert reader.table("results: lemmas: lemma7: after.")[1] == ["enc1", "8", "2", "8", "1.5000", "6"]


def test_mediation_beside_what_is_stated(tmp_path):
    estimate = {"stated": 1.0, "estimated": 1.001, "interval": [0.99, 1.012]}
    one = {"a": 1.0, "b": -0.5, "seed": 0, "independence": {"r": 0.001, "interval": [-0.01, 0.012]}}
    one["distributions"] = {"Z|X": {"slope": estimate, "variance": estimate, "p": 0.5}}
    content = {"experiment": "mediation", "results": {"draws": 1000, "simulations": [one]}}
    (tmp_path / "summary.json").write_text(json.dumps(content))
    reader = read(tmp_path)
    row = ["Z|X", "1.0", "−0.5", "0", *["1.000", "1.0010", "0.9900 to 1.0120"] * 2, "0.500"]
    assert reader.table("Conditional distributions")[1:] == [row]
    assert reader.table("Partial correlation")[1][-1] == "yes"
    assert (
        "Of 2 slopes and variances that were estimated by simulation, the 95 % interval of 2" in reader.text
    )
    content["results"]["simulations"][0]["distributions"] = 3  # of another version
    (tmp_path / "summary.json").write_text(json.dumps(content))
    assert "are not as expected" in read(tmp_path).text


def test_results_of_any_form_become_tables(tmp_path):
    results = {
        "holds": {"enc1": {"share": 0.5, "k": 3}, "enc2": {"share": 1.0, "k": None}},
        "note": "by <hand>",
        "list": [{"name": "a", "value": 1.5}, {"name": "b", "value": [1.0, 2.0]}],
        "history": {"enc1": {"alpha": list(range(100))}},
        "empty": {},
        "deep": {"a": {"b": {"c": {"d": 1}}}},
        "odd": [[1, [2, {"x": 3}]], True, None],
    }
    reader = read(
        write_experiment(tmp_path, "bound", made_up_rows({"with": 0.5}), results=results, runs=False)
    )
    assert reader.table("results: holds.") == [
        ["", "share", "k"],
        ["enc1", "0.5000", "3"],
        ["enc2", "1.0000", "–"],
    ]
    assert reader.table("results: list.")[1:] == [["a", "1.5000"], ["b", "1.0000 to 2.0000"]]
    assert "by <hand>" in reader.text
    assert "Lists of more than 12 values are in summary.json alone: alpha." in reader.text
    assert reader.table("results: deep: a: b: c.") == [["", "value"], ["d", "1"]]


def test_an_unfinished_experiment_says_so(tmp_path):
    rows = made_up_rows({"without": 0.5, "with": 0.6}, patients=2, seeds=[0])
    write_experiment(tmp_path, "ablation", rows, state={"finished": 3, "total": 40})
    (tmp_path / "runs" / "with" / "seed0" / "fold1" / "config.json").unlink()
    text = read(tmp_path).text
    assert "The experiment is not finished: the numbers are those of 3 of 40 runs." in text
    assert "1 run could not be read and is left out." in text
    assert "seed0/fold1 holds no run" in text


def test_an_experiment_without_scores_or_with_broken_lines(tmp_path):
    write_experiment(tmp_path / "a", "ablation", made_up_rows({"with": 0.5}), runs=False)
    with (tmp_path / "a" / "scores.csv").open("a") as file:
        file.write("ablation,with,0,1,p0,half")  # cut off by a kill
    reader = read(tmp_path / "a")
    assert "1 line of scores.csv cannot be read" in reader.text
    assert "nothing to compare yet" in reader.text
    (tmp_path / "a" / "scores.csv").unlink()
    assert "There are no scores yet" in read(tmp_path / "a").text


def test_scores_alone_are_enough(tmp_path):
    reader = read(write_scores(tmp_path, "ablation", made_up_rows({"none": 0.5, "with": 0.6})))
    assert "The summary is missing" in reader.text
    assert [row[5] for row in reader.table("Dice and IoU in percent") if row[:2] == ["all", "with"]] == [
        "+10.00"
    ]


def test_pictures_of_the_experiment_are_taken_in_and_broken_ones_named(tmp_path):
    from PIL import Image

    write_experiment(tmp_path, "qualitative", made_up_rows({"with": 0.5}), runs=False)
    (tmp_path / "pictures").mkdir()
    Image.radial_gradient("L").save(tmp_path / "pictures" / "worst_1.png")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    reader = read(tmp_path)
    assert sum(image["alt"] == "Picture worst 1." for image in reader.images) == 1
    assert "The picture pictures/broken.png cannot be read" in reader.text


def test_names_of_samples_and_arms_break_nothing(tmp_path):
    rows = made_up_rows({"without": 0.5, '<b>"x"</b>$\\frac{': 0.6})
    reader = read(write_experiment(tmp_path, "ablation", rows, runs=False))
    assert "b" not in reader.elements
    assert any(row[1] == '<b>"x"</b>$\\frac{' for row in reader.table("Dice and IoU in percent"))


@pytest.mark.parametrize("name", ["mediation", "bound", "qualitative", "unheard-of"])
def test_results_alone_make_a_page(tmp_path, name):
    content = {"experiment": name, "results": {"effect": {"direct": 0.25, "total": 1.5}}, "seeds": [0]}
    (tmp_path / "summary.json").write_text(json.dumps(content))
    reader = read(tmp_path)
    assert reader.table("results: effect.") == [["", "value"], ["direct", "0.2500"], ["total", "1.5000"]]
    assert "The folder holds no runs. Seeds: [0]." in reader.text


def test_experiments_and_runs_on_one_page(tmp_path):
    rows = made_up_rows({"without": 0.5, "with": 0.6}, patients=2, seeds=[0])
    write_experiment(tmp_path / "study" / "tnbc" / "ex", "ablation", rows, runs=False)
    write_logged_run(tmp_path / "study" / "run", fd_loss=False)
    reader = read(tmp_path / "study")
    assert [row[0] for row in reader.table("Results of the best epoch")[1:]] == ["run", "run"]
    assert reader.table("Dice and IoU in percent")
    assert "Report on 2 folders" in reader.text
    assert "ablation (ex): Over all samples" in reader.text
    assert "Trainings: The best epoch" in reader.text
    page, _ = write_report([tmp_path / "study" / "run", tmp_path / "study" / "tnbc"], tmp_path / "out")
    assert len(PageReader(page.read_text("utf-8")).table("Results of the best epoch")) == 3
