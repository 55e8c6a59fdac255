"""Tensors without values, as memory estimates use them, and subclasses: no kernel looks for their memory."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fdkernels as fdk
from fdkernels import models

pytestmark = pytest.mark.filterwarnings("error:Accessing the data pointer")

CALLS = {
    "plain": {},
    "ignored": {"ignore_index": 255},
    "entries": {"reduction": "none"},
    "shuffle": {"exchange": "shuffle"},
    "pairing": {"exchange": "shuffle", "pairing": torch.tensor([1, 0])},
    "pooled": {"exchange": "pooled", "domains": torch.tensor([0, 1])},
    "classes": {"mode": "multiclass", "num_classes": 3},
    "fisher": {"mode": "multiclass", "num_classes": 3, "convention": "fisher"},
}


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, a binary mask, and class indices."""
    features = torch.randn(2, 3, 8, 8, requires_grad=True)
    return features, torch.rand(2, 1, 8, 8).round(), torch.randint(0, 3, (2, 8, 8))


@pytest.mark.parametrize("name", CALLS)
def test_calls_without_values(name):
    call = CALLS[name]
    features, mask, classes = inputs()
    fdk.feature_discrepancy_loss(features, classes if "mode" in call else mask, **call)  # known from now on
    with FakeTensorMode() as mode:
        features, mask, classes = inputs()
        given = {
            key: mode.from_tensor(value) if torch.is_tensor(value) else value for key, value in call.items()
        }
        for _ in range(2):
            loss = fdk.feature_discrepancy_loss(features, classes if "mode" in call else mask, **given)
            (grad,) = torch.autograd.grad(loss.sum(), features)
            assert loss.shape == ((2,) if name == "entries" else ())
            assert (grad.shape, grad.dtype) == (features.shape, features.dtype)


@pytest.mark.parametrize("taps_are", ["apart", "fused", "free"])
def test_a_training_step_without_values(taps_are):
    with FakeTensorMode():
        net = models.create("unet", base_channels=4)
        if taps_are == "free":
            fdk.fuse_norms(net)
        taps = fdk.FeatureTaps(net, net.tap_names, fused=taps_are != "apart")
        crit = fdk.FeatureDiscrepancyLoss(len(net.tap_names))
        optimizer = torch.optim.SGD([*net.parameters(), *crit.parameters()], lr=0.1)
        images, mask = torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32).round()
        for _ in range(2):
            optimizer.zero_grad()
            if taps_are == "free":
                with taps.mask(mask):
                    logits = net(images)
                loss = logits.mean() + crit(taps)
            else:
                loss = net(images).mean() + crit(taps, mask)
            loss.backward()
            optimizer.step()
        assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_mask_without_values_for_features_with_some_is_refused_by_torch():
    features, _, _ = inputs()
    with FakeTensorMode():
        _, mask, _ = inputs()
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        fdk.feature_discrepancy_loss(features, mask)


class OfTheUser(torch.Tensor):
    """A subclass like those of data libraries."""


def test_the_mask_of_a_subclass_is_checked():
    features, mask, _ = inputs()
    wanted = fdk.feature_discrepancy_loss(features, mask)
    for _ in range(2):
        assert torch.equal(fdk.feature_discrepancy_loss(features, mask.as_subclass(OfTheUser)), wanted)
        with pytest.raises(ValueError, match="divide a 0/255 mask by 255"):
            fdk.feature_discrepancy_loss(features, (mask * 255).as_subclass(OfTheUser))
