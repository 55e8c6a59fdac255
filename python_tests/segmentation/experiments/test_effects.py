"""Statistics against numbers worked by hand."""

from __future__ import annotations

import math

import pytest

from fdkernels.segmentation.experiments import effects
from fdkernels.segmentation.experiments.plan import ScoreRow


def _row(sample, dice, *, seed=0, patient=None, arm="with", fold=1):
    return ScoreRow(arm, seed, fold, patient or sample, sample, dice, dice / 2, {"enc1": -dice})


def test_holm_multiplies_the_kth_smallest_by_the_number_left_and_never_falls():
    # m = 3: 0.01 * 3, 0.03 * 2, and 0.04 * 1, which is raised to the 0.06 before it.
    assert effects.holm([0.01, 0.04, 0.03, None]) == [0.03, 0.06, 0.06, None]
    assert effects.holm([0.6, 0.5]) == [1.0, 1.0]


def test_paired_test_by_hand():
    # Ranks of 1, 2, 3, 4: W+ = 1 + 2 + 4, W- = 3. Of the 16 signs 5 give a sum of at most 3.
    found = effects.paired_test([1.0, 2.0, -3.0, 4.0, 0.0])
    assert found == {
        "statistic": 3.0,
        "p": pytest.approx(2 * 5 / 16),
        "rank_biserial": pytest.approx((7 - 3) / 10),
        "improved": 3,
        "worsened": 1,
        "unchanged": 1,
    }


def test_paired_test_without_a_difference_has_no_p():
    found = effects.paired_test([0.0, 0.0])
    assert (found["p"], found["rank_biserial"], found["unchanged"]) == (None, None, 2)


def test_correlation_by_hand():
    # Deviations -1.5 -0.5 0.5 1.5 and -1.5 0.5 -0.5 1.5: products 4, squares 5 each.
    found = effects.correlation([1, 2, 3, 4], [1, 3, 2, 4])
    assert found["slope"] == pytest.approx(0.8)
    assert found["intercept"] == pytest.approx(0.5)
    assert found["pearson"]["r"] == pytest.approx(0.8)
    assert found["spearman"]["r"] == pytest.approx(0.8)
    reach = 1.959964
    ends = [math.tanh(math.atanh(0.8) + sign * reach) for sign in (-1, 1)]
    assert found["pearson"]["interval"] == pytest.approx(ends, abs=1e-6)
    wider = reach * math.sqrt(1 + 0.8**2 / 2)
    assert found["spearman"]["interval"][0] == pytest.approx(math.tanh(math.atanh(0.8) - wider), abs=1e-6)


@pytest.mark.parametrize(("x", "y"), [([1, 2, 3], [1, 2, 3]), ([1, 1, 1, 1], [1, 2, 3, 4])])
def test_a_correlation_that_is_not_defined_is_none(x, y):
    assert effects.correlation(x, y)["pearson"] is None


def test_means_over_seeds_leave_out_what_is_not_defined():
    rows = [_row("a", 0.2), _row("a", 0.4, seed=1), _row("b", math.nan), _row("b", 0.5, seed=1)]
    found = effects.over_seeds(rows, lambda row: row.dice)
    assert found == {"a": pytest.approx(0.3), "b": 0.5}


def test_a_difference_is_paired_by_seed_and_image():
    before = [
        _row("a", 0.1, arm="without"),
        _row("b", 0.5, arm="without"),
        _row("a", 0.2, arm="without", seed=1),
    ]
    after = [_row("b", 0.6), _row("a", 0.4), _row("a", 0.1, seed=1)]
    found = effects.difference(after, before, lambda row: row.dice)
    assert found["mean"] == pytest.approx((0.1 + 0.3 - 0.1) / 3)
    # Of image a the mean over its seeds is tested, +0.1.
    assert (found["improved"], found["worsened"]) == (2, 0)


def test_images_without_a_counterpart_are_left_out():
    found = effects.difference([_row("a", 0.4), _row("b", 0.4)], [_row("a", 0.1)], lambda row: row.dice)
    assert found["mean"] == pytest.approx(0.3)
    assert effects.difference([], [_row("a", 0.1)], lambda row: row.dice)["mean"] is None


def test_one_patient_has_no_interval():
    before = [_row(name, 0.1, patient="p", arm="without") for name in "ab"]
    after = [_row(name, 0.2, patient="p") for name in "ab"]
    assert effects.difference(after, before, lambda row: row.dice)["interval"] is None
