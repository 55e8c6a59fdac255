"""Normalisation with its activation in every language: the same numbers to all of them, against float64."""

from __future__ import annotations

import os
from typing import NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import fdkernels as fdk
from cases import lay_out, weights_for
from cuda_emulation.build import emulate
from fdkernels.op.kernels import NormKernels, norm_kernels_of
from fdkernels.op.norm_formula import Formula, NormInputs, Running, plain
from fdkernels.op.pyramid import Weights, accumulate_dtype
from oracles import sums_under

pytestmark = pytest.mark.usefixtures("nan_filled")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last")
# Over the largest number: one rounding of what is stored, and of float32 sums.
BANDS = {torch.float64: 1e-11, torch.float32: 8e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
# Sums of kernels with AddressSanitizer are no vectors: one long sum takes the place of several short ones.
if "libasan" in os.environ.get("LD_PRELOAD", ""):
    BANDS[torch.float32] *= 2
FORMULAS = [
    Formula(instance, 1e-5, activation, 0.1 if activation == "leaky_relu" else 0.0, first)
    for instance in (False, True)
    for activation, first in (
        ("none", False),
        ("relu", False),
        ("relu", True),
        ("leaky_relu", False),
        ("leaky_relu", True),
    )
]
ALL_NEEDED = (True, True, True)


class Language(NamedTuple):
    """Kernels in one language, and where their tensors are."""

    kernels: NormKernels
    device: str


@pytest.fixture(params=["cpu", "triton", "cuda", "cuda on the cpu"])
def language(request: pytest.FixtureRequest) -> Language:
    name = request.param
    if name == "cuda on the cpu":
        return Language(emulate().norms, "cpu")
    if reason := fdk.backends()[name]:
        pytest.skip(f"backend {name!r}: {reason}")
    kernels = norm_kernels_of(name)
    if kernels is None:
        pytest.skip(f"backend {name!r} has no kernels for normalisations yet")
    on_gpu = name == "cuda" or (name == "triton" and os.environ.get("TRITON_INTERPRET") != "1")
    return Language(kernels, "cuda" if on_gpu else "cpu")


class Case(NamedTuple):
    """A map with all that a call takes, and the gradients that arrive.

    Attributes:
        x: [N, C, *S].
        gamma, beta: [C], or None.
        given: statistics [2, C] in float64, or None.
        grad_y: [N, C, *S].
        slopes: [2, N, C].
        weights: [N, P], or None.
    """

    x: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    given: Tensor | None
    grad_y: Tensor
    slopes: Tensor
    weights: Weights | None


def make_case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str = "contiguous",
    *,
    affine: bool = True,
    evaluates: bool = False,
    kind: str | None = "valid wide",
    mean: float = 0.5,
) -> Case:
    channels = shape[1]
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    x, grad_y = (lay_out(torch.randn(shape).to(dtype), layout) for _ in range(2))
    x = lay_out((x.double() + mean).to(dtype), layout)
    gamma = (torch.rand(channels) + 0.5).to(parameters) if affine else None
    beta = torch.randn(channels).to(parameters) if affine else None
    given = torch.stack([torch.randn(channels), torch.rand(channels) + 0.5]).double() if evaluates else None
    slopes = torch.randn(2, shape[0], channels).to(accumulate_dtype([x]))
    weights = None if kind is None else weights_for([x], kind)
    return Case(x, gamma, beta, given, grad_y, slopes, weights)


class Results(NamedTuple):
    """What a call and its backward give, in float64 on the CPU.

    Attributes:
        magnitude: of `truth`: the largest sum over a channel of |gradient that arrives|. The gradients of
            gamma and beta are sums of terms as large, which may cancel.
    """

    y: Tensor
    statistics: Tensor
    sums: Tensor | None
    grads: tuple[Tensor | None, ...]
    magnitude: float = 0.0


def run(language: Language, case: Case, formula: Formula, running: Running | None = None) -> Results:
    kernels, device = language

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    x = case.x.to(device)
    weights = case.weights
    if weights is not None:
        weights = Weights([w.to(device) for w in weights.fg], [w.to(device) for w in weights.bg])
    inputs = NormInputs(x, there(case.gamma), there(case.beta), there(case.given), case.given is not None)
    y, statistics, sums = kernels.norm_forward(inputs, formula, running, weights)
    assert y.stride() == case.x.stride()
    assert y.dtype == case.x.dtype
    assert statistics.dtype == torch.float64
    added = None if weights is None else (case.slopes.to(device), weights)
    grad_y = torch.empty_like(x).copy_(case.grad_y)
    grads = kernels.norm_backward(inputs._replace(statistics=statistics), formula, grad_y, added, ALL_NEEDED)
    assert grads[0] is not None
    assert grads[0].stride() == case.x.stride()
    return Results(
        y.cpu(),
        statistics.cpu(),
        None if sums is None else sums.cpu(),
        tuple(None if grad is None else grad.cpu() for grad in grads),
    )


