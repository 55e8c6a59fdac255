"""The loss for MONAI's engines, which needs no MONAI; the engines themselves are among the clients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fdkernels as fdk
from fdkernels.integrations.monai import TappedLoss

NAMES = ["0", "2"]
CLASSES = {"mode": "multiclass", "num_classes": 3}


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 3, 3, 2, 1), nn.Upsample((8, 8)))


def criterion(**options: object) -> fdk.FeatureDiscrepancyLoss:
    return fdk.FeatureDiscrepancyLoss(2, alpha_init=0.4, **options)


def targets(mode: str) -> Tensor:
    indices = torch.randint(0, 3, (2, 1, 8, 8))
    if mode == "binary":
        return (indices > 0).float()
    if mode == "one-hot":
        return nn.functional.one_hot(indices[:, 0], 3).movedim(-1, 1).float()
    return indices.float() if mode == "float indices" else indices


@pytest.mark.parametrize("mode", ["binary", "indices", "float indices", "one-hot"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_it_adds_the_criterion_to_the_loss(mode, fused):
    images, target, net = torch.randn(2, 1, 8, 8), targets(mode), network()
    crit = criterion(**({} if mode == "binary" else CLASSES))
    loss = TappedLoss(
        lambda output, truth: output.square().mean(), crit, fdk.FeatureTaps(net, NAMES, fused=fused)
    )
    value = loss(net(images), target)
    value.backward()
    found = [each.grad.clone() for each in net.parameters()]

    net.zero_grad()
    taps = fdk.FeatureTaps(net, NAMES)
    output = net(images)
    mask = target.long() if mode == "float indices" else target
    with fdk.use_backend("reference"):
        truth = output.square().mean() + copy.deepcopy(crit)(taps.features, mask)
        truth.backward()
    torch.testing.assert_close(value, truth)
    for ours, theirs in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad)


def test_the_mask_may_be_within_the_target():
    net = network()
    loss = TappedLoss(
        lambda output, target: output.mean(),
        criterion(),
        fdk.FeatureTaps(net, NAMES),
        lambda target: target["mask"],
    )
    assert loss(net(torch.randn(2, 1, 8, 8)), {"mask": targets("binary")}).isfinite()


def test_features_serve_once():
    net = network()
    loss = TappedLoss(lambda output, target: output.mean(), criterion(), fdk.FeatureTaps(net, NAMES))
    output = net(torch.randn(2, 1, 8, 8))
    loss(output, targets("binary"))
    with pytest.raises(RuntimeError, match="run the network before reading features"):
        loss(output, targets("binary"))


def test_the_state_holds_alpha():
    net = network()
    first, second = (TappedLoss(nn.BCELoss(), criterion(), fdk.FeatureTaps(net, NAMES)) for _ in range(2))
    with torch.no_grad():
        first.criterion.alpha.copy_(torch.tensor([0.1, 0.9]))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.criterion.alpha, first.criterion.alpha)
    assert all(name.startswith("criterion.") for name in first.state_dict())
