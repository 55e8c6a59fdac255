from __future__ import annotations

import pytest

from fdkernels.segmentation.experiments.mediation import simulate


@pytest.mark.parametrize(("a", "b"), [(2.0, -0.5), (0.0, 1.0)])
def test_estimates_are_near_what_example_3_states(a, b):
    found = simulate(a, b, seed=0, draws=20_000)
    stated = {"Z|X": (a, 1), "Y|Z": (b, 1), "Y|X": (a * b, 1 + b**2)}
    for name, (slope, variance) in stated.items():
        one = found["distributions"][name]
        assert (one["slope"]["stated"], one["variance"]["stated"]) == (slope, variance)
        assert one["slope"]["estimated"] == pytest.approx(slope, abs=0.04)
        assert one["variance"]["estimated"] == pytest.approx(variance, rel=0.04)
        assert one["variance"]["interval"][0] < one["variance"]["estimated"] < one["variance"]["interval"][1]
    assert abs(found["independence"]["r"]) < 0.04
    for one in found["mixture"]:
        assert one["mean"] == pytest.approx(a * b * one["x"], abs=0.06)


def test_a_simulation_is_the_same_each_time():
    assert simulate(1.0, 1.0, 3, 1000) == simulate(1.0, 1.0, 3, 1000)
    assert simulate(1.0, 1.0, 3, 1000) != simulate(1.0, 1.0, 4, 1000)
