"""`losses` of every backend, from sums and masses to losses and slopes, against float64 truth."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import oracles
from cases import SumsCase, sums_cases
from fdkernels.conventions import Options, get_convention
from fdkernels.op.kernels import kernels_of
from fdkernels.op.pyramid import describe
from oracles import Formula

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy"),  # with which the interpreter computes
]

# Sample 1 is nobody's partner and 3 is two's; a pair with a negative sample does not count.
PAIRINGS = {
    "none": None,
    "shuffle": torch.tensor([3, 3, 2, 0]),
    "pooled": torch.tensor([[0, 1], [3, 3], [-1, 2], [0, 3], [2, 0]]),
}


def run(case: SumsCase, backend: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Losses [L] and slopes [2, N, ΣC]."""
    pairing = None if case.pairing is None else case.pairing.to(device)
    return kernels_of(backend).losses(*case.tensors(device), case.pyramid, case.options, pairing)


def truth(case: SumsCase, shake: float = 0.0) -> tuple[Tensor, Tensor]:
    """The same in float64, with every number moved by a relative error of `shake`."""
    S, M = (x.double() for x in case.tensors())
    S, M = (x * (1 + shake * (torch.rand_like(x) - 0.5).sign()) for x in (S, M))
    S.requires_grad_()
    losses = oracles.losses_of(S, M, **case.formula)
    if not losses.requires_grad:
        return losses, torch.zeros_like(S)
    return losses.detach(), torch.autograd.grad(losses.sum(), S)[0]


def check(case: SumsCase, backend: str, device: torch.device) -> None:
    """Losses and slopes are those of the formula, within what their conditioning allows."""
    wanted = truth(case)
    u = oracles.unit(case.dtype)
    moved = [truth(case, u) for _ in range(3)]
    logarithm = 1.0  # which turns relative errors into absolute ones
    for got, value, *others in zip(run(case, backend, device), wanted, *moved, strict=True):
        # How far the value moves when its inputs move by what they are rounded to.
        band = 2 * max((other - value).abs().max().item() for other in others)
        band += 2 * u * (value.abs().max().item() + logarithm)
        logarithm = 0.0
        assert got.dtype == case.dtype
        oracles.assert_within(got, value, band)


def test_losses_and_slopes_are_those_of_the_formula(backend, device, for_all):
    @for_all(sums_cases(), max_examples=60)
    def check_case(case: SumsCase) -> None:
        check(case, backend, device)


