"""The CUDA kernels of the sums, run on the CPU, against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import FEATURE_DTYPES
from cuda_emulation.build import Emulation
from cuda_emulation.calls import run_sums
from cuda_emulation.pyramids import (
    LAYOUTS,
    MASK_DTYPES,
    UNIT,
    Inputs,
    assert_within,
    dtype_name,
    join,
    lay_out,
    make_layer,
)
from fdkernels.op import reference
from fdkernels.op.pyramid import Sums, Weights, describe


def check(emulated: Emulation, inputs: Inputs) -> Sums:
    """Compares sums and masses, within a multiple of the rounding error of what is added up."""
    features, weights = inputs.wide()
    got = run_sums(emulated, inputs)
    pyramid = describe(features)
    wanted = reference.sums(features, weights, pyramid, None, None, False)
    band = reference.sums([layer.abs() for layer in features], weights, pyramid, None, None, False)
    u = UNIT[inputs.accumulate]
    assert_within(got.sums, wanted.sums, 8 * u * band.sums, "a sum")
    assert_within(got.masses, wanted.masses, 8 * u * band.masses, "a mass")
    return got


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FEATURE_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_dtype_mask_and_layout(emulated, rank, dtype, layout):
    """The first shape allows vector accesses, the second one does not."""
    for shape in ((2, 16, *(4, 3, 16)[3 - rank :]), (3, 5, *(3, 7, 5)[3 - rank :])):
        for mask_dtype in MASK_DTYPES:
            for has_bg in (False, True):
                check(emulated, make_layer(shape, dtype, layout, mask_dtype, has_bg))


@pytest.mark.parametrize("has_bg", [False, True], ids=["implied", "given"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 0, 4, 3), (3, 0, 64, 80)], ids=str)
def test_layers_without_channels_have_masses(emulated, shape, layout, has_bg):
    """The free loss has the sums of its layers, and reads their weights alone."""
    other = make_layer((shape[0], 3, 8, 8), torch.float32, layout, torch.float32, has_bg)
    for mask_dtype in MASK_DTYPES:
        alone = make_layer(shape, torch.float32, layout, mask_dtype, has_bg)
        assert check(emulated, alone).masses.min() > 0
    check(emulated, join([alone, other, alone]))


@pytest.mark.parametrize("has_bg", [False, True], ids=["implied", "given"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced by vectors", "strided"])
@pytest.mark.parametrize(
    "shape", [(1, 3, 8208), (2, 24, 64, 80), (1, 70, 33, 65), (1, 2, 9, 16, 24)], ids=str
)
def test_several_tiles_of_a_plane_are_added_up(emulated, launches, shape, layout, has_bg):
    check(emulated, make_layer(shape, torch.float32, layout, torch.float32, has_bg))
    assert launches.count() == 2


def test_one_tile_takes_one_launch(emulated, launches):
    check(emulated, make_layer((2, 5, 4, 4), torch.float32, "contiguous", torch.float32, False))
    assert launches.count() == 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 2, 1, 1), (2, 300, 1), (0, 3, 5, 4), (2, 1, 1, 9, 1)], ids=str
)
def test_one_pixel_one_channel_and_no_sample(emulated, shape, layout):
    for has_bg in (False, True):
        check(emulated, make_layer(shape, torch.float32, layout, torch.float32, has_bg))


@pytest.mark.parametrize("has_bg", [False, True], ids=["implied", "given"])
@pytest.mark.parametrize("wide", [False, True], ids=["float32 sums", "float64 sums"])
def test_a_pyramid_of_more_layers_than_a_launch_takes(emulated, wide, has_bg):
    dtypes = FEATURE_DTYPES if wide else [d for d in FEATURE_DTYPES if d != torch.float64]
    layers = [
        make_layer(
            (2, 1 + 5 * i % 19, *(3 + i, 8, 2)[: 1 + i % 3]),
            dtypes[i % len(dtypes)],
            LAYOUTS[i % len(LAYOUTS)],
            MASK_DTYPES[i % 3],
            has_bg,
        )
        for i in range(19)
    ]
    check(emulated, join(layers))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_in_any_order_of_blocks(emulated, launches, layout):
    inputs = make_layer((2, 7, 65, 63), torch.float32, layout, torch.float32, has_bg=True)
    results = []
    for order in (0, 0, -1, 1, 2):
        launches.order(order)
        results.append(run_sums(emulated, inputs)[:2])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_weights_off_the_alignment_of_vectors_are_read_one_by_one(emulated):
    for dtype in MASK_DTYPES:
        features, (fg, bg) = make_layer((2, 4, 8, 8), torch.float32, "contiguous", dtype, has_bg=True)
        check(emulated, Inputs(features, Weights([lay_out(fg[0], "off alignment")], bg)))
        check(emulated, Inputs(features, Weights(fg, [lay_out(bg[0], "off alignment")])))


def test_a_nan_that_is_not_ignored_reaches_both_sums_of_its_channel(emulated):
    for layout in ("contiguous", "channels_last"):
        for has_bg in (False, True):
            features, (fg, bg) = make_layer((1, 8, 8, 8), torch.float32, layout, torch.uint8, has_bg)
            fg[0].zero_()[0, 9] = 1
            if has_bg:
                bg[0].copy_(1 - fg[0])
            features[0].zero_()[0, 3, 1, 1] = math.nan
            got = run_sums(emulated, Inputs(features, Weights(fg, bg)))
            assert got.sums.isnan().nonzero().tolist() == [[0, 0, 3], [1, 0, 3]]
            assert got.masses.flatten().tolist() == [1, 63]


@st.composite
def pyramids(draw: st.DrawFn) -> Inputs:
    N, has_bg = draw(st.integers(0, 4)), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        spatial = draw(st.lists(st.integers(1, 12) | st.sampled_from((16, 32)), min_size=1, max_size=3))
        shape = (N, draw(st.integers(1, 40)), *spatial)
        dtype, layout = draw(st.sampled_from(FEATURE_DTYPES)), draw(st.sampled_from(LAYOUTS))
        layers.append(make_layer(shape, dtype, layout, draw(st.sampled_from(MASK_DTYPES)), has_bg))
    return join(layers)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(inputs=pyramids())
def test_any_pyramid(emulated, inputs):
    check(emulated, inputs)
