"""channel_dim=-1: features [N, *S, C] give what their channels in place 1 give, without a copy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fdkernels as fdk

SHAPES = {"1-D": (3, 5, 6), "2-D": (3, 5, 6, 4), "3-D": (3, 5, 2, 6, 4)}


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The same features [N, C, *S] as such, and as [N, *S, C] contiguous; both require a gradient."""
    first = torch.randn(shape).to(dtype)
    last = first.movedim(1, -1).contiguous()
    return first.requires_grad_(), last.requires_grad_()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("channel_dim", [-1, "last axis"])
def test_loss_and_gradient_are_those_of_the_channels_in_place_1(backend, device, shape, channel_dim):
    axis = len(shape) - 1 if channel_dim == "last axis" else channel_dim
    first, last = (F.detach().to(device).requires_grad_() for F in pair(shape))
    mask = torch.rand(3, *shape[2:], device=device)
    loss = fdk.feature_discrepancy_loss(last, mask, channel_dim=axis, backend=backend)
    wanted = fdk.feature_discrepancy_loss(first, mask, backend=backend)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    assert last.grad.shape == last.shape
    assert last.grad.is_contiguous()
    torch.testing.assert_close(last.grad, first.grad.movedim(1, -1))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tap_returns_the_features_in_the_layout_they_came_in(shape):
    first, last = pair(shape)
    mask, upstream = torch.rand(3, *shape[2:]), torch.randn(shape)
    out, loss = fdk.tap(last, mask, channel_dim=-1)
    assert out.shape == last.shape
    assert out.data_ptr() == last.data_ptr()
    assert out.stride() == last.stride()
    ((out * upstream.movedim(1, -1)).sum() + loss).backward()
    out_of_first, loss_of_first = fdk.tap(first, mask)
    ((out_of_first * upstream).sum() + loss_of_first).backward()
    torch.testing.assert_close(loss, loss_of_first)
    torch.testing.assert_close(last.grad, first.grad.movedim(1, -1))


def test_region_sums_and_lists_take_it():
    pairs = [pair((3, 5, 8, 6)), pair((3, 7, 4, 3))]
    mask = torch.rand(3, 1, 8, 6)
    of_last = fdk.region_sums([last for _, last in pairs], mask, channel_dim=-1)
    of_first = fdk.region_sums([first for first, _ in pairs], mask)
    for sums, wanted in zip(of_last, of_first, strict=True):
        for got, want in zip(sums, wanted, strict=True):
            torch.testing.assert_close(got, want)
    outs, _ = fdk.tap([last for _, last in pairs], mask, channel_dim=-1)
    assert [out.shape for out in outs] == [last.shape for _, last in pairs]


def test_the_axis_of_the_channels_may_be_counted_from_the_end():
    first, _ = pair((3, 5, 8, 6))
    mask = torch.rand(3, 1, 8, 6)
    counted = fdk.feature_discrepancy_loss(first, mask, channel_dim=-3)
    assert torch.equal(counted, fdk.feature_discrepancy_loss(first, mask))


@pytest.mark.parametrize("function", ["feature_discrepancy_loss", "tap", "region_sums"])
@pytest.mark.parametrize("wrong", [0, 2, -2, 4])
def test_another_axis_is_refused(function, wrong):
    with pytest.raises(ValueError, match=rf"channel_dim must be 1, .*, or -1, .*, got {wrong}$"):
        getattr(fdk, function)(torch.randn(3, 5, 8, 6), torch.rand(3, 1, 8, 6), channel_dim=wrong)


@pytest.mark.parametrize("wrong", [None, True, 1.0, "last"])
def test_an_axis_that_is_no_integer_is_refused(wrong):
    with pytest.raises(TypeError, match="channel_dim must be an integer, got "):
        fdk.region_sums(torch.randn(3, 5, 8, 6), torch.rand(3, 1, 8, 6), channel_dim=wrong)


class ChannelsLast(nn.Module):
    """A network whose maps are [N, H, W, C], as those of Swin are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(image).relu())
        return out


@pytest.mark.parametrize("fused", [False, True])
def test_taps_of_channels_last_maps_give_the_gradients_of_the_features(fused):
    net, image, mask = ChannelsLast(), torch.randn(2, 6, 4, 3), torch.rand(2, 1, 6, 4)
    with fdk.FeatureTaps(net, ["first", "second"], fused=fused) as taps:
        total = net(image).square().mean()
        given = taps if fused else taps.features
        (total + fdk.feature_discrepancy_loss(given, mask, channel_dim=-1)).backward()
    grads = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    first = net.first(image)
    second = net.second(first.relu())
    moved = [F.movedim(-1, 1) for F in (first, second)]
    (second.square().mean() + fdk.feature_discrepancy_loss(moved, mask)).backward()
    for grad, parameter in zip(grads, net.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)