@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("norm", ["vector", "channel_sum", "relative", "batch"])
@pytest.mark.parametrize("weight", ["valid", "none", "region", "pixels"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_every_option_beside_empty_regions(backend, device, masked, weight, norm, exchange):
    case = SumsCase(
        channels=(4, 3),
        pixels=(9, 1),
        batch=4,
        convention=Formula(weight, norm, 0.7, masked),  # times 1 / 3 it is no number of few digits
        left_out=((False, False), (True, False), (True, True), (False, False)),
        exchange=exchange,
        reduction="sum" if masked else "mean",
        eps=1e-3,
        pairing=PAIRINGS[exchange],
    )
    check(case, backend, device)


@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("norm", ["vector", "batch"])
def test_more_samples_channels_and_layers_than_a_block_has(backend, device, interpreted, norm, exchange):
    """Against the reference, which the loops of the oracle check at smaller sizes."""
    batch, layers = (9, 18) if interpreted else (70, 37)
    pairings = {"shuffle": torch.randint(batch, (batch,)), "pooled": torch.randint(batch, (2 * batch, 2))}
    case = SumsCase(
        channels=(300, *[1] * (layers - 1)),
        pixels=(9,) * layers,
        batch=batch,
        convention=Formula("region", norm),
        exchange=exchange,
        pairing=pairings.get(exchange),
    )
    wanted = run(case, "reference", torch.device("cpu"))
    for got, value in zip(run(case, backend, device), wanted, strict=True):
        torch.testing.assert_close(got.cpu(), value, rtol=1e-9, atol=1e-9 * value.abs().max().item())


# One layer of two channels and two samples. S_fg = (3, 1), (2, 2); S_bg = (1, 0), (0, 1).
SUMS = torch.tensor([[[3.0, 1.0], [2.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
MASSES = torch.tensor([[[1.0], [2.0]], [[3.0], [2.0]]], dtype=torch.float64)
PLAIN = Options("none", False, "vector", 1.0, 0.0, "none", "sum")


def loss_by_hand(backend, device, options: Options, pairing: Tensor | None = None) -> float:
    pyramid = describe([torch.empty(2, 2, 8, dtype=torch.float64)])
    pairing = None if pairing is None else pairing.to(device)
    losses, _ = kernels_of(backend).losses(SUMS.to(device), MASSES.to(device), pyramid, options, pairing)
    return losses.item()


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        # f - b = (2, 1) and (2, 1)
        ({}, [5, 5]),
        # divided by V = 4 and 4
        ({"region_weight": "valid"}, [5 / 16, 5 / 16]),
        # (3, 1) - (1/3, 0) and (1, 1) - (0, ½)
        ({"region_weight": "region"}, [64 / 9 + 1, 1.25]),
        # divided by P = 8
        ({"region_weight": "pixels"}, [5 / 64, 5 / 64]),
        # 4 - 1 and 4 - 1, summed over the channels
        ({"norm": "channel_sum"}, [9, 9]),
        ({"norm": "relative"}, [9 / 25, 9 / 25]),
        # for each channel 2² + 2² and 1² + 1²
        ({"norm": "batch"}, [8, 2]),
        # S_bg is replaced by M_fg - S_fg = (-2, 0) and (0, 0): f - b = (5, 1) and (2, 2)
        ({"masked_background": True}, [26, 8]),
        ({"eps": 3.0}, [8, 8]),
        # with the relative norm ε stands in the denominator as well: 9 / (25 + 2) + 2
        ({"norm": "relative", "eps": 2.0}, [9 / 27 + 2] * 2),
    ],
    ids=str,
)
def test_weights_norms_and_epsilon_by_hand(backend, device, changed, wanted):
    total = -sum(math.log(D) for D in wanted)
    options = PLAIN._replace(**changed)
    assert loss_by_hand(backend, device, options) == pytest.approx(total)
    assert loss_by_hand(backend, device, options._replace(reduction="mean")) == pytest.approx(total / 2)
    assert loss_by_hand(backend, device, options._replace(log_scale=0.5)) == pytest.approx(total / 2)


def test_a_sample_may_be_its_own_partner(backend, device):
    shuffled = PLAIN._replace(exchange="shuffle")
    got = loss_by_hand(backend, device, shuffled, torch.tensor([0, 1]))
    assert got == pytest.approx(-4 * math.log(5))


def test_pairs_with_a_negative_sample_do_not_count(backend, device):
    # f[0] - b[1] = (3, 0) and f[1] - b[0] = (1, 2): 9 + 5
    pairs = torch.tensor([[-1, -1], [0, 1], [-1, 1]])
    got = loss_by_hand(backend, device, PLAIN._replace(exchange="pooled"), pairs)
    assert got == pytest.approx(-2 * (math.log(5) + math.log(14)))


def test_loss_and_slopes_by_hand(backend, device):
    sums = torch.tensor([[[6.0, 2.0]], [[2.0, 4.0]]], dtype=torch.float64, device=device)
    masses = torch.ones(2, 1, 1, dtype=torch.float64, device=device)
    options = PLAIN._replace(region_weight="valid")  # f - b = [2, -1], D = 5
    pyramid = describe([torch.empty(1, 2, 2, dtype=torch.float64)])
    losses, slopes = kernels_of(backend).losses(sums, masses, pyramid, options, None)
    assert losses.item() == pytest.approx(-math.log(5), rel=1e-15)
    # -2·(f - b)·½ / D for the foreground
    assert slopes.flatten().tolist() == pytest.approx([-0.4, 0.2, 0.4, -0.2], rel=1e-15)


@pytest.mark.parametrize("eps", [1e-12, 1e-30, 1e-300])
def test_epsilon_and_scale_are_not_rounded_to_float32(backend, device, eps):
    sums = torch.ones(2, 1, 3, dtype=torch.float64, device=device)
    masses = torch.ones(2, 1, 1, dtype=torch.float64, device=device)
    options = PLAIN._replace(eps=eps, log_scale=0.1)
    pyramid = describe([torch.empty(1, 3, 2, dtype=torch.float64)])
    losses, _ = kernels_of(backend).losses(sums, masses, pyramid, options, None)
    assert losses.item() == pytest.approx(-0.1 * math.log(eps), rel=1e-15)


@pytest.mark.parametrize("norm", ["vector", "channel_sum", "relative", "batch"])
def test_the_identity_as_a_shuffle_doubles_the_loss(backend, device, norm):
    plain = SumsCase((3, 2), (12, 30), 4, Formula(norm=norm))
    twice = dataclasses.replace(plain, exchange="shuffle", pairing=torch.arange(4))
    (one, _), (two, _) = (run(case, backend, device) for case in (plain, twice))
    torch.testing.assert_close(two, 2 * one, rtol=1e-14, atol=0)


@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("convention", oracles.CONVENTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_nan_and_infinite_sums_reach_loss_and_slopes(backend, device, convention, exchange, bad):
    pairing = {"shuffle": torch.tensor([1, 2, 0]), "pooled": torch.tensor([[0, 1]])}.get(exchange)
    case = SumsCase((2,), (4,), 3, convention, torch.float32, exchange=exchange, pairing=pairing, bad=bad)
    losses, slopes = run(case, backend, device)
    wanted, wanted_slopes = truth(case)
    assert not wanted.isfinite().any()
    assert not losses.isfinite().any()
    assert torch.equal(slopes.cpu().isfinite(), wanted_slopes.isfinite())


@pytest.mark.parametrize("convention", oracles.CONVENTIONS)
def test_nan_masses_reach_the_loss(backend, device, convention):
    # A mask with NaN is refused where it is read; where it is not, it must not pass for an empty one.
    case = SumsCase((2,), (4,), 3, convention, torch.float32)
    S, M = case.tensors(device)
    S[:, 1] = M[:, 1] = math.nan
    losses, _ = kernels_of(backend).losses(S, M, case.pyramid, case.options, None)
    assert losses.isnan().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("convention", oracles.CONVENTIONS)
def test_samples_that_are_left_out_have_no_slopes_and_do_not_count(
    backend, device, convention, exchange, reduction
):
    pairings = {"shuffle": [1, 2, 3, 0], "pooled": [[0, 1], [2, 3], [0, 3]]}
    case = SumsCase(
        channels=(3,),
        pixels=(4,),
        batch=4,
        convention=convention,
        left_out=((False, False), (True, True), (False, False), (False, True)),
        exchange=exchange,
        reduction=reduction,
        pairing=torch.tensor(pairings[exchange]) if exchange in pairings else None,
    )
    losses, slopes = run(case, backend, device)
    wanted, wanted_slopes = truth(case)
    torch.testing.assert_close(losses.cpu(), wanted)
    torch.testing.assert_close(slopes.cpu(), wanted_slopes)
    for n in [1, 3] if convention == "region_mean" else [1]:
        assert slopes[:, n].abs().max() == 0


@pytest.mark.parametrize("norm", ["vector", "batch"])
@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
def test_samples_that_are_left_out_have_no_effect_whatever_they_hold(backend, device, norm, exchange):
    left_out = ((False, False), (True, True), (False, False), (False, False))
    case = SumsCase((4,), (9,), 4, Formula(norm=norm), left_out=left_out, exchange=exchange)
    S, M = case.tensors(device)
    pairing = PAIRINGS[exchange]
    pairing = None if pairing is None else pairing.to(device)
    results = []
    for value in (0.0, math.nan, math.inf):
        S[:, 1] = value
        results.append(kernels_of(backend).losses(S, M, case.pyramid, case.options, pairing))
    for losses, slopes in results:
        assert losses.isfinite().all()
        assert torch.equal(losses, results[0][0])
        assert torch.equal(slopes, results[0][1])
        assert not slopes[:, 1].any()


@pytest.mark.parametrize("norm", ["vector", "batch"])
@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
def test_a_layer_in_which_nothing_counts_is_zero(backend, device, norm, exchange):
    case = SumsCase((3, 2), (12, 30), 4, Formula(norm=norm), exchange=exchange, pairing=PAIRINGS[exchange])
    S, M = case.tensors(device)
    M[:, :, 1] = 0
    pairing = None if case.pairing is None else case.pairing.to(device)
    losses, slopes = kernels_of(backend).losses(S, M, case.pyramid, case.options, pairing)
    assert losses[0] != 0
    assert losses[1] == 0
    assert slopes[..., :3].any()
    assert not slopes[..., 3:].any()


def test_a_call_in_which_nothing_counts_is_zero(backend, device, for_all):
    @for_all(sums_cases())
    def check_case(case: SumsCase) -> None:
        empty = dataclasses.replace(case, left_out=((True, True),) * case.batch)
        for value in run(empty, backend, device):
            assert (value == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("norm", ["vector", "batch"])
def test_a_batch_without_samples_has_the_loss_zero(backend, device, norm, reduction):
    case = SumsCase((2, 3), (4, 4), 0, Formula(norm=norm), torch.float32, reduction=reduction)
    losses, slopes = run(case, backend, device)
    assert losses.tolist() == [0.0, 0.0]
    assert slopes.shape == (2, 0, 5)


def test_the_batch_may_be_another_than_that_of_the_pyramid(backend, device):
    """As where sums of several ranks were gathered."""
    case = SumsCase((3, 2), (12, 30), 4, "paper")
    fewer = dataclasses.replace(case, batch=2)
    S, M = case.tensors(device)
    losses, slopes = kernels_of(backend).losses(S, M, fewer.pyramid, case.options, None)
    wanted = run(case, backend, device)
    assert torch.equal(losses, wanted[0])
    assert torch.equal(slopes, wanted[1])


@pytest.mark.parametrize("weight", ["valid", "none", "region", "pixels"])
@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
def test_inputs_with_strides_give_the_same(backend, device, weight, exchange):
    case = SumsCase((3, 2), (12, 30), 4, Formula(weight), exchange=exchange)
    S, M = case.tensors(device)
    pairing = PAIRINGS[exchange]
    pairing = None if pairing is None else pairing.to(device)
    spread = None if pairing is None else torch.stack([pairing, pairing], -1)[..., 0]
    turned = (S.transpose(0, 2).contiguous().transpose(0, 2), M.transpose(0, 1).contiguous().transpose(0, 1))
    kernels = kernels_of(backend)
    plain = kernels.losses(S, M, case.pyramid, case.options, pairing)
    other = kernels.losses(*turned, case.pyramid, case.options, spread)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
def test_the_same_bits_twice(backend, device, exchange):
    pairings = {
        "shuffle": torch.tensor([6, 6, 1, 2, 3, 0, 0]),
        "pooled": torch.tensor([[0, 1], [2, 3], [0, 4], [5, 6], [5, 6]]),
    }
    case = SumsCase(
        (33, 5), (64, 16), 7, "paper", torch.float32, exchange=exchange, pairing=pairings.get(exchange)
    )
    for first, second in zip(run(case, backend, device), run(case, backend, device), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("convention", "loss", "slope_fg", "slope_bg"),
    # Φ = 2 and Β = 4, so x = -2 and z = 6: D = 4 and 4/36.
    [("definition4", -math.log(4), 1, -1), ("lemma7", math.log(3), 2 / 3, -1 / 3)],
)
def test_channels_that_cancel_are_added_in_float64_by_hand(language, convention, loss, slope_fg, slope_bg):
    """In float32 the ones beside 2^26 would be lost."""
    kernels, device = language
    fg, bg = [2.0**26, 1, -(2.0**26), 1], [1, -(2.0**26), 2.0**26, 3]
    sums = torch.tensor([[fg], [bg]], device=device)
    masses = torch.ones(2, 1, 1, device=device)
    options = get_convention(convention).options("none", "mean", 1e-12)
    pyramid = describe([torch.empty(1, 4, 2, device=device)])
    losses, slopes = kernels.losses(sums, masses, pyramid, options, None)
    assert losses.tolist() == [pytest.approx(loss, rel=1e-6)]
    assert slopes[0].tolist() == [[pytest.approx(slope_fg, rel=1e-6)] * 4]
    assert slopes[1].tolist() == [[pytest.approx(slope_bg, rel=1e-6)] * 4]
