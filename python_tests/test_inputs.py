"""Calls of a kind that was seen before skip no check that could fail, and compute what the settings say."""

from __future__ import annotations

import pytest
import torch

import fdkernels as fdk
from fdkernels import inputs
from fdkernels.op import kernels


@pytest.fixture(autouse=True)
def _no_plans(monkeypatch):
    monkeypatch.setattr(inputs, "_plans", {})


FEATURES = [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 4, 4)]
MASK = torch.ones(2, 1, 8, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"mask": MASK * 255}, ValueError, "divide a 0/255 mask by 255"),
        ({"mask": MASK.float()}, None, ""),
        ({"mask": MASK[..., :4]}, ValueError, "aspect"),
        ({"mask": MASK[:1]}, ValueError, "batch size"),
        ({"mask": MASK.numpy()}, TypeError, "mask must be a tensor"),
        ({"features": dict(enumerate(FEATURES)).values()}, TypeError, "features must be a tensor"),
        ({"features": (one for one in FEATURES)}, TypeError, "features must be a tensor"),
        ({"features": tuple(FEATURES)}, None, ""),
        ({"features": [FEATURES[0], FEATURES[1][:1]]}, ValueError, "same batch size"),
        ({"features": [FEATURES[0].to_sparse(), FEATURES[1]]}, TypeError, "dense tensor"),
        ({"features": [FEATURES[0].long(), FEATURES[1]]}, TypeError, "float32, float64"),
        ({"ignore_index": True}, TypeError, "ignore_index must be a number"),
        ({"channel_dim": True}, TypeError, "channel_dim must be an integer"),
        ({"aspect": "other"}, ValueError, "aspect must be one of"),
        ({"backend": "none"}, ValueError, "backend must be one of"),
    ],
)
def test_what_differs_from_a_call_that_passed_is_checked(changed, error, match):
    call = {"features": FEATURES, "mask": MASK, "ignore_index": 1, **changed}
    for _ in range(2):
        fdk.feature_discrepancy_loss(FEATURES, MASK, ignore_index=1)
    if error is None:
        fdk.feature_discrepancy_loss(**call)
    else:
        with pytest.raises(error, match=match):
            fdk.feature_discrepancy_loss(**call)


@pytest.mark.skipif(fdk.backends()["cpu"] is not None, reason=f"backend 'cpu': {fdk.backends()['cpu']}")
def test_a_backend_that_is_selected_later_computes(monkeypatch):
    asked = []
    found = kernels.kernels_of

    def spy(name: str):
        asked.append(name)
        return found(name)

    monkeypatch.setattr("fdkernels.op.registered.kernels_of", spy)
    for name in ("cpu", "reference", "cpu"):
        with fdk.use_backend(name):
            fdk.feature_discrepancy_loss(FEATURES, MASK)
    assert list(dict.fromkeys(asked)) == ["cpu", "reference"]
    assert asked[-1] == "cpu"


def test_the_mask_may_begin_to_require_a_gradient():
    soft = torch.rand(2, 8, 8)
    fdk.feature_discrepancy_loss(FEATURES, soft)
    fdk.feature_discrepancy_loss(torch.rand(2, 3, 8, 8), soft.requires_grad_()).backward()
    assert soft.grad.abs().sum() > 0


def test_masks_that_differ_in_strides_alone():
    features = torch.rand(2, 3, 8, 8)
    room = torch.rand(2, 2, 8, 8)
    first = room[:, :1]
    for mask in (first.contiguous(), first.mT, first, room[:, 1:], room[:1, :1].expand(2, 1, 8, 8)):
        for _ in range(2):
            got = fdk.feature_discrepancy_loss(features, mask)
            wanted = fdk.feature_discrepancy_loss(features, mask.contiguous())
            assert torch.equal(got, wanted)
        outside = mask.clone()
        outside[-1, 0, -1, -1] = 2
        with pytest.raises(ValueError, match="must have values in"):
            fdk.feature_discrepancy_loss(features, outside)
        with pytest.raises(ValueError, match="must have values in"):
            fdk.feature_discrepancy_loss(features, outside.mT)


def test_only_so_many_kinds_are_remembered():
    for width in range(1, inputs._MOST_PLANS + 3):
        fdk.feature_discrepancy_loss(torch.rand(1, 1, 1, width), torch.ones(1, 1, width))
    assert len(inputs._plans) == 2


def test_calls_inside_transforms_are_of_no_kind():
    features, mask = torch.rand(2, 3, 8, 8), torch.ones(2, 8, 8)
    wanted = fdk.feature_discrepancy_loss(features, mask)
    grad, value = torch.func.grad_and_value(fdk.feature_discrepancy_loss)(features, mask)
    torch.testing.assert_close(value, wanted)
    features.requires_grad_()
    fdk.feature_discrepancy_loss(features, mask).backward()
    torch.testing.assert_close(features.grad, grad)
