"""Losses of several classes on every backend: by hand, by definition one by one, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import fdkernels as fdk
from cases import lay_out
from fdkernels.classes import Classes

FORMULAS: dict[str, Callable[..., Tensor]] = {
    "paper": lambda f, b, V, W, u: -((f / V[0] - b / W[0]).square().sum() + 1e-12).log(),
    "definition4": lambda f, b, V, W, u: -((f - b).sum().square() + 1e-12).log(),
    "algorithm1": lambda f, b, V, W, u: -((f / V[0] - b / W[0]).square().sum() + 1e-12).log() / 2,
    "lemma7": lambda f, b, V, W, u: (
        -((f - b).sum().square() / ((f + b).sum().square() + 1e-12) + 1e-12).log() / 2
    ),
    "region_mean": lambda f, b, V, W, u: -((f / V[1] - b / W[2]).square().sum() + 1e-12).log(),
    "fisher": lambda f, b, V, W, u: -((f / V[1] - b / W[2]).square().sum() / (u + 1e-12) + 1e-12).log() / 2,
}


def planes_of(mask: Tensor, mode: str, K: int, ignore_index: float | None) -> tuple[Tensor, Tensor]:
    """The classes [N, K, *S0] and the validity [N, 1, *S0] of a mask, by definition, in float64."""
    if mask.dim() == 3 or (mask.shape[1] == 1 and K > 1):
        indices = mask.reshape(mask.shape[0], *mask.shape[-2:])
        w = torch.stack([indices == k for k in range(K)], dim=1).double()
        ignored = (indices == ignore_index).unsqueeze(1) if ignore_index is not None else None
    else:
        w = mask.double()
        ignored = (mask == ignore_index).any(1, keepdim=True) if ignore_index is not None else None
    v = torch.ones_like(w[:, :1]) if ignored is None else (~ignored).double()
    return torch.where(v != 0, w, 0), v


def entries(
    features: Tensor,
    mask: Tensor,
    *,
    mode: str,
    K: int,
    convention: str = "paper",
    ignore_index: float | None = None,
    pairs: list[tuple[int, int]] | None = None,
    include_background: bool = True,
    pairing: list[int] | None = None,
) -> dict[tuple[int, int], Tensor]:
    """L[n, k] of the entries that count, one by one, in float64."""
    F = features.double()
    w, v = planes_of(mask, mode, K, ignore_index)
    fg = functional.adaptive_avg_pool2d(v * w, F.shape[2:])  # [N, K, *S]
    rests = functional.adaptive_avg_pool2d(v * (1 - w), F.shape[2:])
    sides: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for n in range(F.shape[0]):
        if pairs is not None:
            for e, (i, j) in enumerate(pairs):
                sides[n, e] = fg[n, i], fg[n, j]
            continue
        for e, k in enumerate(range(0 if include_background else 1, K)):
            others = [fg[n, j] for j in range(K) if j != k]
            sides[n, e] = fg[n, k], rests[n, k] if mode == "multilabel" else sum(others)
    counted = {key: pair for key, pair in sides.items() if all(side.sum() > 1e-9 for side in pair)}

    def term(foreground: tuple[int, int], background: tuple[int, int]) -> Tensor:
        (n, _), (m, _) = foreground, background
        masses = []
        for key in (foreground, background):
            of_fg, of_bg = (side.sum() for side in counted[key])
            masses.append((of_fg + of_bg, of_fg, of_bg))
        y, z = counted[foreground][0], counted[background][1]
        f, b = (F[n] * y).sum((1, 2)), (F[m] * z).sum((1, 2))
        u_f = ((F[n] - (f / y.sum())[:, None, None]).square() * y).sum() / y.sum()
        u_b = ((F[m] - (b / z.sum())[:, None, None]).square() * z).sum() / z.sum()
        return FORMULAS[convention](f, b, *masses, u_f + u_b)

    found = {}
    for n, e in counted:
        found[n, e] = term((n, e), (n, e))
        if pairing is not None and (pairing[n], e) in counted:
            found[n, e] = found[n, e] + term((pairing[n], e), (n, e))
    return found


def test_numbers_by_hand(backend, device):
    """Two channels, three classes of one, one and two pixels: S = (1, 0), (2, 0), (0, 8), V = 4."""
    features = torch.tensor([[[[1.0, 2.0, 0.0, 0.0]], [[0.0, 0.0, 3.0, 5.0]]]], device=device)
    mask = torch.tensor([[[0, 1, 2, 2]]], device=device)
    given = {"mode": "multiclass", "num_classes": 3, "backend": backend}
    sums = fdk.region_sums(features, mask, **given)
    assert sums.fg.tolist() == [[[1, 0], [2, 0], [0, 8]]]
    assert sums.bg.tolist() == [[[2, 8], [1, 8], [3, 0]]]
    assert (sums.fg_mass.tolist(), sums.bg_mass.tolist()) == ([[1, 1, 2]], [[3, 3, 2]])
    wanted = [-math.log((1 + 64) / 16), -math.log((1 + 64) / 16), -math.log((9 + 64) / 16)]
    each = fdk.feature_discrepancy_loss(features, mask, reduction="none", **given)
    assert each.shape == (1, 3)
    assert each[0].tolist() == pytest.approx(wanted, rel=1e-6)
    mean = fdk.feature_discrepancy_loss(features, mask, **given)
    assert mean.item() == pytest.approx(sum(wanted) / 3, rel=1e-6)
    without = fdk.feature_discrepancy_loss(features, mask, include_background=False, **given)
    assert without.item() == pytest.approx(sum(wanted[1:]) / 2, rel=1e-6)
    pair = fdk.feature_discrepancy_loss(features, mask, pairs=[(0, 2)], **given)
    assert pair.item() == pytest.approx(-math.log((1 + 64) / 9), rel=1e-6)  # V = 1 + 2


def test_overlapping_classes_by_hand(backend, device):
    """The rest of each class is what the class does not cover, whatever the other class says."""
    features = torch.tensor([[[[1.0, 2.0, 4.0, 8.0]]]], device=device)
    mask = torch.tensor([[[[1, 1, 0, 0]], [[0, 1, 1, 1]]]], device=device)
    sums = fdk.region_sums(features, mask, mode="multilabel", backend=backend)
    assert (sums.fg.flatten().tolist(), sums.bg.flatten().tolist()) == ([3, 14], [12, 1])
    loss = fdk.feature_discrepancy_loss(features, mask, mode="multilabel", backend=backend, reduction="sum")
    assert loss.item() == pytest.approx(-math.log(81 / 16) - math.log(169 / 16), rel=1e-6)


def test_fisher_by_hand(backend, device):
    """Means 2 and 10, variances 1 and 4: D = 64 / 5."""
    features = torch.tensor([[[[1.0, 3.0, 8.0, 12.0]]]], device=device)
    mask = torch.tensor([[[1, 1, 0, 0]]], device=device)
    loss = fdk.feature_discrepancy_loss(features, mask, convention="fisher", backend=backend)
    assert loss.item() == pytest.approx(-math.log(64 / 5) / 2, rel=1e-6)


@pytest.mark.parametrize(
    "given",
    [
        {"mode": "binary"},
        {"num_classes": 2},
        {"num_classes": 5},  # the rest of a class is three regions without pixels and one with
        {"num_classes": 3, "pairs": [(0, 1), (1, 0)]},
    ],
    ids=lambda given: " ".join(map(str, given.values())),
)
def test_fisher_of_regions_without_spread_by_hand(backend, device, given):
    """Two pixels, 10.1 and 10.7: D = 0.36 / ε for either against the other, ∂L/∂F = ±1/0.6 of each entry.

    The variances are 0, and their gradient is 1/ε times 0, which rounding must not turn into a number.
    """
    features = torch.tensor([[[[10.1, 10.7]]]], dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.tensor([[[0, 1]]], device=device)
    num_entries = 1 if given.get("mode") == "binary" else 2
    given = {"mode": "multiclass", **given, "convention": "fisher", "reduction": "sum", "backend": backend}
    loss = fdk.feature_discrepancy_loss(features, mask, **given)
    assert loss.item() == pytest.approx(-num_entries * math.log(0.36 / 1e-12) / 2, rel=1e-9)
    (grad,) = torch.autograd.grad(loss, features)
    assert grad.flatten().tolist() == pytest.approx([num_entries * sign / 0.6 for sign in (1, -1)], rel=1e-9)


def test_fisher_of_a_rest_of_equal_classes(backend, device):
    """Classes of one value each, two of them equal: the rest of the third has no spread."""
    features = torch.tensor([[[[10.1, 10.7, 10.7]]]], device=device, requires_grad=True)
    mask = torch.tensor([[[0, 1, 2]]], device=device)
    given = {"mode": "multiclass", "num_classes": 3, "convention": "fisher", "backend": backend}
    each = fdk.feature_discrepancy_loss(features, mask, reduction="none", **given)
    (grad,) = torch.autograd.grad(each[0, 0], features)
    apart = (features[..., 1] - features[..., 0]).item()
    assert each[0, 0].item() == pytest.approx(-math.log(apart**2 / 1e-12) / 2, rel=1e-6)
    assert grad.flatten().tolist() == pytest.approx([1 / apart, -0.5 / apart, -0.5 / apart], rel=1e-6)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Features of one layer, a mask of two or three classes and the arguments of a call."""
    N, C, K = draw(st.integers(2, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    size = draw(st.sampled_from([(4, 4), (2, 4), (3, 5)]))
    features = torch.randn(N, C, 4, 4, generator=generator, dtype=torch.float64)
    features = lay_out(features, draw(st.sampled_from(["contiguous", "channels_last"])))
    mode = draw(st.sampled_from(["multiclass", "multilabel"]))
    kind = draw(st.sampled_from(["indices", "one-hot", "soft"])) if mode == "multiclass" else "soft"
    if mode == "multilabel" and draw(st.booleans()):
        mask = (torch.rand(N, K, *size, generator=generator) > 0.5).to(torch.uint8)
    elif kind == "soft":
        mask = torch.rand(N, K, *size, generator=generator, dtype=torch.float64)
        mask = mask.softmax(1) if mode == "multiclass" else mask
    else:
        mask = torch.randint(0, K, (N, *size), generator=generator)
        if draw(st.booleans()):
            mask[0] = mask[0].clamp(max=K - 2)  # a class that the first sample does not hold
    ignored = torch.rand(N, *size, generator=generator) < 0.3
    ignore_index = None
    if draw(st.booleans()):
        ignore_index = 9
        mask = mask.masked_fill(ignored if mask.dim() == 3 else ignored.unsqueeze(1), 9)
    if kind == "one-hot" and ignore_index is None and mask.dim() == 3:
        mask = functional.one_hot(mask, K).movedim(-1, 1)
    options: dict[str, Any] = {
        "mode": mode,
        "convention": draw(st.sampled_from(list(FORMULAS))),
        "ignore_index": ignore_index,
        "pairs": draw(st.sampled_from([None, None, [(0, 1)], [(1, 0), (0, 1)]])),
        "pairing": draw(st.sampled_from([None, [*range(1, N), 0]])),
    }
    if options["pairs"] is None:
        options["include_background"] = draw(st.booleans())
    return features, mask, {"K": K, **options}


def test_losses_and_gradients_are_those_of_the_definition(backend, device, for_all):
    @for_all(calls())
    def check(call):
        features, mask, options = call
        features.requires_grad_()
        found = entries(features, mask, **options)
        wanted = sum(found.values()) / len(found) if found else features.sum() * 0
        kept = {name: value for name, value in options.items() if name not in ("K", "pairing")}
        if options["pairing"] is not None:
            kept |= {"exchange": "shuffle", "pairing": options["pairing"]}
        given = {**kept, "num_classes": options["K"], "backend": backend, "aspect": "any"}
        moved = features.detach().to(device).requires_grad_()
        loss = fdk.feature_discrepancy_loss(moved, mask.to(device), **given)
        assert torch.allclose(loss.cpu(), wanted.detach(), rtol=1e-9, atol=1e-9), (loss, wanted)
        (grad,) = torch.autograd.grad(wanted, features)
        (got,) = torch.autograd.grad(loss, moved)
        assert torch.allclose(got.cpu(), grad, rtol=1e-6, atol=1e-8)
        each = fdk.feature_discrepancy_loss([moved, moved], mask.to(device), reduction="none", **given)
        assert each.shape[:2] == (features.shape[0], 2)
        for n in range(features.shape[0]):
            for e in range(each.shape[2]):
                value = found[n, e].item() if (n, e) in found else 0.0
                assert each[n, 1, e].item() == pytest.approx(value, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("convention", ["paper", "fisher"])
def test_soft_classes_pass_gradcheck_and_gradgradcheck(convention):
    features = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def loss(features: Tensor, mask: Tensor) -> Tensor:
        return fdk.feature_discrepancy_loss(features, mask, mode="multilabel", convention=convention)

    assert gradcheck(loss, (features, mask))
    assert gradgradcheck(loss, (features, mask))


def test_second_derivatives_of_a_pass_with_slopes():
    features = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[[0, 1], [2, 1]], [[1, 1], [0, 2]]])
    assert gradgradcheck(
        lambda of: fdk.feature_discrepancy_loss(of, mask, mode="multiclass", num_classes=3), (features,)
    )


def test_two_classes_without_background_are_the_binary_loss(backend, device):
    features, mask = torch.randn(3, 4, 8, 8, device=device), torch.rand(3, 8, 8, device=device) > 0.5
    binary = fdk.feature_discrepancy_loss(features, mask, backend=backend)
    given = {"mode": "multiclass", "num_classes": 2, "include_background": False, "backend": backend}
    assert fdk.feature_discrepancy_loss(features, mask.long(), **given).item() == pytest.approx(
        binary.item(), rel=1e-6
    )


def test_scaling_and_shifting_the_features_leaves_fisher_unchanged(backend, device):
    features, mask = torch.randn(2, 3, 16, 16, device=device), torch.rand(2, 1, 16, 16, device=device) > 0.5
    shift = torch.tensor([1e3, -2e3, 5e2], device=device).view(3, 1, 1)
    given = {"convention": "fisher", "backend": backend}
    loss = fdk.feature_discrepancy_loss(features, mask, **given).item()
    moved = 8 * features + shift
    assert fdk.feature_discrepancy_loss(8 * features, mask, **given).item() == pytest.approx(loss, rel=1e-5)
    exact = fdk.feature_discrepancy_loss(moved.double().cpu(), mask.cpu(), convention="fisher").item()
    assert fdk.feature_discrepancy_loss(moved, mask, **given).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("convention", ["paper", "fisher"])
def test_taps_give_the_gradients_of_plain_features(backend, device, convention):
    mask = torch.randint(0, 3, (2, 8, 8), device=device)
    given = {"mode": "multiclass", "num_classes": 3, "convention": convention, "backend": backend}
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 2, 3, padding=1)
    ).to(device)
    images, grads = torch.randn(2, 1, 8, 8, device=device), []
    for fused in (False, True):
        network.zero_grad()
        with fdk.FeatureTaps(network, ["0", "1"], fused=fused) as taps:
            logits = network(images)
            loss = fdk.feature_discrepancy_loss(taps if fused else taps.features, mask, **given)
            (logits.square().mean() + loss).backward()
        grads.append([parameter.grad.clone() for parameter in network.parameters()])
    features = torch.randn(2, 4, 8, 8, device=device, requires_grad=True)
    out, loss = fdk.tap(features, mask, **given)
    (out.square().sum() + loss).backward()
    plain = features.detach().requires_grad_()
    (plain.square().sum() + fdk.feature_discrepancy_loss(plain, mask, **given)).backward()
    for got, wanted in zip([*grads[1], features.grad], [*grads[0], plain.grad], strict=True):
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_second_derivatives_through_fused_taps_of_classes_are_refused():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1))
    mask = torch.randint(0, 3, (2, 4, 4))
    with fdk.FeatureTaps(network, ["0"], fused=True) as taps:
        network(torch.randn(2, 1, 4, 4))
        loss = fdk.feature_discrepancy_loss(taps, mask, mode="multiclass", num_classes=3)
    with pytest.raises(RuntimeError, match="no second derivatives with several classes"):
        torch.autograd.grad(loss, list(network.parameters()), create_graph=True)


