"""Two runs on the same images: intervals by hand, and no gain from nothing."""

from __future__ import annotations

import numpy as np
import pytest

from fdkernels.segmentation.comparison import compare, interval
from fdkernels.segmentation.scoring import SampleScores
from fdkernels.segmentation.summary import of_phase, worst_off


def row(image, dice, patient=None):
    undefined = dict.fromkeys(("sensitivity", "specificity", "precision", "foreground_share"), 0.5)
    return SampleScores(
        image=str(image),
        patient=str(image) if patient is None else patient,
        phase="active",
        fold=None,
        symmetry="identity",
        scores={"dice": dice, "iou": dice / (2 - dice), **undefined},
        counts=dict.fromkeys(("true_positives", "false_positives", "true_negatives", "false_negatives"), 1),
        layer_losses={},
    )


def test_the_interval_of_two_groups_spans_both():
    """A draw holds the first alone, the second alone or both, in 1, 1 and 2 of 4 cases."""
    assert interval([1.0, 3.0], ["a", "b"]) == [1, 3]
    assert interval([0.25] * 4, ["a", "b", "c", "d"]) == [0.25, 0.25]


def test_images_of_one_patient_are_drawn_together():
    # Alone b has the mean 4 and a 0; as images, four of a's three zeros and b's 4 could be drawn.
    assert interval([0.0, 0.0, 0.0, 4.0], ["a", "a", "a", "b"]) == [0, 4]
    assert interval([0.0, 0.0, 0.0, 4.0], ["a", "b", "c", "d"]) == [0, 3]


def test_seeds_are_drawn_as_whole_blocks():
    # The seeds' means are 0 and 1 for every patient: drawing patients alone would show no spread.
    values, patients, seeds = [0.0, 0.0, 1.0, 1.0], ["a", "b", "a", "b"], [0, 0, 1, 1]
    assert interval(values, patients, seeds) == [0, 1]
    assert interval(values, patients) == [0.5, 0.5]


def test_a_draw_of_seeds_and_patients_that_never_met_is_left_out():
    assert interval([1.0, 3.0], ["a", "b"], [0, 1]) == [1, 3]


def test_one_group_has_no_interval():
    assert interval([1.0, 2.0], ["a", "a"]) is None
    assert interval([], []) is None


def test_the_interval_of_many_is_the_normal_one_and_the_same_in_each_call():
    values = np.random.default_rng(1).normal(0.02, 0.1, 400)
    names = [str(n) for n in range(400)]
    low, high = interval(values, names)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert interval(values, names) == [low, high]


def test_improved_and_worsened_images_by_hand():
    ours = [row("a", 0.5), row("b", 0.7), row("c", 0.9), row("d", 0.4)]
    theirs = [row("d", 0.5), row("c", 0.9), row("b", 0.6), row("a", 0.4)]
    found = compare(ours, theirs, {"all": {one.key for one in ours}, "none": set()})
    assert {name: found["all"][name] for name in ("improved", "worsened", "unchanged")} == {
        "improved": 2,
        "worsened": 1,
        "unchanged": 1,
    }
    assert found["none"] == {"dice": None, "iou": None, "improved": 0, "worsened": 0, "unchanged": 0}
    assert found["resampled"] == "images"
    shared = [row(name, 0.5, patient="P") for name in "ab"] + [row("c", 0.5)]
    assert compare(shared, shared, {})["resampled"] == "patients"


def test_worst_off_images_gain_nothing_from_chance():
    """Two runs that differ by noise alone: chosen by the baseline, its worst-off would gain 0.14."""
    generator = np.random.default_rng(0)
    dice = 0.7 + 0.05 * generator.normal(size=2000)
    ours, theirs = (
        [row(n, value) for n, value in enumerate(dice + 0.1 * generator.normal(size=2000))] for _ in "ab"
    )
    found = of_phase(ours, theirs, None, 400)
    assert abs(found["difference"]["worst_off"]["dice"]) < 0.02
    low, high = found["comparison"]["worst_off"]["dice"]
    assert low < 0 < high
    by_baseline = worst_off(theirs, 400)
    gain = np.mean(
        [
            a.scores["dice"] - b.scores["dice"]
            for a, b in zip(ours, theirs, strict=True)
            if b.key in by_baseline
        ]
    )
    assert gain > 0.1
