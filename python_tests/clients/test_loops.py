"""Other people's training loops take the loss: MONAI's engine, accelerate, MetaTensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fdkernels as fdk
from client_packages import client
from fdkernels.integrations.monai import TappedLoss

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore:(?!alpha|the feature disc)")]

ITEMS = 6


def items(as_dict: bool) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(ITEMS, 1, 16, 16, generator=generator)
    masks = torch.randint(0, 3, (ITEMS, 1, 16, 16), generator=generator).float()
    return [
        {"image": image, "label": mask} if as_dict else (image, mask)
        for image, mask in zip(images, masks, strict=True)
    ]


def unet() -> nn.Module:
    torch.manual_seed(2)
    return client("monai.networks.nets").UNet(2, 1, 3, channels=(4, 8, 16), strides=(2, 2))


def criterion(count: int) -> fdk.FeatureDiscrepancyLoss:
    return fdk.FeatureDiscrepancyLoss(count, mode="multiclass", num_classes=3, alpha_init=0.3, target=-5.0)


def names_of(net: nn.Module) -> list[str]:
    return fdk.suggest_taps(net, torch.zeros(1, 1, 16, 16)).names


def optimizer_of(net: nn.Module, crit: fdk.FeatureDiscrepancyLoss) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": net.parameters()}, *crit.parameter_groups(lr=1e-3)], lr=0.05)


def by_hand(epochs: int) -> tuple[nn.Module, fdk.FeatureDiscrepancyLoss]:
    """A loop with plain features and the reference."""
    net = unet()
    crit = criterion(len(names_of(net)))
    segmentation_loss = client("monai.losses").DiceCELoss(softmax=True, to_onehot_y=True)
    optimizer, taps = optimizer_of(net, crit), fdk.FeatureTaps(net, names_of(net))
    for _ in range(epochs):
        for images, masks in DataLoader(items(False), batch_size=2):
            optimizer.zero_grad()
            loss = segmentation_loss(net(images), masks)
            with fdk.use_backend("reference"):
                (loss + crit(taps.features, masks.long())).backward()
            optimizer.step()
    return net, crit


def assert_same(net: nn.Module, crit: fdk.FeatureDiscrepancyLoss) -> None:
    truth, crit_of_truth = by_hand(2)
    torch.testing.assert_close(crit.alpha, crit_of_truth.alpha)
    assert (crit.alpha > 0.3).all()
    for ours, theirs in zip(net.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("as_meta", [False, True], ids=["tensors", "MetaTensors"])
def test_supervised_trainer_gives_what_a_loop_gives(as_meta):
    client("ignite")
    engines, losses, data = client("monai.engines"), client("monai.losses"), client("monai.data")
    net = unet()
    names = names_of(net)
    crit = criterion(len(names))
    taps = fdk.FeatureTaps(net, names, fused=True)
    loss = TappedLoss(losses.DiceCELoss(softmax=True, to_onehot_y=True), crit, taps)

    def prepare(batch: Any, device: Any, non_blocking: bool, **_: Any) -> tuple[Tensor, Tensor]:
        wrap = data.MetaTensor if as_meta else torch.as_tensor
        return wrap(batch["image"]), wrap(batch["label"])

    engines.SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=2, train_data_loader=DataLoader(items(True), batch_size=2),
        network=net, optimizer=optimizer_of(net, crit), loss_function=loss, prepare_batch=prepare,
    ).run()  # fmt: skip
    assert_same(net, crit)


def test_accelerate_gives_what_a_loop_gives():
    accelerator = client("accelerate").Accelerator(cpu=True)
    segmentation_loss = client("monai.losses").DiceCELoss(softmax=True, to_onehot_y=True)
    net = unet()
    names = names_of(net)
    crit = criterion(len(names)).to(accelerator.device)
    net, optimizer, loader = accelerator.prepare(
        net, optimizer_of(net, crit), DataLoader(items(False), batch_size=2)
    )
    taps = fdk.FeatureTaps(net, names, fused=True)
    for _ in range(2):
        for images, masks in loader:
            optimizer.zero_grad()
            accelerator.backward(segmentation_loss(net(images), masks) + crit(taps, masks))
            optimizer.step()
    assert_same(net, crit)
    assert crit.alpha.device == torch.device("cpu")
