"""FeatureTaps: outputs that the next layer writes over are refused by name, with what to tap instead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fdkernels as fdk


class Block(nn.Module):
    """conv1, bn1, act1, conv2, bn2, a sum in place, act2: as timm's and torchvision's blocks."""

    def __init__(self, functional: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.conv2, self.bn2 = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.act1, self.act2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn1(self.conv1(x))
        first = F.leaky_relu_(first) if self.functional else self.act1(first)
        out = self.bn2(self.conv2(first))
        out += x
        return self.act2(out)


class Norm(nn.Module):
    """As nnU-Net's blocks: conv, norm, nonlin, run as a Sequential of the same modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3), nn.InstanceNorm2d(2)
        self.nonlin = nn.LeakyReLU(inplace=True)
        self.all_modules = nn.Sequential(self.conv, self.norm, self.nonlin)

    def forward(self, x: Tensor) -> Tensor:
        return self.all_modules(x)


def images() -> Tensor:
    return torch.randn(2, 2, 8, 8)


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Conv2d(2, 1, 1))


def nested() -> nn.Module:
    down = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))
    return nn.Sequential(down, nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(2, 1, 1)))


CASES = {
    "Sequential": (plain, "1", "'2', which modifies it, or give '2' inplace=False"),
    "timm": (lambda: nn.Sequential(Block()), "0.bn1", "'0.act1', which modifies it"),
    "a sum, then timm": (lambda: nn.Sequential(Block()), "0.bn2", "'0.act2', which modifies it"),
    "nnU-Net": (lambda: nn.ModuleDict({"enc": Norm()})["enc"], "norm", "'nonlin', which modifies it"),
    "the end of a block": (nested, "0.1", "'1.0', which modifies it"),
    "a whole block": (nested, "0", "'1.0', which modifies it"),
    "a function": (
        lambda: nn.Sequential(Block(functional=True)),
        "0.bn1",
        r"what modified it \(such as an in-place activation\) or the block '0', or set inplace=False",
    ),
}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_a_change_in_place_by_a_later_layer_is_refused_with_what_to_tap_instead(case, fused):
    make, name, instead = CASES[case]
    net = make()
    with (
        fdk.FeatureTaps(net, [name], fused=fused) as taps,
        pytest.raises(
            RuntimeError,
            match=f"the output of '{name}' was modified in place after it was recorded; tap {instead}",
        ),
    ):
        _ = net(images()), taps.features


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(("make", "name"), [(plain, "2"), (Block, "act1"), (Block, "act2"), (Norm, "nonlin")])
def test_the_in_place_activation_itself_can_be_tapped(make, name, fused):
    net = make()
    seen = []
    net.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    with fdk.FeatureTaps(net, [name], fused=fused) as taps:
        out = net(images())
        assert torch.equal(taps.features[0], seen[0])
        (out.sum() + fdk.feature_discrepancy_loss(taps, torch.rand(2, 8, 8), eps=0.1)).backward()


def test_in_place_under_fused_taps_is_an_error_of_the_forward():
    net = plain()
    with (
        fdk.FeatureTaps(net, ["1"], fused=True),
        pytest.raises(RuntimeError, match=r"the output of '1' was modified in place .* tap '2'"),
    ):
        net(images())


def test_a_layer_in_place_beside_a_tap_is_not_taken_for_a_change():
    net = nn.Sequential(
        nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Dropout(inplace=True)
    )
    with fdk.FeatureTaps(net, ["0"]) as taps:
        net(images())
        assert len(taps.features) == 1
    with torch.inference_mode(), fdk.FeatureTaps(net.eval(), ["2"]) as taps:
        net(images())  # dropout changes nothing in evaluation
        assert len(taps.features) == 1


@pytest.mark.parametrize("how", ["compiled", "inference"])
def test_where_torch_counts_no_changes_the_layer_in_place_is_seen_by_what_it_takes(how):
    net = plain()
    torch.compiler.reset()
    call = torch.compile(net, backend="aot_eager", fullgraph=True) if how == "compiled" else net
    with fdk.FeatureTaps(call, ["1"]) as taps, torch.inference_mode(how == "inference"):
        for _ in range(2):
            call(images())
            with pytest.raises(
                RuntimeError, match=r"the output of '1' was modified in place .* tap '2', which"
            ):
                _ = taps.features
        net[2].inplace = False
        call(images())
        assert taps.features[0].min() < 0


@pytest.mark.parametrize(
    ("make", "name", "similar"),
    [
        (Block, "norm1", ""),
        (Block, "bn3", "; did you mean 'bn2', 'act2', 'bn1', 'act1'[?]"),
        (lambda: nn.Sequential(Block()), "0.bn", "; did you mean '0.bn2', '0.act2', '0.bn1', '0.act1'"),
        (lambda: nn.DataParallel(Block()), "bn3", "; did you mean 'bn2', 'act2', 'bn1', 'act1'[?]"),
        (Norm, "normal", "; did you mean 'norm', 'nonlin'"),
    ],
)
def test_a_close_name_comes_with_the_activation_that_writes_over_it(make, name, similar):
    with pytest.raises(ValueError, match=rf"got '{name}', which it does not have{similar}"):
        fdk.FeatureTaps(make(), [name])
