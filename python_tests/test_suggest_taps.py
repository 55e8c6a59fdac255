"""suggest_taps: the last map of each resolution, by names that FeatureTaps takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fdkernels as fdk

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def block(dims: int, a: int, b: int, stride: int | tuple[int, ...] = 1, inplace: bool = True) -> nn.Module:
    return nn.Sequential(CONVS[dims](a, b, 3, stride, 1), NORMS[dims](b), nn.ReLU(inplace))


class UNet(nn.Module):
    """Three resolutions in any number of dimensions; the maps are joined by functions."""

    def __init__(self, dims: int, stride: int | tuple[int, ...] = 2, classes: int = 2) -> None:
        super().__init__()
        self.down1, self.down2 = block(dims, 1, 4), block(dims, 4, 6, stride)
        self.bottom = block(dims, 6, 8, stride)
        self.up2, self.up1 = block(dims, 14, 6), block(dims, 10, 4)
        self.head = CONVS[dims](4, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        d1 = self.down1(x)
        d2 = self.down2(d1)
        b = self.bottom(d2)
        u2 = self.up2(torch.cat([d2, F.interpolate(b, d2.shape[2:])], 1))
        return self.head(self.up1(torch.cat([d1, F.interpolate(u2, d1.shape[2:])], 1)))


PLACES = ["down1", "down2", "bottom", "up2", "up1"]


def names(net: nn.Module, example: Any, **options: Any) -> list[str]:
    """The suggested names, after a look at whether they can be tapped for a loss."""
    suggested = fdk.suggest_taps(net, example, **options)
    with fdk.FeatureTaps(net, suggested.names, fused=True) as taps:
        net(*example) if isinstance(example, tuple) else net(example)
        assert [tuple(features.shape) for features in taps.features] == [tap.shape for tap in suggested.taps]
        assert [features.nbytes for features in taps.features] == [tap.bytes for tap in suggested.taps]
    return suggested.names


@pytest.mark.parametrize("name", fdk.models.names())
@pytest.mark.parametrize("classes", [1, 4])
def test_the_networks_of_the_package_have_the_taps_that_they_name(name, classes):
    net = fdk.models.create(name, in_channels=3, num_classes=classes, base_channels=4)
    suggested = fdk.suggest_taps(net, torch.randn(1, 3, 32, 64))
    assert suggested.names == net.tap_names
    assert [tap.stride for tap in suggested.taps] == [(2**n, 2**n) for n in (0, 1, 2, 3, 4, 3, 2, 1, 0)]


@pytest.mark.parametrize("size", [(32,), (16, 24), (18, 13), (8, 16, 16)])
def test_each_resolution_is_tapped_once_down_and_once_up(size):
    net = UNet(len(size))
    assert names(net, torch.randn(2, 1, *size)) == PLACES
    (first, *_, last) = fdk.suggest_taps(net, torch.randn(2, 1, *size)).taps
    assert first.stride == last.stride == (1,) * len(size)
    assert first.channels == 4


def test_an_axis_may_be_halved_less_often():
    net = UNet(3, (1, 2, 2))
    assert names(net, torch.randn(2, 1, 4, 16, 16)) == PLACES
    assert fdk.suggest_taps(net, torch.randn(2, 1, 4, 16, 16)).taps[2].stride == (1, 4, 4)


def test_convolutions_without_padding_do_not_change_the_resolution():
    def valid(a: int, b: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3), nn.ReLU(), nn.Conv2d(b, b, 3), nn.ReLU())

    net = nn.Sequential(
        valid(1, 4), nn.MaxPool2d(2), valid(4, 6), nn.MaxPool2d(2), valid(6, 8), nn.Upsample(scale_factor=2),
        valid(8, 6), nn.Upsample(scale_factor=2), valid(6, 4), nn.Conv2d(4, 1, 1),
    )  # fmt: skip
    assert names(net, torch.randn(1, 1, 92, 92)) == ["0", "2", "4", "6", "8"]


class Residual(nn.Module):
    """The output is modified by the sum and then by an activation in place, as torchvision's blocks do."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 1), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, stride, 1), nn.BatchNorm2d(b)
        self.short = nn.Conv2d(a, b, 1, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.short(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Residual(4, 4, 1), Residual(4, 4, 1))
        self.layer2 = nn.Sequential(Residual(4, 8, 2), Residual(8, 8, 1))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

    def features(self, x: Tensor) -> list[Tensor]:
        stem = self.relu(self.bn1(self.conv1(x)))
        first = self.layer1(self.maxpool(stem))
        return [stem, first, self.layer2(first)]

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.avgpool(self.features(x)[-1]).flatten(1))


