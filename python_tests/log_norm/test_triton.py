"""Backend `triton` of log_norm against complex steps through the formulas in NumPy, in float64.

The oracle below walks over samples and pairs one by one, as README.md of the stage writes them; its
gradient is the imaginary part of the loss for an input moved by 1e-30i, exact to rounding.
"""

from __future__ import annotations

import itertools
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from fdkernels.log_norm.impl import triton as backend
from fdkernels.log_norm.options import EXCHANGES, NORMS, REDUCTIONS, REGION_WEIGHTS, Options

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs a CUDA device or TRITON_INTERPRET=1",
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy"),  # the interpreter computes with NumPy
]

CHANNELS, PIXELS = [3, 2], [12, 30]
DEFAULT = Options("valid", False, "vector", 1.0, 1e-12, "none", "mean")
PAIRINGS = {
    "none": None,
    "shuffle": torch.tensor([3, 3, 2, 0]),  # sample 1 is nobody's partner, 3 is two's
    "pooled": torch.tensor([[0, 1], [3, 3], [-1, 2], [0, 3], [2, 0]]),
}
STEP = 1e-30


@pytest.fixture(autouse=True, scope="module")
def _unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _inputs(samples, channels, dtype=torch.float64):
    """Sums and masses; in the first layer sample 1 has no pixel, sample 2 no foreground."""
    sums = torch.randn(2, samples, sum(channels), dtype=dtype)
    masses = torch.rand(2, samples, len(channels), dtype=dtype) + 0.5
    masses[:, 1:2, 0] = 0
    masses[0, 2:3, 0] = 0
    return sums.to(DEVICE), masses.to(DEVICE)


def _expected(sums, masses, pairing, channels, pixels, options):
    """The entries of every layer [L][N] (or [L][C]), and the loss; sums and masses may be complex."""
    layers, losses = [], []
    start = 0
    for layer, (C, P) in enumerate(zip(channels, pixels, strict=True)):
        S_fg, S_bg = sums[:, :, start : start + C]
        start += C
        f, b, counts = _region_features(S_fg, S_bg, *masses[:, :, layer], P, options)
        if options.norm == "batch":
            entries, counted = _batch_entries(f, b, counts, pairing, options)
        else:
            entries, counted = _sample_entries(f, b, counts, pairing, options)
        entries = np.where(counted, entries, 0)
        layers.append(entries)
        divisor = {"none": 1, "sum": 1, "mean": max(sum(counted), 1)}[options.reduction]
        losses.append(entries.sum() / divisor)
    if options.reduction != "none":
        return np.array(losses)
    return np.concatenate(layers) if options.norm == "batch" else np.stack(layers, -1)


def _region_features(S_fg, S_bg, M_fg, M_bg, P, options):
    V = M_fg + M_bg
    counts = V.real > 0
    if options.region_weight == "region":
        counts = (M_fg.real > 0) & (M_bg.real > 0)
    if options.masked_background:
        S_bg = M_fg[:, None] - S_fg
    one = np.ones_like(V)
    divisors = {"valid": (V, V), "none": (one, one), "region": (M_fg, M_bg), "pixels": (P * one,) * 2}
    w_fg, w_bg = (np.where(counts, w, 1)[:, None] for w in divisors[options.region_weight])
    return S_fg / w_fg, S_bg / w_bg, counts


def _distance(f, b, options):
    if options.norm == "vector":
        return ((f - b) ** 2).sum()
    distance = (f.sum() - b.sum()) ** 2
    if options.norm == "relative":
        distance /= (f.sum() + b.sum()) ** 2 + options.eps
    return distance


def _sample_entries(f, b, counts, pairing, options):
    def log(distance):
        return -options.log_scale * np.log(distance + options.eps)

    pooled = []
    if options.exchange == "pooled":
        for i, j in pairing:
            if i >= 0 and j >= 0 and counts[i] and counts[j]:
                pooled.append(log(_distance(f[i], b[j], options) + _distance(f[j], b[i], options)))
    entries = []
    for n in range(len(f)):
        entry = log(_distance(f[n], b[n], options)) + (np.mean(pooled) if pooled else 0)
        if options.exchange == "shuffle" and counts[pairing[n]]:
            entry += log(_distance(f[pairing[n]], b[n], options))
        entries.append(entry)
    return np.array(entries, dtype=f.dtype), counts


