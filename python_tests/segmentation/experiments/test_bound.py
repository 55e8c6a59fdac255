from __future__ import annotations

import math

import pytest

from fdkernels.segmentation.experiments.bound import judge

# Dice 0.8 with as many pixels predicted as true: sensitivity 0.8, stated k = 0, bound FD <= 0.8.
GOOD = {"dice": 0.8, "size_ratio": 1.0, "sensitivity": 0.8, "loss": 0.0}
CASES = {
    "holds": (GOOD | {"feature_distance": 0.5, "foreground_share": 0.7}, None),
    "constant": (GOOD | {"feature_distance": 0.9, "foreground_share": 0.7}, "constant"),
    "substitution": (GOOD | {"feature_distance": 0.9, "foreground_share": 0.95}, "substitution"),
    "dice": (GOOD | {"dice": 0.0, "feature_distance": 0.5, "foreground_share": 0.7}, "dice"),
    "negative": (GOOD | {"size_ratio": 3.0, "feature_distance": 0.5, "foreground_share": 0.7}, "negative"),
    "empty": (
        GOOD | {"size_ratio": None, "sensitivity": None, "feature_distance": 0.5, "foreground_share": 0.7},
        "empty",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_lemma_7_holds_or_fails_for_the_reason(case):
    arguments, reason = CASES[case]
    found = judge(**arguments)
    assert (found["lemma7_holds"], found["lemma7_reason"]) == (reason is None, reason)


def test_the_three_k_by_hand():
    arguments, _ = CASES["constant"]
    found = judge(**arguments)
    assert found["stated_k"] == 0
    assert found["derived_k"] == pytest.approx(1 + 1 / 0.8)
    assert found["lemma7_needed_k"] == pytest.approx(0.9 / 0.8 - 1)
    assert found["lemma7_derived"] is True
    assert found["lemma7_loss"] == pytest.approx(-math.log(0.9))


def test_lemma_5_is_about_the_loss_of_the_run():
    arguments = CASES["holds"][0]
    # -log(0.8) = 0.223 is the bound.
    assert judge(**arguments | {"loss": 0.23})["lemma5_holds"] is True
    found = judge(**arguments | {"loss": 0.21})
    assert (found["lemma5_holds"], found["lemma5_reason"]) == (False, "other")
    assert found["lemma5_needed_k"] == pytest.approx(math.exp(-0.21) / 0.8 - 1)


def test_what_is_not_defined_is_not_judged():
    found = judge(**CASES["holds"][0] | {"feature_distance": None, "loss": math.nan})
    assert found["lemma7_holds"] is None
    assert found["lemma5_holds"] is None
