"""FeatureTaps: copies and files of a tapped network have neither its features nor its taps."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fdkernels as fdk


def make() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 1, 1))


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64)


def saved(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


HOW: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "AveragedModel": AveragedModel,
    "EMA": lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": saved,
}
each_way = pytest.mark.parametrize("how", HOW)
both = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


@both
@each_way
def test_a_tapped_network_is_copied_and_its_copy_leaves_the_taps_alone(how, fused):
    net = make()
    taps = fdk.FeatureTaps(net, ["0", "2"], fused=fused)
    net(images())
    before = taps.features
    twin = HOW[how](net)
    assert all(torch.equal(*pair) for pair in zip(net.parameters(), twin.parameters(), strict=True))
    twin(images()).sum().backward()
    assert all(one is other for one, other in zip(taps.features, before, strict=True))
    with fdk.FeatureTaps(twin, ["0", "2"], fused=fused) as others:
        out = twin(images())
        assert torch.equal(
            twin.get_submodule("module" if hasattr(twin, "module") else "")[3](others.features[1]), out
        )
    net(images())
    assert taps.features[0] is not before[0]
    taps.close()


@both
@each_way
def test_a_copy_can_be_made_within_a_forward_or_before_one(how, fused):
    net = make()
    twins = []
    with fdk.FeatureTaps(net, ["0"], fused=fused) as taps:
        twins.append(HOW[how](net))
        handle = net[2].register_forward_pre_hook(lambda *_: twins.append(copy.deepcopy(net[0])))
        net(images())
        handle.remove()
        for twin in twins:
            twin(images())
        assert len(taps.features) == 1


def test_a_file_of_a_tapped_network_has_no_features_in_it():
    net = make()
    taps = fdk.FeatureTaps(net, ["0", "2"])
    small = len(pickle.dumps(net))
    net(images())
    assert sum(features.nbytes for features in taps.features) > 200_000
    assert abs(len(pickle.dumps(net)) - small) < 1000


def test_the_average_of_a_tapped_network_follows_it_from_step_to_step():
    net = make()
    taps = fdk.FeatureTaps(net, ["0"], fused=True)
    average = AveragedModel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        loss = net(images()).mean() + fdk.feature_discrepancy_loss(taps, torch.rand(2, 64, 64), eps=0.1)
        loss.backward()
        optimizer.step()
        average.update_parameters(net)
    assert torch.isfinite(average(images())).all()
    assert len(taps.features) == 1


class Trained(nn.Module):
    """Holds network, criterion and taps, as a training module may."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.crit = make(), fdk.FeatureDiscrepancyLoss(2, alpha_init=0.5, eps=0.1)
        self.taps = fdk.FeatureTaps(self.net, ["0", "2"], fused=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mean() + self.crit(self.taps, torch.ones(2, 64, 64))


@each_way
def test_what_holds_network_criterion_and_taps_is_copied_without_the_taps(how):
    module = Trained()
    module(images()).backward()
    before = module.taps.features
    twin = HOW[how](module)
    twin = twin.module if isinstance(twin, AveragedModel) else twin
    with pytest.raises(
        RuntimeError, match=r"these taps are a copy, .*: FeatureTaps\(network, \['0', '2'\]\)"
    ):
        twin(images())
    assert all(one is other for one, other in zip(module.taps.features, before, strict=True))
    twin.taps.close()
    twin.taps = fdk.FeatureTaps(twin.net, twin.taps.names)
    assert torch.isfinite(twin(images()))


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda taps: pickle.loads(pickle.dumps(taps))])
def test_a_copy_of_taps_says_that_it_has_no_network(how):
    net = make()
    with fdk.FeatureTaps(net, ["0"]) as taps:
        net(images())
        twin = how(taps)
        for read in (
            lambda: twin.features,
            lambda: fdk.feature_discrepancy_loss(twin, torch.ones(2, 64, 64)),
        ):
            with pytest.raises(RuntimeError, match="these taps are a copy, which has no network"):
                read()
        twin.clear()
        twin.close()
        assert net[0]._forward_hooks
        assert len(taps.features) == 1


@both
def test_a_deleted_network_is_freed_though_its_taps_live_and_were_read(fused):
    net = make()
    taps = fdk.FeatureTaps(net, ["0"], fused=fused)
    net(images())
    gone = weakref.ref(net), weakref.ref(net[0])
    assert len(taps.features) == 1
    del net
    gc.collect()
    assert [each() for each in gone] == [None, None]
    taps.close()


@both
def test_deleted_taps_take_hooks_and_features_with_them(fused):
    net = make()
    taps = fdk.FeatureTaps(net, ["0"], fused=fused)
    net(images())
    gone = weakref.ref(taps.features[0])
    del taps
    gc.collect()
    assert gone() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert net(images()).shape == (2, 1, 62, 62)