def test_the_module_takes_classes_and_trains_alpha():
    crit = fdk.FeatureDiscrepancyLoss(
        1, mode="multiclass", num_classes=3, convention="fisher", alpha_init=0.5
    )
    features, mask = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randint(0, 3, (2, 8, 8))
    crit(features, mask).backward()
    assert features.grad.abs().sum() > 0
    assert crit.alpha.grad is not None


@pytest.mark.parametrize("convention", ["paper", "fisher"])
def test_a_compiled_graph_gives_the_same(convention):
    features, mask = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randint(0, 3, (2, 8, 8))

    def loss(features: Tensor, mask: Tensor) -> Tensor:
        return fdk.feature_discrepancy_loss(
            features, mask, mode="multiclass", num_classes=3, convention=convention
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (wanted,) = torch.autograd.grad(loss(features, mask), features)
    (got,) = torch.autograd.grad(compiled(features, mask), features)
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-7)
    wrong = mask.clone()
    wrong[0, 0, 0] = 7
    assert compiled(features, wrong).isnan()  # a graph checks no values


def test_torch_func_sees_through_classes():
    features, mask = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(0, 3, (2, 4, 4))

    def loss(features: Tensor) -> Tensor:
        return fdk.feature_discrepancy_loss(features, mask, mode="multiclass", num_classes=3)

    wanted = torch.autograd.grad(loss(features.requires_grad_()), features)[0]
    assert torch.allclose(torch.func.grad(loss)(features.detach()), wanted)


