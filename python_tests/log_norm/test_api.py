"""Stage log_norm as the op above it uses it: registered ops, autograd to second order, its memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fdkernels.log_norm import Options, log_norm
from fdkernels.log_norm.options import EXCHANGES, NORMS, REGION_WEIGHTS

CHANNELS, PIXELS = [3, 2], [12, 4]
PAIRINGS = {
    "none": None,
    "shuffle": torch.tensor([1, 2, 0]),
    "pooled": torch.tensor([[0, 2], [-1, -1], [1, 2]]),
}
OPTIONS = [
    Options(weight, False, norm, 0.5, 1e-3, exchange, "mean")
    for weight, norm, exchange in [
        ("valid", "vector", "none"),
        ("valid", "vector", "shuffle"),
        ("region", "vector", "pooled"),
        ("none", "channel_sum", "pooled"),
        ("none", "relative", "shuffle"),
        ("valid", "relative", "pooled"),
    ]
] + [Options("pixels", True, "batch", 0.5, 1e-3, exchange, "none") for exchange in EXCHANGES]


def inputs(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    S = torch.randn(2, 3, 5, dtype=torch.float64, device=device)
    M = torch.rand(2, 3, 2, dtype=torch.float64, device=device) + 0.5
    return S.requires_grad_(), M.requires_grad_()


def name(options: Options) -> str:
    return f"{options.region_weight}-{options.norm}-{options.exchange}"


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_gradcheck_and_gradgradcheck(backend, options):
    def function(S: Tensor, M: Tensor) -> Tensor:
        return log_norm(S, M, PAIRINGS[options.exchange], CHANNELS, PIXELS, options, backend)

    S, M = inputs()
    assert gradcheck(function, (S, M), fast_mode=True)
    assert gradgradcheck(function, (S, M), fast_mode=True)


@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[-1]], ids=name)
def test_ops_pass_opcheck(backend, device, interpreted, options):
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not interpreted:  # tracing NumPy takes long and says nothing about kernels
        tests.append("test_aot_dispatch_dynamic")
    S, M = (x.detach() for x in inputs(device))
    pairing = PAIRINGS[options.exchange]
    pairing = None if pairing is None else pairing.to(device)
    rest = (pairing, CHANNELS, PIXELS, *options, backend)
    ops = torch.ops.fdkernels
    torch.library.opcheck(ops.log_norm_forward.default, (S, M, *rest), test_utils=tests)
    loss = ops.log_norm_forward(S, M, *rest)
    inputs_of_backward = [torch.randn_like(loss), S, M]
    for tensor in inputs_of_backward:
        tensor.requires_grad_()
    torch.library.opcheck(ops.log_norm_backward.default, (*inputs_of_backward, *rest), test_utils=tests)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shapes_and_dtypes(backend, device, norm, reduction):
    options = Options("valid", False, norm, 1.0, 1e-12, "none", reduction)
    for dtype in (torch.float32, torch.float64):
        S, M = (x.detach().to(dtype) for x in inputs(device))
        loss = log_norm(S, M, None, CHANNELS, PIXELS, options, backend)
        shape = (2,) if reduction == "mean" else (5,) if norm == "batch" else (3, 2)
        assert loss.shape == shape
        assert loss.dtype == dtype


@pytest.mark.parametrize("weight", REGION_WEIGHTS)
def test_inputs_need_not_be_contiguous(backend, device, weight):
    options = Options(weight, False, "vector", 1.0, 1e-12, "pooled", "none")
    S, M = (x.detach() for x in inputs(device))
    pairs = PAIRINGS["pooled"].to(device)
    plain = log_norm(S, M, pairs, CHANNELS, PIXELS, options, backend)
    turned = (S.transpose(0, 2).contiguous().transpose(0, 2), M.transpose(0, 1).contiguous().transpose(0, 1))
    other_pairs = pairs.t().contiguous().t()
    S_turned, M_turned = (x.requires_grad_() for x in turned)
    loss = log_norm(S_turned, M_turned, other_pairs, CHANNELS, PIXELS, options, backend)
    assert torch.equal(loss, plain)
    # An expanded upstream gradient, as sum() makes it.
    (grad,) = torch.autograd.grad(loss.sum(), S_turned)
    S.requires_grad_()
    ones = torch.ones_like(plain)
    loss = log_norm(S, M, pairs, CHANNELS, PIXELS, options, backend)
    assert torch.equal(grad, torch.autograd.grad(loss, S, ones)[0])


def test_zero_cotangents_and_unused_masses_are_fine():
    S, _ = inputs()
    M = torch.ones(2, 3, 2, dtype=torch.float64)
    loss = log_norm(S, M, None, CHANNELS, PIXELS, OPTIONS[0], "reference")
    (grad,) = torch.autograd.grad(loss.sum(), S, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), S)
    assert second.shape == S.shape
    assert second.abs().max() > 0
