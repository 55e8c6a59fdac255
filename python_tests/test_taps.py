"""FeatureTaps: the features of any network's submodules, by name."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import fdkernels as fdk


class Net(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1 = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.enc2 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.head = nn.Conv2d(6, 1, 1)
        self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.enc2(self.enc1(images)))


def test_features_come_in_the_order_of_the_names():
    net, images = Net(), torch.randn(2, 1, 8, 8)
    with fdk.FeatureTaps(net, ["enc2", "enc1", "enc1.0"]) as taps:
        net(images)
        first, second, third = taps.features
    assert taps.names == ("enc2", "enc1", "enc1.0")
    assert first.shape == (2, 6, 4, 4)
    assert torch.equal(second, net.enc1(images))
    assert torch.equal(third, net.enc1[0](images))


def test_features_are_the_outputs_themselves_and_carry_the_gradient():
    net = Net()
    outputs = []
    net.enc1.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with fdk.FeatureTaps(net, ["enc1", "enc2"]) as taps:
        net(torch.randn(2, 1, 8, 8))
        assert taps.features[0] is outputs[0]
        fdk.feature_discrepancy_loss(taps.features, torch.rand(2, 8, 8)).backward()
    assert net.enc1[0].weight.grad.abs().max() > 0
    assert net.head.weight.grad is None


def test_the_last_forward_pass_counts():
    net = Net()
    with fdk.FeatureTaps(net, ["enc1"]) as taps:
        net(torch.randn(2, 1, 8, 8))
        net(torch.randn(3, 1, 4, 4))
        assert taps.features[0].shape == (3, 4, 4, 4)


def test_leaving_the_block_removes_the_hooks_and_keeps_the_features():
    net = Net()
    with fdk.FeatureTaps(net, ["enc1"]) as taps:
        net(torch.zeros(1, 1, 4, 4))
    kept = taps.features[0]
    net(torch.ones(2, 1, 4, 4))
    assert taps.features[0] is kept
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in net.modules())


def test_close_can_be_called_without_a_block_and_twice():
    net = Net()
    taps = fdk.FeatureTaps(net, ["enc1"])
    taps.close()
    taps.close()
    assert not net.enc1._forward_hooks


def test_the_block_ends_with_an_error_too():
    net = Net()
    with pytest.raises(KeyError), fdk.FeatureTaps(net, ["enc1"]):
        raise KeyError
    assert not net.enc1._forward_hooks


def test_clear_lets_go_of_the_features():
    net = Net()
    with fdk.FeatureTaps(net, ["enc1"]) as taps:
        net(torch.zeros(1, 1, 4, 4))
        kept = weakref.ref(taps.features[0])
        taps.clear()
        gc.collect()
        assert kept() is None
        with pytest.raises(RuntimeError, match="not run yet"):
            _ = taps.features


def test_reading_before_the_forward_pass_names_what_has_not_run():
    net = Net()
    with fdk.FeatureTaps(net, ["enc1", "unused"]) as taps:
        with pytest.raises(RuntimeError, match=r"run the network before .*not run yet: .*'enc1', 'unused'"):
            _ = taps.features
        net(torch.zeros(1, 1, 4, 4))
        with pytest.raises(RuntimeError, match=r"not run yet: \['unused'\]"):
            _ = taps.features


def test_two_taps_on_one_network_do_not_disturb_each_other():
    net = Net()
    with fdk.FeatureTaps(net, ["enc1"]) as outer:
        with fdk.FeatureTaps(net, ["enc1", "enc2"]) as inner:
            net(torch.zeros(1, 1, 4, 4))
        assert inner.features[0] is outer.features[0]
        net(torch.ones(2, 1, 4, 4))
    assert outer.features[0].shape[0] == 2
    assert inner.features[0].shape[0] == 1


def test_features_that_were_written_over_are_refused():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 1, 1))
    with fdk.FeatureTaps(net, ["1"]) as taps:
        net(torch.randn(2, 1, 8, 8))
        with pytest.raises(RuntimeError, match="the output of '1' was modified in place after it"):
            _ = taps.features
    with fdk.FeatureTaps(net, ["0", "2"]) as taps:
        net(torch.randn(2, 1, 8, 8))
        assert taps.features[1].min() == 0


def test_features_can_be_read_in_inference_mode():
    net = Net()
    with torch.inference_mode(), fdk.FeatureTaps(net, ["enc1"]) as taps:
        net(torch.randn(2, 1, 8, 8))
        assert taps.features[0].shape == (2, 4, 8, 8)


def test_networks_of_the_package_name_their_taps():
    net = fdk.models.create("unet", in_channels=1, num_classes=1, base_channels=4)
    with fdk.FeatureTaps(net, net.tap_names) as taps:
        net(torch.randn(1, 1, 32, 32))
        assert len(taps.features) == 9
        assert fdk.feature_discrepancy_loss(taps.features, torch.rand(1, 32, 32)).isfinite()


def test_a_wrapped_network_is_tapped_by_its_own_names():
    net, images = Net(), torch.randn(2, 1, 8, 8)

    class Wrapper(nn.Module):  # as DataParallel and DistributedDataParallel hold a network
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, images: Tensor) -> Tensor:
            return self.module(images)

    for wrapped in (Wrapper(net), nn.DataParallel(net)):
        with fdk.FeatureTaps(wrapped, ["enc1", "enc2"]) as taps:
            wrapped(images)
            assert torch.equal(taps.features[0], net.enc1(images))


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["enc1", "enc3"], ValueError,
         r"names must be submodules of Net, got 'enc3', which it does not have; did you mean 'enc"),
        (["encoder.layers.7"], ValueError, r"names must be submodules of Net, got 'encoder.layers.7'"),
        ([], ValueError, "names must hold at least one submodule name, got none"),
        (["enc1", "enc1"], ValueError, r"names must differ from one another, got \['enc1', 'enc1'\]"),
        ("enc1", TypeError, "names must be a sequence of submodule names, got the string 'enc1'"),
    ],
    ids=["a near miss", "nothing like it", "none", "twice", "a string"],
)  # fmt: skip
def test_wrong_names_are_refused(names, error, message):
    net = Net()
    with pytest.raises(error, match=message):
        fdk.FeatureTaps(net, names)
    assert all(not module._forward_hooks for module in net.modules())


def test_a_submodule_of_several_outputs_is_refused():
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    net = nn.Sequential(Two())
    with (
        fdk.FeatureTaps(net, ["0"]),
        pytest.raises(TypeError, match="must return one tensor, got tuple from '0'"),
    ):
        net(torch.zeros(1, 1, 2))