def truth(case: Case, formula: Formula) -> Results:
    """The same in float64 by autograd; region sums are those of what is stored, so they are left out."""
    leaves = [None if of is None else of.double().requires_grad_() for of in (case.x, case.gamma, case.beta)]
    x, gamma, beta = leaves
    assert x is not None
    y = plain(x, gamma, beta, case.given, formula)
    u = formula.activate(x) if formula.activation_first else x
    dims = [*range(2, x.dim())] if formula.instance else [0, *range(2, x.dim())]
    statistics = torch.stack([u.mean(dims), u.var(dims, correction=0)]) if case.given is None else case.given
    upstream = case.grad_y.double()
    if case.weights is not None:
        bg = case.weights.bg[0] if case.weights.bg else None
        upstream = upstream + added_gradient(case, bg)
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(y, wanted, upstream))
    grads = tuple(None if leaf is None else next(found) for leaf in leaves)
    magnitude = upstream.abs().transpose(0, 1).flatten(1).sum(1).max().item()
    return Results(y.detach(), statistics.detach(), None, grads, magnitude)


def added_gradient(case: Case, bg: Tensor | None) -> Tensor:
    """The gradient (R3) of the slopes, [N, C, *S]."""
    assert case.weights is not None
    fg = case.weights.fg[0].double()
    rest = 1 - fg if bg is None else bg.double()
    g_fg, g_bg = case.slopes.double()
    value = g_fg[..., None] * fg[:, None] + g_bg[..., None] * rest[:, None]
    return value.view(case.x.shape)


def assert_close(
    found: Tensor | None, wanted: Tensor | None, band: float, what: str, least: float = 1.0
) -> None:
    assert (found is None) == (wanted is None), what
    if found is None or wanted is None:
        return
    scale = wanted.abs().max().clamp(min=least)
    off = ((found.double() - wanted).abs().max() / scale).item()
    assert off <= band, f"{what}: {off:.2e} of the largest number, at most {band:.0e}"


def check(language: Language, case: Case, formula: Formula) -> Results:
    found, wanted = run(language, case, formula), truth(case, formula)
    dtype = case.x.dtype
    assert_close(found.y, wanted.y, BANDS[dtype], "output")
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    of_samples = found.statistics.dim() == 3 and wanted.statistics.dim() == 2
    expected = wanted.statistics[:, None].expand_as(found.statistics) if of_samples else wanted.statistics
    assert_close(found.statistics, expected, BANDS[kept], "statistics")
    for grad, want, what in zip(found.grads, wanted.grads, ("of x", "of gamma", "of beta"), strict=True):
        least = 1.0 if what == "of x" else max(1.0, 0.05 * wanted.magnitude)
        assert_close(grad, want, BANDS[dtype], f"gradient {what}", least)
    if case.weights is not None:
        assert found.sums is not None
        fg, bg = case.weights.fg[0], case.weights.bg[0] if case.weights.bg else None
        of_y = sums_under(found.y, fg, bg)
        largest = max(1.0, of_y.abs_fg.max().item(), of_y.abs_bg.max().item())
        band = (1e-13 if dtype == torch.float64 else 2e-6) * largest
        assert (found.sums[0].double() - of_y.fg).abs().max() <= band
        assert (found.sums[1].double() - of_y.bg).abs().max() <= band
    return found


