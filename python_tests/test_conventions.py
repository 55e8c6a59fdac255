"""Every convention and exchange by numbers worked out by hand, and conventions as data."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import fdkernels as fdk
import oracles

# Two samples, two channels, two pixels; the first pixel is foreground, the second background.
#   sample 0: S_fg = (3, 1), S_bg = (1, 0)
#   sample 1: S_fg = (2, 2), S_bg = (0, 1)
FEATURES = torch.tensor([[[3.0, 1.0], [1.0, 0.0]], [[2.0, 0.0], [2.0, 1.0]]])  # [N, C, P]
MASK = torch.tensor([[1, 0], [1, 0]])  # [N, P]
# V = P = 2, M_fg = M_bg = 1

log = math.log
OWN = {
    # f - b = S/2: (1, ½) and (1, ½), so D = 1.25 and 1.25
    "paper": [-log(1.25), -log(1.25)],
    # Σ_c: 4 - 1 and 4 - 1, so D = 9 and 9
    "definition4": [-log(9), -log(9)],
    "algorithm1": [-log(1.25) / 2, -log(1.25) / 2],
    # D = 9 / (4 + 1)²
    "lemma7": [-log(9 / 25) / 2, -log(9 / 25) / 2],
    # f - b = S: (2, 1) and (2, 1), so D = 5
    "region_mean": [-log(5), -log(5)],
    # f = S_fg/2, b = ½ - f: f - b = 2f - ½ = (2.5, 0.5) and (1.5, 1.5); over the samples, for each channel,
    # the squares add up to 6.25 + 2.25 and 0.25 + 2.25
    "released": [-log(8.5) / 2, -log(2.5) / 2],
}
# Foreground of the other sample against the own background:
#   f[1] - b[0] = ((2, 2) - (1, 0)) / 2 = (½, 1), f[0] - b[1] = ((3, 1) - (0, 1)) / 2 = (1.5, 0)
SHUFFLED = {
    "paper": [-log(1.25), -log(2.25)],
    # f - b summed over the channels: 4 - 1 and 4 - 1
    "definition4": [-log(9), -log(9)],
    "algorithm1": [-log(1.25) / 2, -log(2.25) / 2],
    "lemma7": [-log(9 / 25) / 2, -log(9 / 25) / 2],
    # f - b is twice that of "paper": (1, 2) and (3, 0)
    "region_mean": [-log(5), -log(9)],
    # b = ½ - f: b[0] = (-1, 0), b[1] = (-½, -½); f[1] - b[0] = (2, 1), f[0] - b[1] = (2, 1)
    "released": [-log(8) / 2, -log(2) / 2],
}
# One pair, (0, 1): D_01 + D_10 of the two above, for every entry
POOLED = {
    "paper": -log(1.25 + 2.25),
    "definition4": -log(18),
    "algorithm1": -log(1.25 + 2.25) / 2,
    "lemma7": -log(18 / 25) / 2,
    "region_mean": -log(14),
    # for each channel 2² + 2² and 1² + 1²
    "released": [-log(8) / 2, -log(2) / 2],
}


def entries(
    convention: str, device: torch.device | str = "cpu", mask: torch.Tensor = MASK, **options
) -> list[float]:
    there = {name: value.to(device) if name == "pairing" else value for name, value in options.items()}
    loss = fdk.feature_discrepancy_loss(
        FEATURES.to(device), mask.to(device), convention=convention, reduction="none", eps=0.0, **there
    )
    return loss.tolist()


@pytest.mark.parametrize("convention", oracles.CONVENTIONS)
def test_own_term_by_hand(backend, device, convention):
    assert entries(convention, device, backend=backend) == pytest.approx(OWN[convention], rel=1e-6)


@pytest.mark.parametrize("convention", oracles.CONVENTIONS)
def test_shuffled_term_by_hand(backend, device, convention):
    wanted = [own + crossed for own, crossed in zip(OWN[convention], SHUFFLED[convention], strict=True)]
    got = entries(convention, device, exchange="shuffle", pairing=torch.tensor([1, 0]), backend=backend)
    assert got == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("convention", oracles.CONVENTIONS)
def test_pooled_term_by_hand(backend, device, convention):
    crossed = POOLED[convention] if convention == "released" else [POOLED[convention]] * 2
    wanted = [own + pair for own, pair in zip(OWN[convention], crossed, strict=True)]
    got = entries(convention, device, exchange="pooled", pairing=torch.tensor([[0, 1]]), backend=backend)
    assert got == pytest.approx(wanted, rel=1e-6)


def test_released_masks_are_max_pooled(backend, device):
    # Two cells of two pixels; "max" makes the first foreground, "area" would make it one half.
    mask = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0]])
    assert entries("released", device, mask, backend=backend) == pytest.approx(OWN["released"], rel=1e-6)


def test_released_has_no_gradient_on_background(backend, device):
    features = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    mask = torch.rand(2, 4, 4, device=device) > 0.5
    loss = fdk.feature_discrepancy_loss(features, mask, convention="released", backend=backend)
    (grad,) = torch.autograd.grad(loss, features)
    background = ~mask.unsqueeze(1).expand_as(grad)
    assert grad[background].abs().max() == 0
    assert (grad[~background] != 0).all()


def test_lemma7_does_not_change_when_features_are_scaled():
    loss = entries("lemma7")
    scaled = fdk.feature_discrepancy_loss(64 * FEATURES, MASK, convention="lemma7", reduction="none", eps=0.0)
    assert scaled.tolist() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("name", oracles.CONVENTIONS)
def test_presets_can_be_passed_as_data(name):
    assert entries(fdk.CONVENTIONS[name]) == entries(name)
    assert fdk.CONVENTIONS[name].name == name


def test_a_user_can_build_another_convention():
    # (f - b) with region means, summed over channels: (2 + 1)² = 9, and the norm: -½·log 9
    own = fdk.Convention("mine", region_weight="region", norm="channel_sum", log_scale=0.5)
    assert entries(own) == pytest.approx([-log(3), -log(3)], rel=1e-6)


def test_a_convention_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        fdk.CONVENTIONS["paper"].log_scale = 2.0


def test_the_presets_are_the_six_of_the_paper_and_fisher():
    assert tuple(fdk.CONVENTIONS) == (*oracles.CONVENTIONS, "fisher")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"region_weight": "sum"}, "region_weight must be one of 'valid'.*got 'sum'"),
        ({"norm": "l1"}, "norm must be one of 'vector'.*got 'l1'"),
        ({"mask_resize": "bilinear"}, "mask_resize must be one of 'area'.*got 'bilinear'"),
        ({"log_scale": 0.0}, "log_scale must be positive, got 0.0"),
        ({"log_scale": float("nan")}, "log_scale must be positive, got nan"),
        (
            {"norm": "fisher"},
            "needs region_weight='region' and masked_background=False, got 'valid' and False",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_wrong_convention_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        fdk.Convention("mine", **wrong)