def _batch_entries(f, b, counts, pairing, options):
    pairs = [(n, n) for n in range(len(f))]
    terms = [pairs]
    if options.exchange == "shuffle":
        terms.append([(int(pairing[n]), n) for n in range(len(f))])
    if options.exchange == "pooled":
        both = [(i, j) for i, j in pairing if i >= 0 and j >= 0]
        terms.append([*both, *((j, i) for i, j in both)])
    entries = np.zeros(f.shape[1], dtype=f.dtype)
    for term in terms:
        met = [(f[i] - b[j]) ** 2 for i, j in term if counts[i] and counts[j]]
        if met:
            entries -= options.log_scale * np.log(sum(met) + options.eps)
    return entries, np.full(f.shape[1], counts.any())


def _expected_gradients(grad_loss, sums, masses, *arguments):
    gradients = []
    for which in (0, 1):
        gradient = np.zeros((sums, masses)[which].shape)
        for place in np.ndindex(gradient.shape):
            inputs = [sums.astype(complex), masses.astype(complex)]
            inputs[which][place] += 1j * STEP
            gradient[place] = (grad_loss * _expected(*inputs, *arguments)).sum().imag / STEP
        gradients.append(gradient)
    return gradients


def _numpy(tensor):
    return None if tensor is None else tensor.detach().cpu().numpy()


def _check(sums, masses, pairing, channels, pixels, options, tolerance):
    pairing = pairing if pairing is None else pairing.to(DEVICE)
    arguments = (pairing, channels, pixels, options)
    wide = _numpy(sums.double()), _numpy(masses.double())
    loss = backend.forward(sums, masses, *arguments)
    expected = _expected(*wide, _numpy(pairing), *arguments[1:])
    assert loss.dtype == sums.dtype
    np.testing.assert_allclose(_numpy(loss), expected, rtol=tolerance, atol=tolerance)

    grad_loss = torch.randn(loss.shape, dtype=loss.dtype, device=DEVICE)
    gradients = backend.backward(grad_loss, sums, masses, *arguments)
    expected = _expected_gradients(_numpy(grad_loss.double()), *wide, _numpy(pairing), *arguments[1:])
    for gradient, of, wanted in zip(gradients, (sums, masses), expected, strict=True):
        assert (gradient.dtype, gradient.shape) == (of.dtype, of.shape)
        np.testing.assert_allclose(
            _numpy(gradient), wanted, rtol=tolerance, atol=tolerance * max(abs(wanted).max(), 1)
        )