@pytest.mark.parametrize("evaluates", [False, True], ids=["training", "given"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_every_formula_and_layout(language, formula, layout, evaluates):
    check(language, make_case((3, 5, 6, 7), torch.float32, layout, evaluates=evaluates), formula)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 33), (2, 4, 3, 5, 6)], ids=["1d", "3d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_every_dtype_and_dimension(language, dtype, shape, layout):
    # Without an activation: at z = 0 a rounding decides on the side.
    for instance in (False, True):
        check(language, make_case(shape, dtype, layout), Formula(instance, 1e-5))
        check(language, make_case(shape, dtype, layout, affine=False), Formula(instance, 1e-5))


@pytest.mark.parametrize("kind", ["uint8", "wide", "valid uint8", "valid wide", None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_every_kind(language, layout, kind):
    for dtype in (torch.float32, torch.bfloat16):
        check(language, make_case((2, 6, 5, 7), dtype, layout, kind=kind), Formula(False, 1e-5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 2), (2, 3, 1), (2, 300, 3, 3), (1, 3, 70, 71), (5, 33, 17), (2, 64, 32, 32)], ids=str
)
def test_sizes_around_those_of_blocks(language, shape, layout):
    for instance in (False, True):
        if instance and shape[2:] == (1,):
            continue
        check(language, make_case(shape, torch.float32, layout), Formula(instance, 1e-5, "leaky_relu", 0.2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_costs_no_digits(language, layout):
    """Mean 1000, deviation 1: squares about 0 would leave the variance two digits."""
    case = make_case((2, 3, 40, 40), torch.float32, layout, mean=1000.0)
    found, wanted = run(language, case, Formula(False, 1e-5)), truth(case, Formula(False, 1e-5))
    assert ((found.statistics[1] / wanted.statistics[1]) - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("first", [False, True])
def test_the_border_is_at_zero(language, activation, first, layout):
    """Where the activation's argument is 0 its derivative is that below 0, as torch has it."""
    formula = Formula(False, 1e-5, activation, 0.25, first)
    x = torch.tensor([-1.0, 0.0, 2.0, 0.0]).view(1, 1, 4).repeat(2, 3, 1)
    case = make_case((2, 3, 4), torch.float32, layout)
    # Statistics of mean 0 and no shift: z is 0 exactly where x is.
    given = torch.stack([torch.zeros(3), torch.ones(3)]).double()
    case = case._replace(x=lay_out(x, layout), beta=torch.zeros(3), given=given)
    check(language, case, formula)


def test_what_is_not_needed_is_not_made(language):
    case = make_case((2, 3, 4, 5), torch.float32)
    kernels, device = language
    assert case.gamma is not None
    assert case.beta is not None
    inputs = NormInputs(case.x.to(device), case.gamma.to(device), case.beta.to(device), None, False)
    y, statistics, sums = kernels.norm_forward(inputs, FORMULAS[1], None, None)
    assert sums is None
    kept = inputs._replace(statistics=statistics)
    whole = kernels.norm_backward(kept, FORMULAS[1], torch.ones_like(y), None, ALL_NEEDED)
    for wanted in range(3):
        needs = tuple(index == wanted for index in range(3))
        found = kernels.norm_backward(kept, FORMULAS[1], torch.ones_like(y), None, needs)
        for index, (one, other) in enumerate(zip(found, whole, strict=True)):
            assert (one is None) == (index != wanted)
            assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("instance", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_move_as_in_torch(language, dtype, instance):
    case = make_case((3, 4, 5, 6), dtype, kind=None)
    mean, variance = torch.randn(4, dtype=dtype), torch.rand(4, dtype=dtype) + 0.5
    moved = Running(mean.clone().to(language.device), variance.clone().to(language.device), 0.3)
    run(language, case, Formula(instance, 1e-5), moved)
    norm = torch.nn.InstanceNorm2d if instance else torch.nn.BatchNorm2d
    module = norm(4, momentum=0.3, track_running_stats=True).to(dtype)
    module.running_mean, module.running_var = mean.clone(), variance.clone()
    module(case.x)
    torch.testing.assert_close(moved.mean.cpu(), module.running_mean)
    torch.testing.assert_close(moved.variance.cpu(), module.running_var)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_in_its_channel(language, layout):
    case = make_case((2, 4, 5, 6), torch.float32, layout, kind="wide")
    x = case.x.clone()
    x[1, 2, 3, 3] = torch.nan
    found = run(language, case._replace(x=x), Formula(False, 1e-5, "relu"))
    clean = [0, 1, 3]
    assert found.y[:, 2].isnan().all()
    assert found.y[:, clean].isfinite().all()
    assert found.sums is not None
    assert found.sums[:, :, 2].isnan().all()
    assert found.sums[:, :, clean].isfinite().all()
    assert found.grads[0] is not None
    assert found.grads[0][:, clean].isfinite().all()


def test_the_same_bits_twice(language):
    for layout in LAYOUTS:
        case = make_case((3, 40, 33, 31), torch.float32, layout)
        first, again = (run(language, case, FORMULAS[1]) for _ in range(2))
        assert torch.equal(first.y, again.y)
        assert torch.equal(first.statistics, again.statistics)
        for one, other in zip(first.grads, again.grads, strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)


def test_any_shape(language, for_all_of):
    @for_all_of(
        st.integers(1, 4),
        st.integers(1, 40),
        st.lists(st.integers(1, 12), min_size=1, max_size=3),
        st.sampled_from(LAYOUTS),
        st.booleans(),
        st.booleans(),
        st.sampled_from(["uint8", "wide", "valid uint8", "valid wide", None]),
    )
    def checked(batch, channels, size, layout, instance, evaluates, kind) -> None:
        shape = (batch, channels, *size)
        pixels = torch.Size(size).numel() * (1 if instance else batch)
        if pixels < 4 and not evaluates:
            return  # of so few values roundings of the variance are as large as itself
        case = make_case(shape, torch.float32, layout, evaluates=evaluates, kind=kind)
        check(language, case, Formula(instance, 1e-3))


@pytest.fixture
def for_all_of(request: pytest.FixtureRequest):
    """`for_all` with as few examples as the interpreter can stand."""
    slow = "triton" in request.node.callspec.id and os.environ.get("TRITON_INTERPRET") == "1"

    def run_all(*strategies):
        def decide(body) -> None:
            settings = hypothesis.settings(max_examples=8 if slow else 40)
            settings(hypothesis.given(*strategies)(body))()

        return decide

    return run_all
