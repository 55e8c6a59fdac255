"""taps.mask: region sums from the pass that writes the features, and the numbers of the loss without it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fdkernels as fdk
from fdkernels.op import cpu_norms
from kernel_launches import recorded_calls, recorded_launches

pytestmark = pytest.mark.skipif(
    fdk.backends()["cpu"] is not None, reason=f"backend 'cpu': {fdk.backends()['cpu']}"
)


class Net(nn.Module):
    """Three blocks, of which the last ends in a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1 = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.enc2 = nn.Sequential(
            nn.Conv2d(4, 6, 3, 2, 1), nn.LeakyReLU(0.1), nn.InstanceNorm2d(6, affine=True)
        )
        self.dec1 = nn.Conv2d(10, 5, 3, padding=1)
        self.head = nn.Conv2d(5, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        skip = self.enc1(images)
        up = nn.functional.interpolate(self.enc2(skip), scale_factor=2)
        return self.head(self.dec1(torch.cat([skip, up], dim=1)))


NAMES = ["enc1", "enc2", "dec1"]
MASK_KINDS = ("bool", "float", "soft", "int64")


def mask_of(kind: str) -> Tensor:
    """[3, 1, 8, 8], or without the channel."""
    soft = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    if kind == "soft":
        return soft[:, 0]
    mask = soft > 0.5
    return {"bool": mask, "float": mask.double(), "int64": mask[:, 0].long()}[kind]


def step(net: nn.Module, images: Tensor, mask: Tensor, options: dict, early: dict | None) -> list[Tensor]:
    """Loss and gradients, with plain taps or with the mask before the forward."""
    alpha = [0.5, 2.0, 1.0]
    with fdk.FeatureTaps(net, NAMES, fused=early is not None) as taps:
        if early is None:
            out = net(images)
            loss = fdk.feature_discrepancy_loss(taps.features, mask, layer_weights=alpha, **options)
        else:
            with taps.mask(mask, **early):
                out = net(images)
            loss = fdk.feature_discrepancy_loss(taps, mask, layer_weights=alpha, **options)
    total = loss.sum() + out.square().mean()
    return [loss.detach(), *torch.autograd.grad(total, list(net.parameters()))]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("options", "early"),
    [
        ({}, {}),
        ({"convention": "region_mean"}, {}),
        ({"convention": "released"}, {"mask_resize": "max"}),
        ({"convention": "released"}, {}),  # resized in another way: the features are read
        ({"exchange": "shuffle", "pairing": torch.tensor([2, 0, 1])}, {}),
        ({"exchange": "pooled", "pairing": torch.tensor([[0, 1], [2, 1]])}, {}),
        ({"reduction": "none"}, {}),
        ({"convention": "fisher"}, {}),
        ({"backend": "reference"}, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_loss_and_gradients_are_those_of_plain_taps(kind, options, early, channels_last):
    torch.manual_seed(0)
    net, images, mask = Net().double(), torch.randn(3, 1, 8, 8, dtype=torch.float64), mask_of(kind)
    if channels_last:
        net, images = net.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    fused = copy.deepcopy(net)
    fdk.fuse_norms(fused, NAMES[:2])
    for found, wanted in zip(
        step(fused, images, mask, options, early), step(net, images, mask, options, None), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_pixels_to_ignore_and_nan_under_them():
    torch.manual_seed(0)
    net, images = Net(), torch.randn(3, 1, 8, 8)
    mask = torch.randint(2, (3, 1, 8, 8), dtype=torch.uint8)
    mask[:, :, :3] = 255
    fused = copy.deepcopy(net)
    fdk.fuse_norms(fused, NAMES[:2])
    options, early = {"ignore_index": 255}, {"ignore_index": 255}
    for found, wanted in zip(
        step(fused, images, mask, options, early), step(net, images, mask, options, None), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def fused_network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = Net()
    fdk.fuse_norms(net, NAMES)
    return net, torch.randn(3, 1, 8, 8), torch.rand(3, 1, 8, 8) > 0.5


def shapes_read(calls) -> list[tuple[int, ...]]:
    """The shapes of the layers of the one call that sums some."""
    (read,) = [arguments[0] for name, arguments, _ in calls.calls if name == "sums"]
    return [tuple(layer.shape) for layer in read]


def test_features_of_fused_blocks_are_not_read_by_the_loss_nor_written_again():
    net, images, mask = fused_network()
    crit = fdk.FeatureDiscrepancyLoss(2, alpha_init=0.5)
    taps = fdk.FeatureTaps(net, NAMES[:2], fused=True)
    with recorded_calls("cpu") as calls:
        with taps.mask(mask):
            out = net(images)
        assert calls.take() == ["masks"]  # of the smaller size; the sums come with the features
        loss = crit(taps)
        assert shapes_read(calls) == [(3, 0, 8, 8), (3, 0, 4, 4)]  # the weights alone, for the masses
        assert calls.take() == ["sums", "losses"]
        (loss + out.mean()).backward()
        assert calls.take() == []  # the backward of the norms adds the gradient
    with recorded_calls("cpu") as calls:  # without the mask the loss reads them, once
        net(images)
        crit(taps, mask)
        assert calls.take()[-1] == "sums"


def test_the_same_in_triton_with_pixels_to_ignore():
    if os.environ.get("TRITON_INTERPRET") != "1" or fdk.backends()["triton"]:
        pytest.skip("launches are counted by the interpreter of Triton")
    net, images, mask = fused_network()
    taps = fdk.FeatureTaps(net, NAMES[:2], fused=True)
    mask = mask.to(torch.uint8)
    mask[:, :, :3] = 255
    found: dict[str, list[Tensor]] = {}
    for backend in ("cpu", "triton"):
        with fdk.use_backend(backend), recorded_launches() as names:
            with taps.mask(mask, ignore_index=255):
                out = net(images)
            loss = fdk.feature_discrepancy_loss(taps, mask, ignore_index=255)
            found[backend] = [loss, *torch.autograd.grad(loss + out.mean(), list(net.parameters()))]
    torch.testing.assert_close(found["triton"], found["cpu"], rtol=1e-4, atol=1e-5)
    assert names.count("norm_gradient_kernel") == names.count("norm_apply_kernel") == 2
    assert names.count("sums_kernel") == 1  # of the weights alone
    assert "gradient_kernel" not in names


def test_after_the_first_pass_masks_of_all_sizes_are_made_together():
    net, images, mask = fused_network()
    crit = fdk.FeatureDiscrepancyLoss(2, alpha_init=0.5, ignore_index=255)
    taps = fdk.FeatureTaps(net, NAMES[:2], fused=True)
    mask, other = mask.to(torch.uint8), (torch.rand(mask.shape) > 0.3).to(torch.uint8)
    found = []
    for given, wanted in ((mask, 2), (other, 1), (mask[:2], 2), (mask, 1)):
        with recorded_calls("cpu") as calls:
            with taps.mask(given, ignore_index=255):
                net(images[: len(given)])
            found.append(crit(taps))
            assert calls.take() == ["masks"] * wanted + ["sums", "losses"]
    torch.testing.assert_close(found[3], found[0])
    torch.testing.assert_close(found[1], crit(net_features(net, images), other))


def net_features(net: nn.Module, images: Tensor) -> list[Tensor]:
    with fdk.FeatureTaps(net, NAMES[:2]) as taps:
        net(images)
        return taps.features


def test_a_layer_that_ends_otherwise_is_read():
    net, images, mask = fused_network()
    taps = fdk.FeatureTaps(net, NAMES, fused=True)
    with recorded_calls("cpu") as calls:
        with taps.mask(mask):
            net(images)
        calls.take()
        fdk.feature_discrepancy_loss(taps, mask)
        assert shapes_read(calls) == [(3, 0, 8, 8), (3, 0, 4, 4), (3, 5, 8, 8)]


@pytest.mark.parametrize("changed", ["another mask", "in place", "another pass"])
def test_sums_of_another_mask_are_not_taken(changed):
    net, images, mask = fused_network()
    taps = fdk.FeatureTaps(net, NAMES, fused=True)
    mask = mask.float()
    with taps.mask(mask):
        net(images)
    if changed == "another mask":
        mask = 1 - mask
    elif changed == "in place":
        mask.mul_(-1).add_(1)
    else:
        net(images)
    found = fdk.feature_discrepancy_loss(taps, mask)
    with torch.no_grad():
        torch.testing.assert_close(found, fdk.feature_discrepancy_loss(taps.features, mask))


def test_the_mask_is_that_of_the_last_block_and_no_longer_than_it():
    net, images, mask = fused_network()
    crit = fdk.FeatureDiscrepancyLoss(3, alpha_init=0.5)
    taps = fdk.FeatureTaps(net, NAMES, fused=True)
    net(images)
    with pytest.raises(TypeError, match=r"mask must be given, here or to the taps.*got None"):
        crit(taps)
    with pytest.raises(TypeError, match=r"mask must be a tensor, got NoneType"):
        crit([torch.randn(1, 2, 3, 3)] * 3)
    with taps.mask(mask):
        net(images)
    crit(taps)
    taps.clear()
    net(images)
    with pytest.raises(TypeError, match=r"mask must be given"):
        crit(taps)
    with pytest.raises(ValueError, match="mask_resize must be one of"), taps.mask(mask, mask_resize="cubic"):
        pass
    assert net.enc1[1]._early is None


@pytest.mark.parametrize("wrong", ["batch", "values", "shape"])
def test_wrong_masks_are_refused_by_the_loss(wrong):
    net, images, mask = fused_network()
    given = {
        "batch": mask[:2],
        "values": mask.float() * 255,
        "shape": mask[..., :5],
    }[wrong]
    taps = fdk.FeatureTaps(net, NAMES, fused=True)
    with taps.mask(given):
        net(images)
    with pytest.raises(ValueError, match="mask"):
        fdk.feature_discrepancy_loss(taps, given)


@pytest.mark.parametrize(
    "wrong", [None, [[1.0]], torch.ones(1, 1, 8, 8).numpy()], ids=["None", "list", "array"]
)
def test_a_mask_that_is_no_tensor_is_refused_before_the_forward(wrong):
    taps = fdk.FeatureTaps(fused_network()[0], NAMES, fused=True)
    with pytest.raises(TypeError, match="mask must be a tensor, got"), taps.mask(wrong):
        pass


def test_second_derivatives_through_fused_norms():
    torch.manual_seed(0)
    net = Net().double()
    fused = copy.deepcopy(net)
    fdk.fuse_norms(fused, NAMES)
    images, mask = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.rand(3, 1, 8, 8) > 0.5

    def second(network: nn.Module, with_mask: bool) -> list[Tensor]:
        parameters = list(network.parameters())
        with fdk.FeatureTaps(network, NAMES, fused=with_mask) as taps:
            if with_mask:
                with taps.mask(mask):
                    network(images)
            else:
                network(images)
            loss = fdk.feature_discrepancy_loss(taps if with_mask else taps.features, mask)
        first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        size = sum(grad.square().sum() for grad in first if grad is not None)
        return [grad for grad in torch.autograd.grad(size, parameters, allow_unused=True) if grad is not None]

    for found, wanted in zip(second(fused, True), second(net, False), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_step_keeps_no_map_beside_the_input_of_the_norm(monkeypatch):
    written: list[int] = []
    forward = cpu_norms.norm_forward
    monkeypatch.setattr(cpu_norms, "norm_forward", lambda *given: written.append(1) or forward(*given))
    net, images, mask = fused_network()
    taps = fdk.FeatureTaps(net, NAMES, fused=True)
    kept: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        taps.mask(mask),
    ):
        block = net.enc1(images)
    assert len(written) == 1
    maps = {t.data_ptr() for t in kept if t.numel() == block.numel()}
    assert len(maps) == 1  # the output of the convolution, which its own node does not keep


class Changing(nn.Module):
    """Changes the output of its normalisation in place, as residual blocks do, and returns it."""

    def __init__(self, change: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        self.change(out, x)
        return out


@pytest.mark.parametrize(
    "change",
    [lambda out, x: out.add_(x), lambda out, x: nn.functional.hardswish(out, inplace=True)],
    ids=["residual", "activation"],
)
def test_a_tap_behind_a_change_in_place_of_a_fused_output(change):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 1), Changing(change), nn.Conv2d(4, 1, 1)).double()
    fused = copy.deepcopy(net)
    assert fdk.fuse_norms(fused) == {"1.body.1": "fused: BatchNorm2d"}
    images, mask = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.rand(3, 1, 8, 8) > 0.5

    def gradients(network: nn.Module) -> list[Tensor]:
        with fdk.FeatureTaps(network, ["1"], fused=True) as taps:
            with taps.mask(mask):
                out = network(images)
            loss = fdk.feature_discrepancy_loss(taps, mask)
        return [loss.detach(), *torch.autograd.grad(loss + out.square().mean(), list(network.parameters()))]

    for found, wanted in zip(gradients(fused), gradients(net), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("compiles", ["network", "network and loss"])
def test_the_mask_is_given_to_compiled_networks_too(compiles):
    torch.compiler.reset()
    net, mask, images = Net().double(), mask_of("float"), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    fdk.fuse_norms(net)
    parameters = list(net.parameters())
    with fdk.FeatureTaps(net, NAMES, fused=True) as taps:

        def total(network: nn.Module, images: Tensor, mask: Tensor) -> Tensor:
            with taps.mask(mask):
                out = network(images)
            return out.square().mean() + fdk.feature_discrepancy_loss(taps, mask)

        wanted = total(net, images, mask)
        expected = torch.autograd.grad(wanted, parameters)
        fast, network = total, net
        if compiles == "network":
            network = torch.compile(net, backend="aot_eager", fullgraph=True)
        else:
            fast = torch.compile(total, backend="aot_eager", fullgraph=True)
        got = fast(network, images, mask)
    torch.testing.assert_close(got, wanted)
    for grad, other in zip(torch.autograd.grad(got, parameters), expected, strict=True):
        torch.testing.assert_close(grad, other)
