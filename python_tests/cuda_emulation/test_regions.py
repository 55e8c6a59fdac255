"""The CUDA kernels over several regions, run on the CPU, against the reference in float64.

The tests of every language, python_tests/op/test_regions.py, run them as well; these see to launches, to the
order of blocks, and to what is written and read outside of the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import FEATURE_DTYPES
from cuda_emulation.build import Emulation
from cuda_emulation.calls import run_region_gradient, run_region_sums, run_region_weight_gradient
from cuda_emulation.pyramids import DENSE_LAYOUTS, LAYOUTS, UNIT, assert_within, lay_out
from fdkernels.op import reference
from fdkernels.op.pyramid import Regions, accumulate_dtype, describe


def make_regions(
    features: Sequence[Tensor],
    count: int,
    *,
    in_bytes: bool = False,
    selects: bool = True,
    moments: bool = False,
) -> Regions:
    """Random weights, of which those of some pixels are all 0, and pivots."""
    dtype, weights = accumulate_dtype(features), []
    for layer in features:
        N, P = layer.shape[0], layer.shape[2:].numel()
        w = torch.rand(N, count, P) * (torch.rand(N, 1, P) < 0.7)
        weights.append((w > 0.5).to(torch.uint8) if in_bytes else w.to(dtype))
    channels = describe(features).total_channels
    pivots = torch.randn(count, len(features[0]), channels).to(dtype) if moments else None
    return Regions(weights, selects, pivots)


def make_features(shape: Sequence[int], dtype: torch.dtype, layout: str) -> Tensor:
    return lay_out(torch.randn(shape, dtype=torch.float64).to(dtype), layout)


def in_doubles(
    features: Sequence[Tensor], regions: Regions, magnitude: bool = False
) -> tuple[list[Tensor], Regions]:
    """The same in float64; or what makes the reference add up no less than the magnitudes of all summands."""
    doubles = [layer.double() for layer in features]
    pivots = None if regions.pivots is None else regions.pivots.double()
    if magnitude:
        doubles = [layer.abs() for layer in doubles]
        pivots = None if pivots is None else -pivots.abs()
    weights = [w if w.dtype == torch.uint8 else w.double() for w in regions.weights]
    return doubles, Regions(weights, regions.selects, pivots)


def check(
    emulated: Emulation, features: Sequence[Tensor], regions: Regions, layout: str = "contiguous"
) -> None:
    """Compares all three functions, within a multiple of the rounding error of what is added up."""
    u = UNIT[accumulate_dtype(features)]
    exact, large = in_doubles(features, regions), in_doubles(features, regions, magnitude=True)
    sums, masses = run_region_sums(emulated, features, regions)
    wanted, band = (reference.region_sums(*args, describe(args[0])) for args in (exact, large))
    assert_within(sums, wanted[0], 16 * u * band[0], "a sum")
    assert_within(masses, wanted[1], 16 * u * band[1], "a mass")

    g = torch.randn_like(sums)
    upstream = [None if i % 2 else make_features(x.shape, x.dtype, layout) for i, x in enumerate(features)]
    got = run_region_gradient(emulated, g, features, regions, upstream, layout)
    in_double = [None if added is None else added.double() for added in upstream]
    of_magnitudes = [None if added is None else added.abs() for added in in_double]
    wanted = reference.region_gradient(g.double(), exact[1], exact[0], in_double, describe(exact[0]))
    band = reference.region_gradient(g.double().abs(), large[1], large[0], of_magnitudes, describe(large[0]))
    for grad, exactly, largest in zip(got, wanted, band, strict=True):
        assert_within(grad, exactly, 16 * u * largest + 1.01 * UNIT[grad.dtype] * exactly.abs(), "a gradient")

    got = run_region_weight_gradient(emulated, g, features, regions)
    wanted = reference.region_weight_gradient(g.double(), exact[1], exact[0])
    band = reference.region_weight_gradient(g.double().abs(), large[1], large[0])
    for grad, exactly, largest in zip(got, wanted, band, strict=True):
        assert_within(grad, exactly, 16 * u * largest, "a gradient of a weight")


@pytest.mark.parametrize("moments", [False, True], ids=["sums", "moments"])
def test_two_launches_forward_and_one_for_each_gradient(emulated, launches, moments):
    features = [make_features(shape, torch.float32, "contiguous") for shape in ((2, 3, 70, 80), (2, 5, 8, 8))]
    regions = make_regions(features, 3, moments=moments)
    sums, _ = run_region_sums(emulated, features, regions)
    assert launches.count() == 2
    run_region_gradient(emulated, sums, features, regions, [], "contiguous")
    assert launches.count() == 1
    run_region_weight_gradient(emulated, sums, features, regions)
    assert launches.count() == 1
    run_region_sums(emulated, features[1:], make_regions(features[1:], 3))  # one tile, whose sums are final
    assert launches.count() == 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_in_any_order_of_blocks(emulated, launches, layout):
    features = [make_features((2, 7, 65, 63), torch.float32, layout)]
    regions = make_regions(features, 9, moments=True)
    g = torch.randn(18, 2, 7)
    results = []
    for order in (0, -1, 1):
        launches.order(order)
        results.append(
            [
                *run_region_sums(emulated, features, regions),
                *run_region_gradient(emulated, g, features, regions, [], layout),
                *run_region_weight_gradient(emulated, g, features, regions),
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("count", [1, 5, 17, 32, 70])
def test_any_number_of_regions_in_accesses_of_four_and_of_one(emulated, count):
    features = [
        make_features((2, 36, 4, 8), torch.float16, "channels_last"),
        make_features((2, 9, 3, 5), torch.float32, "channels_last"),
        make_features((2, 9, 12, 12), torch.bfloat16, "contiguous"),
        make_features((2, 5, 77), torch.float32, "contiguous"),
    ]
    for moments in (False, True):
        check(emulated, features, make_regions(features, count, moments=moments))
        wide = [features[0].double(), *features[1:]]
        check(emulated, wide, make_regions(wide, count, in_bytes=True, moments=moments), "channels_last")


@pytest.mark.parametrize("moments", [False, True], ids=["sums", "moments"])
def test_a_pyramid_of_more_layers_than_a_launch_takes(emulated, moments):
    dtypes = [dtype for dtype in FEATURE_DTYPES if dtype != torch.float64]
    features = [
        make_features(
            (2, 1 + 5 * i % 19, *(3 + i, 8, 2)[: 1 + i % 3]),
            dtypes[i % len(dtypes)],
            LAYOUTS[i % len(LAYOUTS)],
        )
        for i in range(19)
    ]
    check(emulated, features, make_regions(features, 3, moments=moments))


def test_weights_off_the_alignment_of_vectors_are_read_one_by_one(emulated):
    features = [make_features((2, 4, 8, 8), torch.float32, "contiguous")]
    for in_bytes in (False, True):
        regions = make_regions(features, 3, in_bytes=in_bytes)
        check(emulated, features, regions._replace(weights=[lay_out(regions.weights[0], "off alignment")]))


@pytest.mark.parametrize("shape", [(0, 3, 5, 4), (2, 3, 0, 4), (2, 0, 5, 4), (1, 1, 1)], ids=str)
def test_no_sample_no_pixel_and_no_channel(emulated, shape):
    features = [make_features(shape, torch.float32, "contiguous")]
    for moments in (False, True):
        check(emulated, features, make_regions(features, 3, moments=moments))


def test_a_nan_that_is_not_ignored_reaches_all_sums_of_its_channel(emulated):
    for layout in ("contiguous", "channels_last"):
        features = [make_features((1, 8, 8, 8), torch.float32, layout)]
        features[0][0, 3, 1, 1] = math.nan
        weights = torch.zeros(1, 40, 64)
        weights[0, 39] = 1  # the pixel counts in one of two chunks of regions
        sums, masses = run_region_sums(emulated, features, Regions([weights], selects=True))
        assert sums.isnan().nonzero()[:, 2].unique().tolist() == [3]
        assert sums[:, 0, 3].isnan().all()
        assert masses.flatten().tolist() == [0] * 39 + [64]


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Tensor], Regions, str]:
    N, count = draw(st.integers(0, 3)), draw(st.sampled_from((1, 2, 3, 8, 9, 20, 34)))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    features = []
    for _ in range(draw(st.integers(1, 3))):
        spatial = draw(st.lists(st.integers(1, 12) | st.sampled_from((16, 32)), min_size=1, max_size=3))
        shape = (N, draw(st.integers(1, 40)), *spatial)
        features.append(
            make_features(shape, draw(st.sampled_from(FEATURE_DTYPES)), draw(st.sampled_from(LAYOUTS)))
        )
    in_bytes, selects, moments = (draw(st.booleans()) for _ in range(3))
    regions = make_regions(features, count, in_bytes=in_bytes, selects=selects, moments=moments)
    return features, regions, draw(st.sampled_from(DENSE_LAYOUTS))


@settings(max_examples=15, derandomize=True, deadline=None)
@given(call=calls())
def test_any_call(emulated, call):
    check(emulated, *call)