class Pyramid(ResNet):
    def forward(self, x: Tensor) -> list[Tensor]:
        return self.features(x)


@pytest.mark.parametrize("make", [ResNet, Pyramid])
def test_an_encoder_is_tapped_at_the_ends_of_its_blocks(make):
    suggested = fdk.suggest_taps(make(), torch.randn(2, 3, 64, 64))
    assert suggested.names == ["relu", "layer1", "layer2"]
    if make is ResNet:
        assert suggested.left_out["avgpool"] == "one pixel"
    assert suggested.left_out["layer2.0.bn1"] == "modified in place afterwards, 'layer2.0.relu'"
    assert suggested.left_out["layer2.0.bn2"] == "modified in place afterwards, 'layer2.0'"
    assert suggested.left_out["layer1.0"] == "before the last of its resolution, 'layer1'"
    assert suggested.left_out["layer2.1"] == "the tensor of another name, 'layer2'"


def test_a_network_around_an_encoder_is_tapped_inside():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = ResNet()
            self.up = block(2, 8, 6)
            self.head = nn.Conv2d(6, 3, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            deep = self.encoder.features(x)[-1]
            logits = self.head(self.up(F.interpolate(deep, scale_factor=2)))
            return {"out": F.interpolate(logits, x.shape[2:])}

    suggested = fdk.suggest_taps(Around(), torch.randn(2, 3, 64, 64))
    assert suggested.names == ["encoder.relu", "encoder.layer1", "encoder.layer2", "up"]
    assert suggested.left_out["head"] == "logits"


@dataclasses.dataclass
class Maps:
    fine: Tensor
    more: list[Tensor]


def test_what_only_a_structure_holds_is_named_by_its_path():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 1, 3, 3))

        def forward(self, x: Tensor) -> Maps:
            fine = F.conv2d(x, self.weight, padding=1).relu()
            return Maps(fine, [F.avg_pool2d(fine, 2), F.avg_pool2d(fine, 4)])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = Encoder(), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x).more[1])

    wanted = ["encoder:fine", "encoder:more.0", "encoder:more.1"]
    assert names(Net(), torch.randn(2, 1, 16, 16)) == wanted
    assert names(Encoder(), torch.randn(2, 1, 16, 16)) == [":fine", ":more.0", ":more.1"]


def test_deep_supervision_is_no_feature():
    class Deep(UNet):
        def __init__(self) -> None:
            super().__init__(2)
            self.aux = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            d1 = self.down1(x)
            d2 = self.down2(d1)
            u2 = self.up2(torch.cat([d2, F.interpolate(self.bottom(d2), d2.shape[2:])], 1))
            u1 = self.up1(torch.cat([d1, F.interpolate(u2, d1.shape[2:])], 1))
            return [self.head(u1), self.aux(u2)]

    suggested = fdk.suggest_taps(Deep(), torch.randn(2, 1, 16, 16))
    assert suggested.names == PLACES
    assert suggested.left_out["aux"] == suggested.left_out["head"] == "logits"


def test_what_changes_in_place_afterwards_is_named_by_what_changes_it_or_left_out():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)
            self.third, self.act = (
                nn.Conv2d(6, 8, 3, 2, 1),
                nn.Sequential(nn.ReLU(inplace=True), nn.Identity()),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.first(x).relu_())
            return self.act(self.third(x)).mean((2, 3))

    suggested = fdk.suggest_taps(Net(), torch.randn(2, 1, 16, 16))
    assert suggested.names == ["second", "act"]
    assert suggested.left_out["first"] == "modified in place afterwards by no submodule"
    assert suggested.left_out["third"] == "modified in place afterwards, 'act'"


