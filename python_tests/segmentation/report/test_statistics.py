"""Intervals and correlations against numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fdkernels.segmentation.comparison import interval
from fdkernels.segmentation.report.statistics import correlation, correlation_interval, regression


def test_an_interval_over_two_patients_ends_at_their_means():
    # A quarter of the draws takes one patient twice, and so each end.
    assert interval([1, 3, 10], ["a", "a", "b"], [0, 0, 0]) == [2, 10]


def test_patients_are_drawn_and_not_samples():
    few = interval([0.0] * 50 + [1.0] * 50, ["a"] * 50 + ["b"] * 50, [0] * 100)
    assert few == [0, 1]


def test_seeds_are_drawn_as_blocks():
    # Value 10·patient + seed: one of 16 draws has the first patient and the first seed alone.
    values, patients, seeds = [0, 1, 10, 11], ["a", "a", "b", "b"], [5, 9, 5, 9]
    assert interval(values, patients, seeds) == [0, 11]
    assert interval(values, patients, [0] * 4) == [0.5, 10.5]


def test_a_constant_difference_has_an_interval_of_no_width():
    ends = interval([0.1] * 8, [f"p{place // 2}" for place in range(8)], [0, 1] * 4)
    assert ends == pytest.approx([0.1, 0.1], rel=1e-12)


def test_one_patient_has_no_interval():
    assert interval([1, 2], ["a", "a"], [0, 1]) is None


def test_seeds_that_saw_other_patients():
    # A draw may hold no pair of both; such draws are left out.
    low, high = interval([1.0, 2.0], ["a", "b"], [0, 1])
    assert (low, high) == (1, 2)


def test_correlation_and_line_by_hand():
    x, y = [0, 1, 2, 3], [1, 3, 2, 4]
    assert correlation(x, y) == pytest.approx(0.8)  # covariance 4 of √5·√5
    assert regression(x, y) == pytest.approx((0.8, 1.3))


@pytest.mark.parametrize(("x", "y"), [([1], [2]), ([1, 1], [2, 3]), ([1, 2], [3, 3])])
def test_correlation_is_not_defined(x, y):
    assert correlation(x, y) is None
    assert regression(x, y) is None
    assert correlation_interval(x, y, ["a"] * len(x)) is None


def test_the_interval_of_a_correlation_holds_it_and_widens_with_fewer_patients():
    generator = np.random.default_rng(1)
    x = generator.normal(size=200)
    y = 0.5 * x + generator.normal(size=200) + 1e6  # a large mean must cost no digits
    by_sample = correlation_interval(x, y, [str(place) for place in range(200)])
    assert by_sample[0] < correlation(x, y) < by_sample[1]
    # Fisher's interval for independent samples; the bootstrap agrees within its own error.
    z, reach = np.arctanh(correlation(x, y)), 1.96 / np.sqrt(197)
    assert by_sample == pytest.approx((np.tanh(z - reach), np.tanh(z + reach)), abs=0.04)


def test_patients_whose_samples_are_copies_count_once():
    x, y = [0, 1, 2, 3, 5, 8], [1, 0, 3, 2, 5, 4]
    copies = correlation_interval(x * 20, y * 20, list("abcdef") * 20)
    assert copies == pytest.approx(correlation_interval(x, y, list("abcdef")))
