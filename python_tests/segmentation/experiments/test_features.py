from __future__ import annotations

import math

import pytest
import torch

from fdkernels.segmentation.experiments.features import layer_measures

FEATURES = torch.tensor([[[[3.0, 1.0]], [[0.0, 1.0]]]])  # [1, 2, 1, 2]
MASK = torch.tensor([[[[1.0, 0.0]]]])  # [1, 1, 1, 2]


def test_measures_by_hand():
    # S_fg = (3, 0), S_bg = (1, 1); |F_p|² = 9 and 2.
    found = layer_measures({"enc1": FEATURES}, MASK)["enc1"]
    assert found == {
        "norm": pytest.approx(math.sqrt(11 / 2)),
        "relative_discrepancy": pytest.approx(math.sqrt(4 + 1) / math.sqrt(11 / 2)),
        "feature_distance": pytest.approx(1 / 5),
        "foreground_share": pytest.approx(3 / 5),
    }


def test_inflated_features_change_the_norm_alone():
    small, large = (layer_measures({"x": FEATURES * scale}, MASK)["x"] for scale in (1, 100))
    assert large.pop("norm") == pytest.approx(100 * small.pop("norm"))
    assert large == pytest.approx(small)


def test_an_empty_region_has_no_distance():
    found = layer_measures({"x": FEATURES}, torch.zeros_like(MASK))["x"]
    assert found["relative_discrepancy"] is None
    assert found["foreground_share"] == 0
