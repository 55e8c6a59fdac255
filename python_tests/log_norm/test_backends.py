"""Every backend of log_norm against float64 truth, from sums and masses to the loss and back."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume
from torch import Tensor

import fdkernels as fdk
import oracles
from cases import Sums, sums
from fdkernels.log_norm import Options, log_norm

pytestmark = pytest.mark.usefixtures("nan_filled")


def run(case: Sums, backend: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and, for random upstream gradients, the gradients of sums and masses."""
    convention = fdk.CONVENTIONS[case.convention]
    options = Options(
        convention.region_weight,
        convention.masked_background,
        convention.norm,
        convention.log_scale,
        case.eps,
        case.exchange,
        case.reduction,
    )
    pairing = None if case.pairing is None else case.pairing.to(device)
    S, M = case.tensors(device)
    loss = log_norm(S, M, pairing, case.channels, case.pixels, options, backend)
    return loss, *torch.autograd.grad(loss, (S, M), upstream(case, loss).to(loss))


def truth(case: Sums, shake: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float64, with every number moved by a relative error of `shake`."""
    S, M = (x.detach().double() for x in case.tensors())
    S, M = (x * (1 + shake * (torch.rand_like(x) - 0.5).sign()) for x in (S, M))
    S.requires_grad_()
    M.requires_grad_()
    loss = oracles.log_norm(
        S,
        M,
        case.channels,
        case.pixels,
        case.reduction,
        convention=case.convention,
        exchange=case.exchange,
        pairing=case.pairing,
        eps=case.eps,
    )
    if not loss.requires_grad:
        return loss, torch.zeros_like(S), torch.zeros_like(M)
    grads = torch.autograd.grad(loss, (S, M), upstream(case, loss), allow_unused=True, materialize_grads=True)
    return loss.detach(), *grads


def upstream(case: Sums, loss: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed + 1)
    return torch.randn(loss.shape, generator=generator, dtype=torch.float64)


def test_loss_and_gradients_are_those_of_the_formula(backend, device, for_all):
    @for_all(sums(), max_examples=60)
    def check(case: Sums) -> None:
        wanted = truth(case)
        u = oracles.unit(case.dtype)
        moved = [truth(case, u) for _ in range(3)]
        logarithm = 1.0  # which turns relative errors into absolute ones
        for got, value, *others in zip(run(case, backend, device), wanted, *moved, strict=True):
            # How far the value moves when its inputs move by what they are rounded to.
            band = 2 * max((other - value).abs().max().item() for other in others)
            band += 2 * u * (value.abs().max().item() + logarithm)
            logarithm = 0.0
            oracles.assert_within(got, value, band)


@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("convention", oracles.CONVENTIONS)
def test_nan_and_infinite_sums_reach_the_loss(backend, device, convention, exchange):
    pairing = {"shuffle": torch.tensor([1, 2, 0]), "pooled": torch.tensor([[0, 1]])}.get(exchange)
    case = Sums(
        channels=(2,),
        pixels=(4,),
        batch=3,
        dtype=torch.float32,
        left_out=((False, False),) * 3,
        convention=convention,
        exchange=exchange,
        reduction="none",
        eps=1e-12,
        pairing=pairing,
        seed=0,
    )
    for bad in (float("nan"), float("inf")):
        bad_case = dataclasses.replace(case, bad=bad)
        loss, grad_sums, _ = run(bad_case, backend, device)
        wanted, wanted_grad, _ = truth(bad_case)
        assert torch.equal(loss.cpu().isfinite(), wanted.isfinite())
        assert not loss.isfinite().all()
        assert torch.equal(grad_sums.cpu().isfinite(), wanted_grad.isfinite())


@pytest.mark.parametrize("convention", oracles.CONVENTIONS)
def test_nan_masses_reach_the_loss(backend, device, convention):
    # A mask with NaN is refused where it is read; where it is not, it must not pass for an empty one.
    preset = fdk.CONVENTIONS[convention]
    options = Options(preset.region_weight, preset.masked_background, preset.norm, 1.0, 1e-12, "none", "mean")
    S, M = torch.randn(2, 3, 2, device=device), torch.ones(2, 3, 1, device=device)
    S[:, 1] = M[:, 1] = float("nan")
    assert log_norm(S, M, None, [2], [4], options, backend).isnan().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("convention", oracles.CONVENTIONS)
def test_left_out_samples_have_no_entry_no_gradient_and_do_not_count(
    backend, device, convention, exchange, reduction
):
    pairings = {"shuffle": [1, 2, 3, 0], "pooled": [[0, 1], [2, 3], [0, 3]]}
    pairing = torch.tensor(pairings[exchange]) if exchange in pairings else None
    case = Sums(
        channels=(3,),
        pixels=(4,),
        batch=4,
        dtype=torch.float64,
        left_out=((False, False), (True, True), (False, False), (False, True)),
        convention=convention,
        exchange=exchange,
        reduction=reduction,
        eps=1e-12,
        pairing=pairing,
        seed=0,
    )
    loss, grad_sums, grad_masses = run(case, backend, device)
    wanted, wanted_sums, wanted_masses = truth(case)
    torch.testing.assert_close(loss.cpu(), wanted)
    torch.testing.assert_close(grad_sums.cpu(), wanted_sums)
    torch.testing.assert_close(grad_masses.cpu(), wanted_masses)
    left_out = [1, 3] if convention == "region_mean" else [1]
    for n in left_out:
        assert grad_sums[:, n].abs().max() == 0
        assert grad_masses[:, n].abs().max() == 0
        if reduction == "none" and convention != "released":
            assert loss[n].item() == 0


def test_everything_left_out_gives_zero_loss_and_gradient(backend, device, for_all):
    @for_all(sums())
    def check(case: Sums) -> None:
        assume(case.batch)
        empty = dataclasses.replace(case, left_out=((True, True),) * case.batch)
        for value in run(empty, backend, device):
            assert (value == 0).all()


def test_zero_batch_gives_zero(backend, device):
    for reduction in ("mean", "sum"):
        options = Options("valid", False, "vector", 1.0, 1e-12, "none", reduction)
        S = torch.zeros(2, 0, 5, device=device, requires_grad=True)
        M = torch.zeros(2, 0, 2, device=device)
        loss = log_norm(S, M, None, [2, 3], [4, 4], options, backend)
        assert loss.tolist() == [0.0, 0.0]
        assert torch.autograd.grad(loss.sum(), S)[0].shape == S.shape


def test_the_same_bits_twice(backend, device):
    case = Sums(
        channels=(33, 5),
        pixels=(64, 16),
        batch=7,
        dtype=torch.float32,
        left_out=((False, False),) * 7,
        convention="paper",
        exchange="pooled",
        reduction="mean",
        eps=1e-12,
        pairing=torch.tensor([[0, 1], [2, 3], [0, 4], [5, 6], [5, 6]]),
        seed=0,
    )
    for first, second in zip(run(case, backend, device), run(case, backend, device), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("norm", ["vector", "channel_sum", "relative", "batch"])
@pytest.mark.parametrize("weight", ["valid", "none", "region", "pixels"])
def test_all_options_agree_with_the_reference(backend, device, norm, weight, exchange):
    pairings = {"shuffle": [2, 2, 0, 1], "pooled": [[0, 1], [2, 3], [-1, -1], [3, 3]]}
    pairing = torch.tensor(pairings[exchange], device=device) if exchange in pairings else None
    masked_background = weight in ("pixels", "region")
    options = Options(weight, masked_background, norm, 0.75, 1e-6, exchange, "mean")
    S = torch.randn(2, 4, 7, dtype=torch.float64, device=device, requires_grad=True)
    M = torch.rand(2, 4, 2, dtype=torch.float64, device=device)
    M[0, 1, 0] = 0
    M[:, 2, 1] = 0
    M.requires_grad_()
    results = []
    for name in (backend, "reference"):
        loss = log_norm(S, M, pairing, [4, 3], [9, 1], options, name)
        upstream = torch.tensor([0.7, -1.3], dtype=loss.dtype, device=device)
        results.append((loss, *torch.autograd.grad(loss, (S, M), upstream)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