INDICES = torch.randint(0, 3, (2, 4, 4))
ONE_HOT = functional.one_hot(INDICES, 3).movedim(-1, 1)
REFUSED = {
    "no number of classes": (
        INDICES,
        {"mode": "multiclass"},
        "num_classes must be given for a mask of class",
    ),
    "indices as binary": (
        INDICES.clamp(min=2),
        {},
        "values from 2 to 2; class indices take mode='multiclass'",
    ),
    "planes as binary": (ONE_HOT, {}, "got 3 channels.*takes mode='multiclass', or 'multilabel'"),
    "indices as multilabel": (INDICES, {"mode": "multilabel"}, "class indices take mode='multiclass'"),
    "one channel of indices as multilabel": (
        INDICES.unsqueeze(1),
        {"mode": "multilabel", "num_classes": 3},
        "class indices take mode='multiclass'",
    ),
    "an index too large": (
        INDICES.clamp(min=2),
        {"mode": "multiclass", "num_classes": 2},
        "class indices from 0 to 1.*got values from 2 to 2; name the value of pixels to leave out",
    ),
    "fractions as indices": (INDICES + 0.5, {"mode": "multiclass", "num_classes": 3}, "no whole numbers"),
    "overlapping classes": (
        torch.ones(2, 3, 4, 4),
        {"mode": "multiclass"},
        "add up to at most 1, got 3; classes that overlap take mode='multilabel'",
    ),
    "another number of channels": (ONE_HOT, {"mode": "multilabel", "num_classes": 4}, "got 3 in"),
    "values beyond 1": (ONE_HOT * 255, {"mode": "multilabel"}, "divide a 0/255 mask by 255"),
    "released": (
        INDICES,
        {"mode": "multiclass", "num_classes": 3, "convention": "released"},
        "mode='binary'",
    ),
    "pooled": (
        INDICES,
        {"mode": "multiclass", "num_classes": 3, "exchange": "pooled", "domains": [0, 1]},
        "exchange='pooled' is for mode='binary', got mode='multiclass'",
    ),
    "another mode": (
        INDICES,
        {"mode": "one-hot"},
        "mode must be one of 'binary', 'multiclass', 'multilabel'",
    ),
    "classes as binary": (INDICES, {"num_classes": 3}, "num_classes=3 needs mode='multiclass'"),
    "a pair of one class": (ONE_HOT, {"mode": "multiclass", "pairs": [(1, 1)]}, "two different classes"),
    "a pair beyond the classes": (
        ONE_HOT,
        {"mode": "multiclass", "pairs": [(0, 3)]},
        r"from 0 to 2, got \(0, 3\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fits_no_mode_is_refused_in_a_sentence(name):
    mask, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        fdk.feature_discrepancy_loss(torch.randn(2, 3, 4, 4), mask, **options)


def test_the_channel_of_one_dimensional_indices_is_read_by_the_number_of_classes():
    features = torch.randn(2, 3, 8)
    indices = torch.randint(0, 3, (2, 8))
    given = {"mode": "multiclass", "num_classes": 3}
    a, b = (fdk.feature_discrepancy_loss(features, mask, **given) for mask in (indices, indices.unsqueeze(1)))
    assert torch.equal(a, b)
    planes = functional.one_hot(indices, 3).movedim(-1, 1)
    assert torch.equal(fdk.feature_discrepancy_loss(features, planes, **given), a)


@pytest.mark.parametrize("K", [2, 3, 4, 7, 8, 21])
def test_the_rest_of_a_class_is_the_sum_of_all_others_and_sees_nothing_of_its_own(K):
    regions = torch.randint(-99, 99, (K, 2, 3)).double()
    regions[K // 2, 0, 0] = float("nan")
    classes, rest = Classes.of("multiclass", K, True, None).sides(regions)
    assert classes is regions or torch.equal(classes.nan_to_num(), regions.nan_to_num())
    for k in range(K):
        others = torch.cat([regions[:k], regions[k + 1 :]]).sum(0)
        torch.testing.assert_close(rest[k], others, rtol=0, atol=0, equal_nan=True)
    assert rest[:, 0, 0].isnan().sum() == K - 1


class Names(TorchDispatchMode):
    """The operations of torch that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# On a GPU torch refuses them under `use_deterministic_algorithms`, products unless a variable is set as well.
REFUSED_WHERE_DETERMINISTIC = {
    *("cumsum", "cumprod", "logcumsumexp", "bincount", "histc", "median", "kthvalue"),
    *("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "scatter_reduce", "scatter_add", "put_"),
}


@pytest.mark.parametrize("exchange", ["none", "shuffle"])
@pytest.mark.parametrize("convention", ["paper", "fisher"])
@pytest.mark.parametrize("mode", ["binary", "multiclass", "multilabel"])
def test_beside_kernels_nothing_runs_that_torch_refuses_where_algorithms_must_be_deterministic(
    mode, convention, exchange
):
    if fdk.backends()["cpu"] is not None:
        pytest.skip(f"backend 'cpu': {fdk.backends()['cpu']}")
    planes = functional.one_hot(torch.randint(0, 3, (2, 6, 6)), 3).movedim(-1, 1)
    mask = planes[:, :1] if mode == "binary" else planes
    layers = [torch.randn(2, 5, size, size, requires_grad=True) for size in (6, 3)]
    pairing = torch.tensor([1, 0]) if exchange == "shuffle" else None
    with Names() as names:
        fdk.feature_discrepancy_loss(
            layers, mask, mode=mode, convention=convention, exchange=exchange, pairing=pairing
        ).backward()
    assert len(names.seen) > 3
    assert names.seen & REFUSED_WHERE_DETERMINISTIC == set()
