"""The CUDA kernels of a normalisation, run on the CPU, against plain torch in float64.

The tests of every language, python_tests/op/test_norms.py, run them as well; these see to launches, to the
order of blocks, to vector accesses and tiles, and to what is written and read outside of the tensors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fdkernels as fdk
from cases import FEATURE_DTYPES
from cuda_emulation.build import Emulation
from cuda_emulation.calls import run_norm_backward, run_norm_forward
from cuda_emulation.pyramids import MASK_DTYPES, UNIT, assert_within, dtype_name, lay_out, make_layer
from fdkernels.norms import module as norm_module
from fdkernels.op import reference
from fdkernels.op.norm_formula import Formula, NormInputs, plain
from fdkernels.op.pyramid import Pyramid, Weights, accumulate_dtype, describe

LAYOUTS = ("contiguous", "channels_last", "off alignment")
BATCH, SAMPLES = Formula(False, 1e-5, "leaky_relu", 0.25), Formula(True, 1e-5, "relu", 0.0, True)


class Case(NamedTuple):
    """What a call takes, and the gradients that arrive: grad_y [N, C, *S], slopes [2, N, C]."""

    inputs: NormInputs
    layout: str
    grad_y: Tensor
    slopes: Tensor
    weights: Weights | None


def make_case(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    mask: tuple[torch.dtype, bool] | None = (torch.float32, True),
    *,
    parameters: torch.dtype | None = torch.float32,
    evaluates: bool = False,
) -> Case:
    """A map with `mask`, dtype of the weights and whether those of the background are stored, or none."""
    C = shape[1]
    x, grad_y = (lay_out((torch.randn(tuple(shape)) + 0.5).to(dtype), layout) for _ in range(2))
    gamma, beta = (None, None) if parameters is None else (torch.rand(2, C) + 0.5).to(parameters).unbind()
    statistics = (torch.rand(2, C) + 0.5).double() if evaluates else None
    weights = None
    if mask is not None:
        weights = make_layer(shape, dtype, "contiguous", mask[0], mask[1]).weights
    slopes = torch.randn(2, *shape[:2]).to(accumulate_dtype([x]))
    return Case(NormInputs(x, gamma, beta, statistics, evaluates), layout, grad_y, slopes, weights)


class Results(NamedTuple):
    """What forward and backward give."""

    y: Tensor
    statistics: Tensor
    sums: Tensor
    grads: list[Tensor]


def run(emulated: Emulation, case: Case, formula: Formula) -> Results:
    inputs, layout = case.inputs, case.layout
    y, statistics, sums = run_norm_forward(emulated, inputs, formula, case.weights, layout=layout)
    kept = inputs._replace(statistics=statistics)
    added = None if case.weights is None else (case.slopes, case.weights)
    grads = run_norm_backward(emulated, kept, formula, case.grad_y, added, layout)
    return Results(y, statistics, sums, grads)


def in_doubles(case: Case) -> tuple[Weights, Pyramid]:
    """The weights as the kernels round them, and the pyramid of the map, in float64."""
    assert case.weights is not None
    fg, bg = ([w.to(case.slopes.dtype).double() for w in kind] for kind in case.weights)
    return Weights(fg, bg), describe([case.inputs.x.double()])


def check(emulated: Emulation, case: Case, formula: Formula) -> Results:
    """Compares within roundings of the accumulation dtype, and one of what is stored."""
    found = run(emulated, case, formula)
    x, gamma, beta = (None if of is None else of.double().requires_grad_() for of in case.inputs[:3])
    assert x is not None
    y = plain(x, gamma, beta, case.inputs.statistics, formula)
    upstream = case.grad_y.double()
    if case.weights is not None:
        weights, pyramid = in_doubles(case)
        slopes = case.slopes.double()
        upstream = reference.gradient(slopes, None, weights, [upstream], pyramid)[0]
        stored = found.y.double()
        wanted, band = (
            reference.sums([of], weights, pyramid, None, None, False).sums for of in (stored, stored.abs())
        )
        assert_within(found.sums, wanted, 16 * UNIT[case.slopes.dtype] * band, "a sum")
    leaves = [leaf for leaf in (x, gamma, beta) if leaf is not None]
    wanted_grads = torch.autograd.grad(y, leaves, upstream)
    for got, truth in zip((found.y, *found.grads), (y.detach(), *wanted_grads), strict=True):
        largest = truth.abs().max().clamp(min=1)
        rounding = 2 * UNIT[got.dtype] * truth.abs() + 64 * UNIT[case.slopes.dtype] * largest
        assert_within(got, truth, rounding + torch.finfo(got.dtype).smallest_normal, "a number")
    return found


def without_borders(case: Case, formula: Formula) -> Case:
    """The case without values around 0 of the activation, at which a rounding decides on the side."""
    for _ in range(20):
        x = case.inputs.x
        z = plain(x, *case.inputs[1:4], formula._replace(activation="none")).double()
        near = (x if formula.activation_first else z).abs() < 1e-3
        if not near.any():
            break
        x.add_(near.to(x.dtype) * 0.1)
    return case


@pytest.mark.parametrize("formula", [BATCH, SAMPLES], ids=["batch", "samples"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FEATURE_DTYPES, ids=dtype_name)
def test_every_dtype_and_mask_with_and_without_vectors(emulated, dtype, layout, formula):
    formula = formula._replace(activation="none")
    for shape in ((2, 16, 4, 16), (3, 5, 7, 5)):
        for mask in (None, *((mask, has_bg) for mask in MASK_DTYPES for has_bg in (False, True))):
            parameters = torch.float64 if dtype == torch.float64 else torch.float32
            check(emulated, make_case(shape, dtype, layout, mask, parameters=parameters), formula)


@pytest.mark.parametrize("formula", [BATCH, SAMPLES], ids=["batch", "samples"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(1, 3, 8208), (2, 24, 64, 80), (1, 70, 33, 65), (11, 2, 9, 16, 24)], ids=str
)
def test_several_tiles_are_joined(emulated, shape, layout, formula):
    check(emulated, without_borders(make_case(shape, torch.float32, layout), formula), formula)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_launches(emulated, launches, layout):
    for shape, tiles in (((2, 3, 4, 4), 1), ((1, 3, 64, 64), 2)):
        for evaluates in (False, True):
            case = make_case(shape, torch.float32, layout, evaluates=evaluates)
            inputs, added = case.inputs, (case.slopes, case.weights)
            run_norm_forward(emulated, inputs, BATCH, layout=layout)
            assert launches.count() == (2 if evaluates else 3)
            _, statistics, _ = run_norm_forward(emulated, inputs, BATCH, case.weights, layout=layout)
            assert launches.count() == (2 if evaluates else 3) + (tiles > 1)
            kept = inputs._replace(statistics=statistics)
            run_norm_backward(emulated, kept, BATCH, case.grad_y, added, layout)
            assert launches.count() == 4
            kept = kept._replace(weight=None, bias=None)
            run_norm_backward(emulated, kept, BATCH, case.grad_y, added, layout)
            assert launches.count() == (2 if evaluates else 4)


@pytest.mark.parametrize("formula", [BATCH, SAMPLES], ids=["batch", "samples"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_in_any_order_of_blocks(emulated, launches, layout, formula):
    case = make_case((2, 7, 65, 63), torch.float32, layout)
    results = []
    for order in (0, 0, -1, 1, 2):
        launches.order(order)
        found = run(emulated, case, formula)
        results.append([found.y, found.statistics, found.sums, *found.grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_is_off_the_alignment_of_vectors_is_accessed_one_by_one(emulated):
    """Weights, the gradient that arrives, and what is written; the input is in the tests of every layout."""
    for dtype in MASK_DTYPES:
        case = make_case((2, 4, 8, 8), torch.float32, mask=(dtype, True))
        assert case.weights is not None
        (fg,), (bg,) = case.weights
        formula = BATCH._replace(activation="none")
        check(emulated, case._replace(weights=Weights([lay_out(fg, "off alignment")], [bg])), formula)
        check(emulated, case._replace(weights=Weights([fg], [lay_out(bg, "off alignment")])), formula)
        check(emulated, case._replace(grad_y=lay_out(case.grad_y, "off alignment")), formula)
        check(emulated, case._replace(layout="off alignment"), formula)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_parameters_of_another_dtype_and_none(emulated, layout):
    for parameters in (torch.float64, None):
        for formula in (BATCH, SAMPLES):
            case = make_case((2, 8, 5, 8), torch.float32, layout, parameters=parameters)
            check(emulated, without_borders(case, formula), formula)


@pytest.mark.parametrize("formula", [BATCH, SAMPLES], ids=["batch", "samples"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_large_mean_costs_the_gradients_no_digits(emulated, layout, formula):
    """Mean 1000 and deviation 1: in float32 such a mean is off by up to 3e-5, of which h has a large sum."""
    case = make_case((2, 3, 20, 40), torch.float32, layout, None)
    case.inputs.x.add_(1000)
    case.grad_y.add_(5)
    found = run(emulated, case, formula._replace(activation="none"))
    leaves = [of.double().requires_grad_() for of in case.inputs[:3] if of is not None]
    y = plain(*leaves, None, formula._replace(activation="none"))
    for got, truth in zip(found.grads, torch.autograd.grad(y, leaves, case.grad_y.double()), strict=True):
        assert_within(got, truth, 1e-7 * case.grad_y.abs().sum(), "a gradient")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_at_ignored_pixels_stays_out_of_the_region_sums(emulated, layout):
    for shape in ((2, 8, 8, 8), (2, 5, 3, 7)):
        case = make_case(shape, torch.float32, layout, (torch.uint8, True), evaluates=True)
        assert case.weights is not None
        (fg,), (bg,) = case.weights
        ignored = ((fg == 0) & (bg == 0)).view(shape[0], 1, *shape[2:]).expand(shape)
        assert ignored.any()
        clean = run(emulated, case, BATCH)
        case.inputs.x[ignored] = math.nan
        found = run(emulated, case, BATCH)
        assert torch.equal(found.sums, clean.sums)
        assert torch.equal(found.y.isnan(), ignored)
        assert torch.equal(found.grads[0][~ignored], clean.grads[0][~ignored])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_weight_that_is_none_makes_its_pixel_and_its_sums_nan(emulated, layout):
    case = make_case(
        (2, 4, 3, 5), torch.float32, layout, (torch.uint8, False), parameters=None, evaluates=True
    )
    assert case.weights is not None
    case.weights.fg[0][1, 7] = 255
    found = run(emulated, case, Formula(False, 1e-5))
    assert found.sums[:, 1].isnan().all()
    assert found.sums[:, 0].isfinite().all()
    assert found.grads[0].flatten(2).isnan().any(1).nonzero().tolist() == [[1, 7]]


@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed", "channels of more"])
def test_maps_with_gaps_are_refused(emulated, layout):
    inputs = make_case((2, 3, 4, 5)).inputs
    inputs = inputs._replace(x=lay_out(inputs.x, layout))
    with pytest.raises(ValueError, match=r"fdkernels\._C: "):
        run_norm_forward(emulated, inputs, BATCH)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_step_with_taps_takes_the_loss_from_the_norms(emulated, monkeypatch, launches, channels_last):
    """`NormAct` over these kernels: loss, gradients and running statistics are those of torch's modules."""
    monkeypatch.setattr(norm_module, "norm_kernels_of", lambda backend: emulated.norms)
    net = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()),
        torch.nn.Sequential(torch.nn.Conv2d(8, 5, 3), torch.nn.InstanceNorm2d(5, affine=True)),
    )
    images, mask = torch.randn(3, 1, 14, 14), torch.rand(3, 1, 14, 14) > 0.5
    if channels_last:
        net.to(memory_format=torch.channels_last)
        images = images.repeat(1, 2, 1, 1)[:, :1].contiguous(memory_format=torch.channels_last)
    fused = copy.deepcopy(net)
    fdk.fuse_norms(fused, ["0", "1"])
    results = []
    for network, is_fused in ((net, False), (fused, True)):
        with fdk.FeatureTaps(network, ["0", "1"], fused=is_fused) as taps:
            launches.count()
            if is_fused:
                with taps.mask(mask):
                    out = network(images)
                assert launches.count() == 3 + 3
            else:
                out = network(images)
            loss = fdk.feature_discrepancy_loss(taps if is_fused else taps.features, mask, backend="cpu")
        (loss + out.square().mean()).backward()
        assert launches.count() == (4 + 4 if is_fused else 0)
        results.append([loss.detach(), *(p.grad for p in network.parameters()), *network.buffers()])
    for found, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Case, Formula]:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    spatial = draw(st.lists(st.integers(1, 12) | st.sampled_from((16, 32)), min_size=1, max_size=3))
    shape = (draw(st.integers(1, 10)), draw(st.integers(1, 40)), *spatial)
    dtype, layout = draw(st.sampled_from(FEATURE_DTYPES)), draw(st.sampled_from(LAYOUTS))
    mask = draw(st.none() | st.tuples(st.sampled_from(MASK_DTYPES), st.booleans()))
    parameters = draw(st.sampled_from((torch.float32, torch.float64, None)))
    instance, evaluates = draw(st.booleans()), draw(st.booleans())
    # Of a few values roundings of the variance are as large as itself.
    evaluates = evaluates or math.prod(spatial) * (1 if instance else shape[0]) < 8
    case = make_case(shape, dtype, layout, mask, parameters=parameters, evaluates=evaluates)
    return case, Formula(instance, 1e-3)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(call=calls())
def test_any_call(emulated, call):
    check(emulated, *call)