def test_an_in_place_dropout_that_evaluation_skips_names_the_map():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout2d(inplace=True), nn.Conv2d(4, 1, 1)).train()
    assert names(net, torch.randn(2, 1, 8, 8)) == ["1"]
    net[1].inplace = False
    assert names(net, torch.randn(2, 1, 8, 8)) == ["0"]


def test_what_is_no_map_of_the_image_is_left_out_and_why_is_said():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Conv2d(1, 8, 4, 4), nn.Linear(8, 8)
            self.windows, self.index, self.never = nn.Identity(), nn.Identity(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            maps = self.embed(x)
            tokens = self.mix(maps.flatten(2).transpose(1, 2))
            self.windows(maps.reshape(-1, 8, 2, 2))
            self.index(maps.argmax(1, keepdim=True))
            return tokens.mean(1)

    left_out = fdk.suggest_taps(Tokens(), torch.randn(2, 1, 16, 16)).left_out
    assert left_out["mix"] == "a sequence without a spatial shape"
    assert left_out["windows"] == "a batch of 8, not of 2"
    assert left_out["index"] == "holds int64"
    assert left_out["never"] == "did not run"


def test_what_runs_several_times_is_left_out():
    class Twice(UNet):
        def forward(self, x: Tensor) -> Tensor:
            self.up1(torch.zeros(2, 10, 16, 16))
            return super().forward(x)

    suggested = fdk.suggest_taps(Twice(2), torch.randn(2, 1, 16, 16))
    assert suggested.names == PLACES[:-1]
    assert suggested.left_out["up1"] == "runs 2 times in a forward pass"


def test_maps_with_the_channels_last_are_marked():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Conv2d(1, 12, 4, 4), nn.LayerNorm(12)
            self.merge, self.head = nn.Linear(48, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.embed(x).permute(0, 2, 3, 1))  # [N, 8, 8, 12]
            x = self.merge(x.unflatten(1, (4, 2)).unflatten(3, (4, 2)).transpose(2, 3).flatten(3))
            return self.head(x.mean((1, 2)))

    net, images = Last(), torch.randn(2, 1, 32, 32)
    suggested = fdk.suggest_taps(net, images)
    assert suggested.channel_dim == -1
    assert suggested.names == ["norm", "merge"]
    assert [tap.channels for tap in suggested.taps] == [12, 16]
    assert [tap.stride for tap in suggested.taps] == [(4, 4), (8, 8)]
    assert "channel_dim=-1" in str(suggested)
    crit = fdk.FeatureDiscrepancyLoss(2, channel_dim=suggested.channel_dim)
    with fdk.FeatureTaps(net, suggested.names) as taps:
        net(images)
        assert crit(taps, torch.rand(2, 32, 32)).isfinite()


class Checked(UNet):
    """Draws random numbers and has a mode, buffers and hooks that a run must not change."""

    def __init__(self) -> None:
        super().__init__(2)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        x = x + torch.rand_like(x)
        if self.fails:
            raise OverflowError("the forward fails")
        return super().forward(x)


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_and_the_random_numbers_are_left_as_they_were(fails):
    net = Checked().train()
    net.down2.eval()
    net.fails = fails
    modes = {name: module.training for name, module in net.named_modules()}
    state = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(OverflowError):
            fdk.suggest_taps(net, torch.ones(2, 1, 16, 16))
    else:
        assert fdk.suggest_taps(net, torch.ones(2, 1, 16, 16)).names == PLACES
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_an_example_may_be_a_tuple_or_a_dict_of_inputs():
    class Two(UNet):
        def forward(self, scale: Tensor, x: Tensor) -> Tensor:
            return super().forward(scale * x)

    scale, x = torch.tensor(2.0), torch.randn(2, 1, 16, 16)
    assert names(Two(2), (scale, x)) == PLACES
    assert fdk.suggest_taps(Two(2), {"x": x, "scale": scale}).names == PLACES


def test_a_wrapped_network_has_its_own_names():
    assert fdk.suggest_taps(nn.DataParallel(UNet(2)), torch.randn(2, 1, 16, 16)).names == PLACES


def test_a_compiled_network_is_not_compiled_for_it_and_sees_taps_that_are_set_later():
    torch.compiler.reset()
    graphs = []
    net, images = UNet(2), torch.randn(2, 1, 16, 16)
    fast = torch.compile(net, backend=lambda graph, _: graphs.append(1) or graph, fullgraph=True)
    suggested = fdk.suggest_taps(fast, images)
    assert suggested.names == PLACES
    assert graphs == []
    with fdk.FeatureTaps(fast, suggested.names) as taps:
        fast(images)
        assert len(taps.features) == 5
    assert graphs == [1]
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("max_taps", "wanted"),
    [(9, PLACES), (5, PLACES), (3, ["down1", "bottom", "up1"]), (2, ["down1", "up1"]), (1, ["bottom"])],
)
def test_max_taps_keeps_some_from_end_to_end(max_taps, wanted):
    suggested = fdk.suggest_taps(UNet(2), torch.randn(2, 1, 16, 16), max_taps)
    assert suggested.names == wanted
    left = set(PLACES) - set(wanted)
    assert all(suggested.left_out[name] == f"max_taps={max_taps} leaves no room" for name in left)


