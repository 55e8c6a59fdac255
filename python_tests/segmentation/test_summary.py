from __future__ import annotations

import math

import numpy as np
import pytest

from fdkernels.segmentation.data import DATASETS
from fdkernels.segmentation.metrics import COUNTS
from fdkernels.segmentation.scoring import SampleScores
from fdkernels.segmentation.summary import (
    describe,
    of_folds,
    of_layers,
    of_phase,
    worst_off,
    worst_off_count,
)


def _row(image, dice, *, loss=0.0, fold=None, counts=(1, 1, 1, 1), precision=0.5, symmetry="identity"):
    scores = dict.fromkeys(("sensitivity", "specificity", "foreground_share"), 0.5)
    return SampleScores(
        image=image,
        patient=image,
        phase="active",
        fold=fold,
        symmetry=symmetry,
        scores={"dice": dice, "iou": dice / (2 - dice), "precision": precision, **scores},
        counts=dict(zip(COUNTS, counts, strict=True)),
        layer_losses={"enc1": loss, "dec1": -loss},
    )


@pytest.mark.parametrize(
    ("dataset", "samples", "expected"),
    [
        ("tnbc", 50, 10),
        ("tnbc", 10, 2),
        ("tnbc", 1, 1),
        ("monuseg", 44, 25),
        ("monuseg", 14, 8),
        ("udiat", 163, 35),
        ("ad-256", 10_000, 500),
        ("ad-128", 2000, 100),
        ("us-tnbc", 15, 10),
        ("us-tnbc", 3, 2),
        ("busi", 50, 10),
        ("another", 2, 1),
    ],
)
def test_the_worst_off_are_as_many_as_their_share_in_table_1(dataset, samples, expected):
    assert worst_off_count(samples, DATASETS.get(dataset)).count == expected


def test_the_user_may_say_how_many_are_worst_off():
    assert worst_off_count(5, DATASETS["tnbc"], 3).count == 3
    for asked in (0, 6):
        with pytest.raises(ValueError, match=f"from 1 to the number of samples, 5, got {asked}"):
            worst_off_count(5, DATASETS["tnbc"], asked)


def test_the_worst_off_have_the_lowest_dice_and_ties_go_by_name():
    rows = [_row("d", 0.5), _row("c", 0.9), _row("b", 0.5), _row("a", 0.5)]
    assert [image for _, image, _ in sorted(worst_off(rows, 2))] == ["a", "b"]


def test_mean_and_deviation_leave_out_what_is_not_defined():
    assert describe([1.0, math.nan, 3.0, math.inf]) == {
        "mean": 2,
        "std": pytest.approx(math.sqrt(2)),
        "count": 2,
    }
    assert describe([4.0]) == {"mean": 4, "std": None, "count": 1}
    assert describe([math.nan]) == {"mean": None, "std": None, "count": 0}


def test_sets_by_hand():
    rows = [
        _row("a", 0.2, counts=(1, 4, 9, 4), precision=math.nan),
        _row("b", 0.8, counts=(4, 1, 5, 1)),
        _row("c", 0.6, counts=(3, 2, 7, 2)),
    ]
    sets = of_phase(rows, [], None, 2)["sets"]
    assert [sets[name]["images"] for name in ("worst_off", "best_off", "all")] == [2, 1, 3]
    assert sets["worst_off"]["dice"]["mean"] == pytest.approx(0.4)
    assert sets["best_off"]["dice"] == {"mean": 0.8, "std": None, "count": 1}
    assert sets["all"]["dice"]["std"] == pytest.approx(np.std([0.2, 0.8, 0.6], ddof=1))
    assert sets["all"]["precision"]["count"] == 2
    assert sets["all"]["pooled"]["dice"] == pytest.approx(16 / (16 + 7 + 7))
    assert sets["all"]["pooled"]["iou"] == pytest.approx(8 / 22)


def test_a_single_image_leaves_no_best_off():
    sets = of_phase([_row("a", 0.5)], [], DATASETS["tnbc"], None)["sets"]
    assert sets["worst_off"]["images"] == 1
    assert sets["best_off"]["images"] == 0
    assert sets["best_off"]["dice"]["mean"] is sets["best_off"]["pooled"] is None


