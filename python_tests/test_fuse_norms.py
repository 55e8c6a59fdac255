"""fuse_norms: what is fused, what is left alone, and that training goes on as before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fdkernels as fdk
from fdkernels import models


def block(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = block(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.twice = block(
            nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4), nn.LeakyReLU(0.1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        )
        self.before = block(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
        self.nested = block(nn.Conv2d(4, 4, 1), block(nn.BatchNorm2d(4), nn.ReLU()), nn.Identity())
        self.pooled = block(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.other = block(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.sync = block(nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4), nn.ReLU())
        self.gelu = block(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GELU())
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, child in self.named_children():
            if name != "sync":
                x = child(x)
        return x


NAMES = [name for name, _ in Network().named_children()]


def test_the_report_says_what_was_fused_and_why_not():
    network = Network()
    assert fdk.fuse_norms(network, NAMES) == {
        "plain": "fused: BatchNorm2d + ReLU",
        "twice": "fused: BatchNorm2d",
        "before": "fused: ReLU + BatchNorm2d",
        "nested": "fused: BatchNorm2d + ReLU",
        "pooled": "left alone: it ends in MaxPool2d",
        "other": "left alone: ReLU follows Conv2d, no BatchNorm or InstanceNorm",
        "sync": "left alone: ReLU follows SyncBatchNorm, no BatchNorm or InstanceNorm",
        "gelu": "left alone: it ends in GELU",
        "norm": "left alone: BatchNorm2d stands in no nn.Sequential, so what stands beside it is not known",
    }
    assert isinstance(network.twice[1], fdk.NormAct)  # the pair before the last one, too
    assert isinstance(network.plain[2], nn.Identity)
    again = fdk.fuse_norms(network, ["plain", "plain.1"])
    assert again == dict.fromkeys(["plain", "plain.1"], "left alone: it is fused already")


def test_without_names_the_whole_network_is_fused_and_every_norm_is_reported():
    network = Network()
    network.groups = nn.GroupNorm(2, 4)
    assert fdk.fuse_norms(network) == {
        "plain.1": "fused: BatchNorm2d + ReLU",
        "twice.1": "fused: InstanceNorm2d + LeakyReLU",
        "twice.4": "fused: BatchNorm2d",
        "before.2": "fused: ReLU + BatchNorm2d",
        "nested.1.0": "fused: BatchNorm2d + ReLU",
        "pooled.0": "fused: BatchNorm2d + ReLU",
        "sync.1": "left alone: SyncBatchNorm is no BatchNorm or InstanceNorm of 1 to 3 dimensions",
        "gelu.1": "fused: BatchNorm2d",
        "norm": "left alone: BatchNorm2d stands in no nn.Sequential, so what stands beside it is not known",
        "groups": "left alone: GroupNorm is no BatchNorm or InstanceNorm of 1 to 3 dimensions",
    }
    assert fdk.fuse_norms(network)["twice.1"] == "left alone: it is fused already"
    assert fdk.fuse_norms(nn.Linear(2, 2)) == {}


class Collecting(nn.Sequential):
    """Keeps what an activation makes, as encoders of DenseNet do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self:
            x = child(x)
            if isinstance(child, nn.ReLU):
                self.kept = x
        return x