def test_wrong_arguments_are_refused():
    net, images = UNet(2), torch.randn(2, 1, 16, 16)
    with pytest.raises(ValueError, match="max_taps must be at least 1, got 0"):
        fdk.suggest_taps(net, images, 0)
    with pytest.raises(TypeError, match="max_taps must be an integer or None, got float"):
        fdk.suggest_taps(net, images, 2.0)
    with pytest.raises(ValueError, match=r"an image \[N, C, \*S\] with .*, got \[16, 16\]"):
        fdk.suggest_taps(net, images[0, 0])


def test_the_table():
    suggested = fdk.suggest_taps(UNet(2), torch.randn(2, 1, 16, 24), 2)
    assert (
        str(suggested)
        == """\
2 taps of UNet for an input of [2, 1, 16, 24], in the order in which they run

name   shape           stride  channels   bytes
down1  [2, 4, 16, 24]     1x1         4  12,288
up1    [2, 4, 16, 24]     1x1         4  12,288

left out:
  modified in place afterwards: down1.1, down2.1, bottom.1, up2.1, up1.1
  the tensor of another name: down1.2, down2.2, bottom.2, up2.2, up1.2
  logits: head, ""
  before the last of its resolution: down1.0, down2.0, bottom.0, up2.0, up1.0
  max_taps=2 leaves no room: down2, bottom, up2"""
    )


def test_a_detour_to_the_coarsest_resolution_within_a_block_is_not_the_turn():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x * F.interpolate(self.gate(x), x.shape[2:]).sigmoid()

    class Net(UNet):
        def __init__(self) -> None:
            super().__init__(2)
            self.down1 = Gated()

    suggested = fdk.suggest_taps(Net(), torch.randn(2, 1, 16, 16))
    assert suggested.names == PLACES
    assert suggested.left_out["down1.gate"] == "within what returns another resolution or logits, 'down1'"


def test_logits_that_a_function_makes_larger_and_maps_of_attention_are_left_out():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.soft = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1), nn.Softmax(-1)

        def forward(self, x: Tensor) -> Tensor:
            self.soft(torch.ones(2, 4, 65, 16))
            return self.one(x) + self.other(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = block(2, 1, 4, 2), Head()

        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(self.head(self.body(x)), x.shape[2:])

    suggested = fdk.suggest_taps(Net(), torch.randn(2, 1, 16, 16))
    assert suggested.names == ["body"]
    assert suggested.left_out["head"] == suggested.left_out["head.one"] == "logits"
    assert suggested.left_out["head.soft"] == "not the aspect of the image"
