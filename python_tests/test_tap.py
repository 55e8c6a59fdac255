"""tap: features pass through unchanged, and one backward pass serves the network and the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fdkernels as fdk
from cases import Case, calls, lay_out


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_gradcheck_and_gradgradcheck_of_tap(backend):
    features = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 2, 2, dtype=torch.float64)

    def outputs(features: Tensor) -> tuple[Tensor, Tensor]:
        out, loss = fdk.tap(features, mask, eps=1e-3, backend=backend)
        return out.square(), loss

    assert gradcheck(outputs, (features,))
    assert gradgradcheck(outputs, (features,))


@given(calls(max_size=5))
def test_tap_gives_the_numbers_of_the_separate_op(call: tuple[Case, dict[str, Any]]):
    case, options = call
    features, mask = case.features(), case.mask().detach()
    weights = [torch.randn_like(F) for F in features]

    def total(outs, loss) -> Tensor:
        through = sum((w.double() * out.double()).sum() for w, out in zip(weights, outs, strict=True))
        return loss.double().sum() + through

    outs, loss = fdk.tap(features, mask, aspect="any", **options)
    separate = fdk.feature_discrepancy_loss(features, mask, aspect="any", **options)
    assert torch.equal(loss, separate)
    for out, F in zip(outs, features, strict=True):
        assert out.data_ptr() == F.data_ptr()
        steps = [(s, t) for s, t, n in zip(out.stride(), F.stride(), F.shape, strict=True) if n > 1]
        assert all(s == t for s, t in steps)
        assert torch.equal(out, F)
    tapped = torch.autograd.grad(total(outs, loss), features)
    wanted = torch.autograd.grad(total(features, separate), features)
    for grad, other in zip(tapped, wanted, strict=True):
        # tap rounds the sum of both gradients once, autograd rounds each and their sum
        eps = torch.finfo(grad.dtype).eps
        torch.testing.assert_close(grad, other, rtol=4 * eps, atol=8 * eps * (1 + other.abs().max().item()))


def test_tap_of_one_tensor_is_a_tensor_and_of_a_tuple_a_list():
    features, mask = torch.randn(2, 3, 4), torch.rand(2, 4)
    out, _ = fdk.tap(features, mask)
    assert isinstance(out, Tensor)
    outs, _ = fdk.tap((features, features), mask)
    assert [type(out) for out in outs] == [Tensor, Tensor]


@pytest.mark.parametrize("used", ["both", "only the output", "only the loss"])
def test_tap_backward_when_a_part_is_not_used(backend, device, used):
    features = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    mask = torch.rand(2, 4, 4, device=device)
    out, loss = fdk.tap(features, mask, backend=backend)
    separate = fdk.feature_discrepancy_loss(features, mask, backend=backend)
    total = {"both": out.sum() + loss, "only the output": 3 * out.sum(), "only the loss": loss}[used]
    wanted = {
        "both": features.sum() + separate,
        "only the output": 3 * features.sum(),
        "only the loss": separate,
    }[used]
    (grad,) = torch.autograd.grad(total, features)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted, features)[0])


def test_tap_reads_the_upstream_gradient_in_any_layout(backend, device):
    base = torch.randn(2, 3, 4, 5, device=device)
    mask = torch.rand(2, 4, 5, device=device)
    for layout in ("contiguous", "channels_last", "transposed", "strided"):
        features = lay_out(base, layout).requires_grad_()
        out, loss = fdk.tap(features, mask, backend=backend)
        (plain,) = torch.autograd.grad(loss, features, retain_graph=True)
        for other in ("contiguous", "channels_last", "transposed", "strided", "expanded"):
            upstream = lay_out(torch.randn(2, 3, 4, 5).to(device), other)
            (grad,) = torch.autograd.grad((out, loss), features, (upstream, torch.ones_like(loss)), True)
            torch.testing.assert_close(grad, plain + upstream)


def test_the_tapped_output_may_be_changed_in_place():
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    mask = torch.rand(2, 4, 4)
    separate = fdk.feature_discrepancy_loss(features, mask) + features.relu().sum()
    (wanted,) = torch.autograd.grad(separate, features)
    out, loss = fdk.tap(features * 1, mask)
    total = out.relu_().sum() + loss
    torch.testing.assert_close(torch.autograd.grad(total, features)[0], wanted)


def test_a_change_in_place_of_a_tapped_output_that_autograd_needs_is_noticed():
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    out, loss = fdk.tap(features.sigmoid(), torch.rand(2, 4, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.mul_(2).sum() + loss).backward()