def test_a_sequential_with_a_forward_of_its_own_is_left_alone():
    network = nn.Sequential(Collecting(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    says = "left alone: Collecting has a forward of its own, so what "
    assert fdk.fuse_norms(network) == {"0.1": says + "follows BatchNorm2d is not known"}
    assert fdk.fuse_norms(network, ["0"]) == {"0": says + "it ends in is not known"}
    assert fdk.fuse_norms(network, [""]) == {"": "left alone: it ends in Collecting"}
    network(torch.ones(1, 3, 2, 2))
    assert network[0].kept.shape == (1, 3, 2, 2)


class Aliased(nn.Module):
    """Has its normalisation under a second name, as blocks of nnU-Net do."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.all_modules = nn.Sequential(norm, nn.LeakyReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.all_modules(x)


def test_a_norm_under_two_names_is_fused_where_it_has_no_buffers():
    torch.manual_seed(0)
    network = Aliased(nn.InstanceNorm2d(3, affine=True)).double()
    fused = copy.deepcopy(network)
    assert fdk.fuse_norms(fused, ["all_modules"]) == {"all_modules": "fused: InstanceNorm2d + LeakyReLU"}
    assert fused.norm.weight is fused.all_modules[0].weight
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(fused(x), network(x))
    assert fdk.fuse_norms(network) == {"all_modules.0": "fused: InstanceNorm2d + LeakyReLU"}
    says = "left alone: BatchNorm2d stands in several places, which share its buffers"
    assert fdk.fuse_norms(Aliased(nn.BatchNorm2d(3)), ["all_modules"]) == {"all_modules": says}
    assert fdk.fuse_norms(Aliased(nn.BatchNorm2d(3))) == {"all_modules.0": says}


def test_a_norm_in_several_places_is_left_alone_and_a_block_in_several_is_fused_once():
    norm = nn.BatchNorm2d(3)
    network = nn.ModuleList([nn.Sequential(norm, nn.ReLU()), nn.Sequential(norm, nn.ReLU())])
    says = "left alone: BatchNorm2d stands in several places, which share its buffers"
    assert fdk.fuse_norms(network) == {"0.0": says, "1.0": says}
    assert fdk.fuse_norms(network, ["0", "1"]) == {"0": says, "1": says}
    block = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    network = nn.ModuleList([block, block])
    assert fdk.fuse_norms(network) == {"0.0": "fused: BatchNorm2d + ReLU"}
    assert network[0] is network[1]


@pytest.mark.parametrize("names", [NAMES, None])
def test_the_network_computes_and_trains_as_before(names):
    torch.manual_seed(0)
    network = Network().double()
    fused = copy.deepcopy(network)
    keys = list(network.state_dict())
    fdk.fuse_norms(fused, names)
    assert list(fused.state_dict()) == keys
    x = torch.randn(3, 3, 20, 20, dtype=torch.float64)
    for net in (network, fused):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(fused.state_dict(), network.state_dict())
    torch.testing.assert_close(fused.eval()(x), network.eval()(x))
    fresh = Network().double()
    fresh.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fresh.eval()(x), network.eval()(x))


def test_a_norm_or_an_activation_may_be_named_and_hooks_are_respected():
    network = Network()
    found = fdk.fuse_norms(network, ["plain.1", "twice.2"])
    assert found == {"plain.1": "fused: BatchNorm2d + ReLU", "twice.2": "fused: InstanceNorm2d + LeakyReLU"}
    network = Network()
    network.plain[1].register_forward_hook(lambda *_: None)
    found = fdk.fuse_norms(network, ["plain"])
    assert found == {"plain": "left alone: BatchNorm2d has hooks, which would not run"}
    assert isinstance(network.plain[1], nn.BatchNorm2d)


def test_an_activation_between_two_norms_belongs_to_the_first():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    assert fdk.fuse_norms(network, [""]) == {"": "fused: BatchNorm2d"}
    assert [type(module) for module in network] == [fdk.NormAct, nn.Identity, fdk.NormAct]
    assert network[0].formula.activation == "relu"
    assert network[2].formula.activation == "none"


@pytest.mark.parametrize("name", models.names())
def test_the_networks_of_the_package(name):
    torch.manual_seed(0)
    network = models.create(name, base_channels=4).double()
    fused = copy.deepcopy(network)
    report = fdk.fuse_norms(fused)
    assert report
    assert all(said.startswith("fused") for said in report.values())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(fused(x), network(x))
    torch.testing.assert_close(fused.state_dict(), network.state_dict())


def test_wrong_names():
    with pytest.raises(
        TypeError, match="names must be a sequence of submodule names, got the string 'plain'"
    ):
        fdk.fuse_norms(Network(), "plain")
    with pytest.raises(ValueError, match=r"names must be submodules of Network, got 'plane'.*did you mean"):
        fdk.fuse_norms(Network(), ["plane"])
