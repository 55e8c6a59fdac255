"""unfuse_norms: torch's own modules back in their places, for code that looks for them."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import fdkernels as fdk
from fdkernels import models


def network() -> nn.Sequential:
    torch.manual_seed(0)
    named = OrderedDict(conv=nn.Conv2d(4, 4, 1), act=nn.LeakyReLU(0.1), norm=nn.BatchNorm2d(4, momentum=None))
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3), nn.ReLU(inplace=True)),
        nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4, affine=True), nn.Identity(), nn.LeakyReLU(0.2)
        ),
        nn.Sequential(named),
        nn.InstanceNorm2d(4, momentum=0.3, track_running_stats=True),
        nn.BatchNorm2d(4, affine=False, track_running_stats=False),
    )


def train(net: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found = []
    for _ in range(3):
        out = net.train()(torch.randn(2, 3, 8, 8))
        optimizer.zero_grad()
        out.square().mean().backward()
        optimizer.step()
        found.append(out.detach())
    return [*found, net.eval()(torch.randn(2, 3, 8, 8)).detach(), *net.state_dict().values()]


def test_what_was_fused_is_torchs_own_again():
    net = network()
    fused = copy.deepcopy(net)
    fdk.fuse_norms(fused)
    parameters = [*fused.parameters()]
    fused[3].eval()
    assert fdk.unfuse_norms(fused) == {
        "0.1": "unfused: BatchNorm2d + ReLU",
        "1.1": "unfused: InstanceNorm2d + LeakyReLU",
        "2.norm": "unfused: LeakyReLU + BatchNorm2d",
        "3": "unfused: InstanceNorm2d",
        "4": "unfused: BatchNorm2d",
    }
    assert not any(isinstance(module, fdk.NormAct) for module in fused.modules())
    assert [module.training for module in fused[2:]] == [True, False, True]
    assert all(one is other for one, other in zip(fused.parameters(), parameters, strict=True))
    assert [*fused.state_dict()] == [*net.state_dict()]
    for one, other in zip(fused, net, strict=True):
        if not isinstance(one, nn.Sequential):
            assert str(one) == str(other)
    assert str(fused[0][1]) == str(net[0][1])
    assert str(fused[2]) == str(net[2])
    for found, wanted in zip(train(fused), train(net), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", models.names())
def test_the_networks_of_the_package_compute_as_before(name):
    torch.manual_seed(0)
    net = models.create(name, base_channels=4)
    wanted = {key: type(module) for key, module in net.named_modules()}
    fused = copy.deepcopy(net)
    report = fdk.fuse_norms(fused)
    back = fdk.unfuse_norms(fused)
    assert {path for path, said in report.items() if said.startswith("fused")} == {*back}
    assert {key: type(module) for key, module in fused.named_modules()} == wanted
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(fused(x), net(x))
    assert fdk.unfuse_norms(fused) == {}


def test_running_statistics_of_an_averaged_network_are_found():
    net = network()
    batches = [torch.randn(2, 3, 8, 8) for _ in range(3)]
    averaged = torch.optim.swa_utils.AveragedModel(net)
    fdk.fuse_norms(net)
    of_fused = torch.optim.swa_utils.AveragedModel(net)
    fdk.unfuse_norms(of_fused)
    for model in (averaged, of_fused):
        torch.optim.swa_utils.update_bn(batches, model)
    for found, wanted in zip(of_fused.state_dict().values(), averaged.state_dict().values(), strict=True):
        assert torch.equal(found, wanted)


def test_batch_norms_of_all_devices_can_be_made():
    net = network()
    fdk.fuse_norms(net)
    fdk.unfuse_norms(net)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in synced.modules()) == 3
    assert isinstance(synced[0][2], nn.ReLU)


def test_what_has_no_place_for_its_activation_is_left_alone():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = fdk.NormAct(nn.BatchNorm1d(3))
            self.both = fdk.NormAct(nn.BatchNorm1d(3), nn.ReLU())
            self.chain = nn.Sequential(fdk.NormAct(nn.BatchNorm1d(3), nn.ReLU()), nn.Linear(3, 3))
            self.hooked = fdk.NormAct(nn.BatchNorm3d(3))

    block = Block()
    block.hooked.register_forward_hook(lambda *_: None)
    nowhere = "left alone: no nn.Identity stands beside it in an nn.Sequential, to become its ReLU"
    assert fdk.unfuse_norms(block) == {
        "plain": "unfused: BatchNorm1d",
        "both": nowhere,
        "chain.0": nowhere,
        "hooked": "left alone: it has hooks, which would not run",
    }
    assert isinstance(block.both, fdk.NormAct)