def _cases():
    """Every norm with every exchange and weight; reductions and backgrounds take turns."""
    cases = itertools.product(NORMS, EXCHANGES, REGION_WEIGHTS)
    for number, (norm, exchange, weight) in enumerate(cases):
        masked = (number // 4 + number) % 2 == 1
        reduction = REDUCTIONS[(number + number // 3) % 3]
        scale = (1.0, 0.5)[number % 2]
        options = Options(weight, masked, norm, scale, 1e-3, exchange, reduction)
        name = "masked" if masked else "plain"
        yield pytest.param(options, id=f"{norm}-{exchange}-{weight}-{name}-{reduction}")


@pytest.mark.parametrize("options", list(_cases()))
def test_loss_and_gradients_match_float64(options):
    torch.manual_seed(0)
    sums, masses = _inputs(4, [3])
    _check(sums, masses, PAIRINGS[options.exchange], [3], [7], options, tolerance=1e-11)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("norm", ["vector", "batch"])
def test_every_reduction_matches_float64(norm, exchange, reduction):
    torch.manual_seed(1)
    sums, masses = _inputs(4, CHANNELS)
    options = DEFAULT._replace(norm=norm, exchange=exchange, reduction=reduction)
    _check(sums, masses, PAIRINGS[exchange], CHANNELS, PIXELS, options, tolerance=1e-11)


@pytest.mark.parametrize("norm", NORMS)
def test_float32_is_rounded_once(norm):
    torch.manual_seed(2)
    sums, masses = _inputs(4, CHANNELS, torch.float32)
    options = DEFAULT._replace(norm=norm, exchange="shuffle")
    _check(sums, masses, PAIRINGS["shuffle"], CHANNELS, PIXELS, options, tolerance=2e-7)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    samples=st.integers(1, 4),
    channels=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    options=st.builds(
        Options,
        st.sampled_from(REGION_WEIGHTS),
        st.booleans(),
        st.sampled_from(NORMS),
        st.sampled_from([0.5, 1.0, 0.3]),
        st.sampled_from([1e-12, 1e-3, 2.0]),
        st.sampled_from(EXCHANGES),
        st.sampled_from(REDUCTIONS),
    ),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_option_matches_float64(samples, channels, options, seed):
    torch.manual_seed(seed)
    sums, masses = _inputs(samples, channels)
    masses *= torch.rand(masses.shape, device=DEVICE) > 0.2
    pairing = None
    if options.exchange != "none":
        shape = (samples,) if options.exchange == "shuffle" else (int(torch.randint(6, ())), 2)
        pairing = torch.randint(samples, shape)
    pixels = torch.randint(1, 100, (len(channels),)).tolist()
    _check(sums, masses, pairing, channels, pixels, options, tolerance=1e-9)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("norm", ["vector", "batch"])
def test_more_samples_than_a_tile_holds_match_float64(norm, exchange, monkeypatch):
    torch.manual_seed(3)
    monkeypatch.setattr(backend, "_TILE", 8)
    monkeypatch.setattr(backend, "COUNT", 2)
    sums, masses = _inputs(4, CHANNELS)
    options = DEFAULT._replace(norm=norm, exchange=exchange, region_weight="region")
    _check(sums, masses, PAIRINGS[exchange], CHANNELS, PIXELS, options, tolerance=1e-11)


def test_loss_and_gradient_by_hand():
    sums = torch.tensor([[[6.0, 2.0]], [[2.0, 4.0]]], dtype=torch.float64, device=DEVICE)
    masses = torch.tensor([[[1.0]], [[1.0]]], dtype=torch.float64, device=DEVICE)
    options = DEFAULT._replace(eps=0.0)  # f - b = [2, -1], D = 5
    loss = backend.forward(sums, masses, None, [2], [2], options)
    assert loss.item() == pytest.approx(-math.log(5), rel=1e-15)
    grad_loss = torch.tensor([10.0], dtype=torch.float64, device=DEVICE)
    grads = backend.backward(grad_loss, sums, masses, None, [2], [2], options)
    assert grads[0].flatten().tolist() == pytest.approx([-4, 2, 4, -2], rel=1e-15)
    # D falls with the square of the mass: ∂L/∂V = 2/V.
    assert grads[1].flatten().tolist() == pytest.approx([10, 10], rel=1e-15)


@pytest.mark.parametrize("eps", [1e-12, 1e-30, 1e-300])
def test_epsilon_is_not_rounded_to_float32(eps):
    sums = torch.ones(2, 1, 3, dtype=torch.float64, device=DEVICE)
    masses = torch.ones(2, 1, 1, dtype=torch.float64, device=DEVICE)
    loss = backend.forward(sums, masses, None, [3], [2], DEFAULT._replace(eps=eps, log_scale=0.1))
    assert loss.item() == pytest.approx(-0.1 * math.log(eps), rel=1e-15)


@pytest.mark.parametrize("norm", NORMS)
def test_shuffled_equals_twice_the_plain_loss_for_the_identity(norm):
    torch.manual_seed(4)
    sums, masses = _inputs(4, CHANNELS)
    identity = torch.arange(4, device=DEVICE)
    plain = DEFAULT._replace(norm=norm)
    shuffled = plain._replace(exchange="shuffle")
    once = backend.forward(sums, masses, None, CHANNELS, PIXELS, plain)
    twice = backend.forward(sums, masses, identity, CHANNELS, PIXELS, shuffled)
    torch.testing.assert_close(twice, 2 * once, rtol=1e-15, atol=0)


@pytest.mark.parametrize("norm", ["vector", "batch"])
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_samples_that_do_not_count_have_no_effect_whatever_they_hold(norm, exchange):
    torch.manual_seed(5)
    sums, masses = _inputs(4, [4])
    options = DEFAULT._replace(norm=norm, exchange=exchange)
    pairing = PAIRINGS[exchange]
    pairing = pairing if pairing is None else pairing.to(DEVICE)
    grad_loss = torch.ones(1, dtype=torch.float64, device=DEVICE)
    results = []
    for value in (0.0, math.nan, math.inf):
        sums[:, 1] = value
        arguments = (sums, masses, pairing, [4], [9], options)
        results.append([backend.forward(*arguments), *backend.backward(grad_loss, *arguments)])
    for other in results:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        assert other[0].isfinite().all()
        assert not other[1][:, 1].any()
        assert not other[2][:, 1].any()


@pytest.mark.parametrize("norm", ["vector", "batch"])
def test_a_layer_without_a_sample_that_counts_is_zero(norm):
    sums, masses = _inputs(3, CHANNELS)
    masses[:, :, 1] = 0
    for exchange in EXCHANGES:
        pairing = {"none": None, "shuffle": [2, 0, 1], "pooled": [[0, 1], [2, 1]]}[exchange]
        pairing = pairing if pairing is None else torch.tensor(pairing, device=DEVICE)
        options = DEFAULT._replace(norm=norm, exchange=exchange)
        arguments = (sums, masses, pairing, CHANNELS, PIXELS, options)
        loss = backend.forward(*arguments)
        assert loss[0] != 0
        assert loss[1] == 0
        grad_sums, grad_masses = backend.backward(torch.ones_like(loss), *arguments)
        assert not grad_sums[..., CHANNELS[0] :].any()
        assert not grad_masses[..., 1].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_sum_that_is_not_finite_reaches_the_loss():
    sums, masses = _inputs(3, CHANNELS)
    sums[0, 2, 1] = math.nan
    loss = backend.forward(sums, masses, None, CHANNELS, PIXELS, DEFAULT._replace(reduction="none"))
    assert loss.isnan().nonzero().tolist() == [[2, 0]]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("norm", ["vector", "batch"])
def test_an_empty_batch_has_no_loss(norm, reduction):
    sums, masses = _inputs(0, CHANNELS)
    options = DEFAULT._replace(norm=norm, reduction=reduction)
    loss = backend.forward(sums, masses, None, CHANNELS, PIXELS, options)
    per_entry = (5,) if norm == "batch" else (0, 2)
    assert loss.shape == (per_entry if reduction == "none" else (2,))
    assert not loss.any()
    grads = backend.backward(torch.ones_like(loss), sums, masses, None, CHANNELS, PIXELS, options)
    assert [grad.shape for grad in grads] == [sums.shape, masses.shape]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_same_input_gives_the_same_bits(exchange):
    torch.manual_seed(6)
    sums, masses = _inputs(4, CHANNELS, torch.float32)
    pairing = PAIRINGS[exchange]
    pairing = pairing if pairing is None else pairing.to(DEVICE)
    options = DEFAULT._replace(exchange=exchange)
    arguments = (sums, masses, pairing, CHANNELS, PIXELS, options)
    runs = []
    for _ in range(2):
        loss = backend.forward(*arguments)
        runs.append([loss, *backend.backward(loss, *arguments)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_inputs_with_strides_give_the_same():
    torch.manual_seed(7)
    sums, masses = _inputs(4, CHANNELS)
    pairing = torch.tensor([[0, 1], [2, 3]], device=DEVICE)
    options = DEFAULT._replace(exchange="pooled", reduction="none")
    grad_loss = torch.ones((), dtype=torch.float64, device=DEVICE).expand(4, 2)
    spread = [sums.mT.contiguous().mT, masses.mT.contiguous().mT, pairing.mT.contiguous().mT]
    runs = []
    for inputs, grad in (((sums, masses, pairing), grad_loss.contiguous()), (spread, grad_loss)):
        arguments = (*inputs, CHANNELS, PIXELS, options)
        runs.append([backend.forward(*arguments), *backend.backward(grad, *arguments)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