def test_a_comparison_takes_the_worst_off_of_the_mean_of_both():
    ours = [_row("a", 0.9), _row("b", 0.5), _row("c", 0.9)]
    baseline = [_row("a", 0.4), _row("b", 0.6), _row("c", 0.8)]  # means 0.65, 0.55, 0.85
    found = of_phase(ours, baseline, None, 1)
    assert found["sets"]["worst_off"]["dice"]["mean"] == 0.5
    assert found["baseline"]["sets"]["worst_off"]["dice"]["mean"] == 0.6
    assert found["difference"]["worst_off"]["dice"] == pytest.approx(-0.1)
    assert found["difference"]["best_off"]["dice"] == pytest.approx(0.3)
    assert found["difference"]["all"]["dice"] == pytest.approx(0.5 / 3)
    assert found["comparison"]["all"]["improved"] == 2
    assert found["comparison"]["worst_off"] == {
        "dice": None, "iou": None, "improved": 0, "worsened": 1, "unchanged": 0
    }  # fmt: skip
    assert "1 of 3 images, those with the lowest Dice in the mean of both runs" in found["worst_off_rule"]
    alone = of_phase(ours, [], None, 1)
    assert alone["sets"]["worst_off"]["dice"]["mean"] == 0.5
    assert "difference" not in alone
    assert "comparison" not in alone


def test_losses_that_are_not_finite_are_left_out():
    found = of_layers([_row("a", 0.5, loss=math.inf), _row("b", 0.6, loss=math.nan)])["enc1"]
    assert found == {"mean": None, "std": None, "count": 0, "pearson": None, "spearman": None}


def test_an_empty_set_has_no_difference():
    found = of_phase([_row("a", 0.7)], [_row("a", 0.5)], None, 1)
    assert found["difference"]["best_off"] == {"dice": None, "iou": None}


def test_other_symmetries_count_for_the_correlation_alone():
    rows = [
        _row("a", 0.5, loss=1.0),
        _row("b", 0.7, loss=0.5),
        _row("a", 0.1, loss=2.0, symmetry="left"),
        _row("b", 0.2, loss=1.5, symmetry="left"),
    ]
    found = of_phase(rows, [], None, None)
    assert found["sets"]["all"]["images"] == 2
    assert found["sets"]["all"]["dice"]["mean"] == pytest.approx(0.6)
    assert found["discrepancy_loss"]["enc1"]["count"] == 4


def test_correlations_are_those_of_numpy_and_of_the_ranks():
    generator = np.random.default_rng(0)
    dice, losses = generator.uniform(size=20), generator.normal(size=20)
    found = of_layers([_row(str(n), dice[n], loss=losses[n]) for n in range(20)])
    ranks = [values.argsort().argsort() for values in (dice, losses)]
    assert found["enc1"]["pearson"] == pytest.approx(np.corrcoef(dice, losses)[0, 1], abs=1e-6)
    assert found["enc1"]["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-5)
    assert found["dec1"]["pearson"] == pytest.approx(-found["enc1"]["pearson"], abs=1e-6)


def test_a_curve_that_only_falls_has_spearman_minus_one():
    rows = [_row(str(n), n / 10, loss=-math.exp(n)) for n in range(1, 10)]
    found = of_layers(rows)["enc1"]
    assert found["spearman"] == pytest.approx(-1, abs=1e-5)
    assert -1 < found["pearson"] < -0.5


@pytest.mark.parametrize(
    "rows",
    [
        [_row("a", 0.5, loss=1.0)],
        [_row("a", 0.5, loss=1.0), _row("b", 0.5, loss=2.0)],
        [_row("a", 0.5, loss=1.0), _row("b", 0.6, loss=1.0)],
        [_row("a", 0.5, loss=1.0), _row("b", 0.6, loss=math.nan)],
    ],
    ids=["one", "equal Dice", "equal loss", "one defined"],
)
def test_without_two_different_points_there_is_no_correlation(rows):
    found = of_layers(rows)["enc1"]
    assert found["pearson"] is found["spearman"] is None


def test_losses_that_differ_in_the_last_digits_still_correlate():
    rows = [_row(str(n), 0.5 + 1e-9 * n, loss=3 + 1e-9 * n) for n in range(5)]
    assert of_layers(rows)["enc1"]["pearson"] == pytest.approx(1, abs=1e-4)


def test_folds_count_alike_whatever_their_size():
    rows = [_row("a", 0.2, fold=1), _row("b", 0.4, fold=1), _row("c", 0.9, fold=2)]
    found = of_folds(rows)
    assert found["each"]["1"]["dice"] == pytest.approx(0.3)
    assert found["each"]["1"]["images"] == 2
    assert found["dice"]["mean"] == pytest.approx(0.6)
    assert found["dice"]["std"] == pytest.approx(np.std([0.3, 0.9], ddof=1))
    assert "folds" in of_phase(rows, [], None, None)
    assert "folds" not in of_phase([_row("a", 0.2)], [], None, None)
