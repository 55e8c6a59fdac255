"""The CUDA kernels of region_sums, run on the CPU, against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import FEATURE_DTYPES
from cuda_emulation.pyramids import (
    DENSE_LAYOUTS,
    LAYOUTS,
    MASK_DTYPES,
    UNIT,
    Pyramid,
    assert_within,
    dtype_name,
    join,
    lay_out,
    make_layer,
    unwritten,
)
from fdkernels import native
from fdkernels.region_sums.geometry import DTYPE_CODES, Geometry
from fdkernels.region_sums.impl import reference


def run_forward(emulated: ModuleType, pyramid: Pyramid) -> list[Tensor]:
    """Sums and masses."""
    dtype = pyramid.accumulate
    sums = unwritten((2, pyramid.batch, sum(pyramid.channels)), dtype)
    masses = unwritten((2, pyramid.batch, len(pyramid.features)), dtype)
    words = native.forward_words(*pyramid)
    code = DTYPE_CODES[dtype]
    size = emulated.cuda_region_sums_workspace(words, pyramid.batch, code)
    workspace = unwritten((size // dtype.itemsize,), dtype)
    outputs = (sums, masses, workspace)
    pointers = [output.tensor.data_ptr() for output in outputs]
    emulated.cuda_region_sums_forward(words, pyramid.batch, code, *pointers, 0, 0)
    for output in outputs:
        output.assert_untouched()
    return [sums.tensor, masses.tensor]


def run_backward(
    emulated: ModuleType,
    grad_sums: Tensor,
    pyramid: Pyramid,
    upstream: Sequence[Tensor | None],
    layouts: Sequence[str],
) -> list[Tensor]:
    """The gradients of the features, written in these layouts."""
    outputs = [
        unwritten(layer.shape, layer.dtype, layout)
        for layer, layout in zip(pyramid.features, layouts, strict=True)
    ]
    grads = [output.tensor for output in outputs]
    words = native.backward_words(grads, pyramid.fg, pyramid.bg, upstream)
    code = DTYPE_CODES[grad_sums.dtype]
    emulated.cuda_region_sums_backward(words, pyramid.batch, code, grad_sums.data_ptr(), 0, 0)
    for output in outputs:
        output.assert_untouched()
    return grads


def run_mask_backward(
    emulated: ModuleType, grad_sums: Tensor, pyramid: Pyramid
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of the masks."""
    fg, bg = ([unwritten(w.shape, grad_sums.dtype) for w in masks] for masks in (pyramid.fg, pyramid.bg))
    grad_fg, grad_bg = ([output.tensor for output in outputs] for outputs in (fg, bg))
    words = native.mask_backward_words(*pyramid, grad_fg, grad_bg)
    code = DTYPE_CODES[grad_sums.dtype]
    emulated.cuda_region_sums_mask_backward(words, pyramid.batch, code, grad_sums.data_ptr(), 0, 0)
    for output in (*fg, *bg):
        output.assert_untouched()
    return grad_fg, grad_bg


def check(
    emulated: ModuleType,
    pyramid: Pyramid,
    upstream: Sequence[Tensor | None] | None = None,
    layouts: Sequence[str] = (),
) -> list[Tensor]:
    """Compares all three operations; returns what the kernels made.

    The bands are multiples of the rounding error of what is added up, that is of the same result for the
    absolute values of all numbers.
    """
    features, fg, bg = pyramid.wide()
    size = [layer.abs() for layer in features]
    u = UNIT[pyramid.accumulate]
    sums, masses = run_forward(emulated, pyramid)
    wanted = reference.forward(features, fg, bg)
    band = reference.forward(size, fg, bg)
    assert_within(sums, wanted[0], 8 * u * band[0], "a sum")
    assert_within(masses, wanted[1], 8 * u * band[1], "a mass")

    upstream = upstream or [None] * len(features)
    grad_sums = torch.randn(sums.shape, dtype=torch.float64).to(sums.dtype)
    g = grad_sums.double()
    geometry = [Geometry(layer.shape, layer.contiguous().stride(), torch.float64) for layer in features]
    wide = [None if added is None else added.double() for added in upstream]
    magnitude = [None if added is None else added.abs() for added in wide]
    grads = run_backward(emulated, grad_sums, pyramid, upstream, layouts or ["contiguous"] * len(features))
    wanted, _, _ = reference.backward(g, fg, bg, wide, [], geometry)
    band, _, _ = reference.backward(g.abs(), fg, bg, magnitude, [], geometry)
    for grad, value, terms in zip(grads, wanted, band, strict=True):
        rounding = 1.05 * UNIT[grad.dtype] * value.abs() + torch.finfo(grad.dtype).smallest_normal * 1e-3
        assert_within(grad, value, 4 * u * terms + rounding, "a gradient")

    grad_fg, grad_bg = run_mask_backward(emulated, grad_sums, pyramid)
    _, wanted_fg, wanted_bg = reference.backward(g, fg, bg, [], features, [])
    # With an implied background the reference subtracts the second coefficient from the first.
    g = torch.stack([g[0].abs(), g[1].abs() if bg else -g[1].abs()])
    _, band_fg, band_bg = reference.backward(g, fg, bg, [], size, [])
    for grad, value, terms in zip(
        [*grad_fg, *grad_bg], [*wanted_fg, *wanted_bg], [*band_fg, *band_bg], strict=True
    ):
        assert_within(grad, value, 20 * u * terms, "a mask's gradient")
    return [sums, masses, *grads, *grad_fg, *grad_bg]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FEATURE_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_dtype_mask_and_layout(emulated, rank, dtype, layout):
    """The first shape allows vector accesses, the second one does not."""
    for shape in ((2, 16, *(4, 3, 16)[3 - rank :]), (3, 5, *(3, 7, 5)[3 - rank :])):
        for mask_dtype in MASK_DTYPES:
            for has_bg in (False, True):
                pyramid = make_layer(shape, dtype, layout, mask_dtype, has_bg)
                check(emulated, pyramid)


@pytest.mark.parametrize("has_bg", [False, True], ids=["implied", "given"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced by vectors", "strided"])
@pytest.mark.parametrize(
    "shape", [(1, 3, 8208), (2, 24, 64, 80), (1, 70, 33, 65), (1, 2, 9, 16, 24)], ids=str
)
def test_several_tiles_of_a_plane_are_added_up(emulated, shape, layout, has_bg):
    pyramid = make_layer(shape, torch.float32, layout, torch.float32, has_bg)
    words = native.forward_words(*pyramid)
    assert emulated.cuda_region_sums_workspace(words, shape[0], 0) > 0
    check(emulated, pyramid, layouts=["channels_last" if layout == "channels_last" else "contiguous"])


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
    check(emulated, join(layers), layouts=[DENSE_LAYOUTS[i % 5] for i in range(19)])


@pytest.mark.parametrize("upstream_layout", [*LAYOUTS, "one number"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FEATURE_DTYPES, ids=dtype_name)
def test_an_upstream_gradient_of_any_strides_is_added(emulated, dtype, layout, upstream_layout):
    for shape in ((2, 16, 8, 16), (2, 5, 7, 3)):
        values = torch.randn(shape, dtype=torch.float64).to(dtype)
        if upstream_layout == "one number":
            upstream = values[:1, :1, :1, :1].expand(shape)
        else:
            upstream = lay_out(values, upstream_layout)
        pyramid = make_layer(shape, dtype, layout, torch.uint8, has_bg=True)
        check(emulated, join([pyramid, pyramid]), [upstream, None], [layout, layout])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_twice(emulated, layout):
    pyramid = make_layer((2, 7, 65, 63), torch.float32, layout, torch.float32, has_bg=True)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(check(emulated, pyramid))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_masks_off_the_alignment_of_vectors_are_read_one_by_one(emulated):
    for dtype in MASK_DTYPES:
        features, fg, bg = make_layer((2, 4, 8, 8), torch.float32, "contiguous", dtype, has_bg=True)
        check(emulated, Pyramid(features, [lay_out(fg[0], "off alignment")], bg))
        check(emulated, Pyramid(features, fg, [lay_out(bg[0], "off alignment")]))


def test_a_nan_that_is_not_left_out_reaches_both_sums_of_its_channel(emulated):
    for layout in ("contiguous", "channels_last"):
        for has_bg in (False, True):
            features, fg, bg = make_layer((1, 8, 8, 8), torch.float32, layout, torch.uint8, has_bg)
            fg[0].zero_()[0, 9] = 1
            if has_bg:
                bg[0].copy_(1 - fg[0])
            features[0].zero_()[0, 3, 1, 1] = math.nan
            sums, masses = run_forward(emulated, Pyramid(features, fg, bg))
            assert sums.isnan().nonzero().tolist() == [[0, 0, 3], [1, 0, 3]]
            assert masses.flatten().tolist() == [1, 63]


@st.composite
def pyramids(draw: st.DrawFn) -> tuple[Pyramid, list[Tensor | None], list[str]]:
    """Layers, upstream gradients and layouts of the results."""
    N, has_bg = draw(st.integers(0, 4)), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layers, upstream, layouts = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        spatial = draw(st.lists(st.integers(1, 12) | st.sampled_from((16, 32)), min_size=1, max_size=3))
        shape = (N, draw(st.integers(1, 40)), *spatial)
        dtype = draw(st.sampled_from(FEATURE_DTYPES))
        layer = make_layer(
            shape, dtype, draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(MASK_DTYPES)), has_bg
        )
        layers.append(layer)
        added = draw(st.sampled_from((None, *LAYOUTS)))
        upstream.append(None if added is None else lay_out(torch.randn(shape).to(dtype), added))
        layouts.append(draw(st.sampled_from(DENSE_LAYOUTS)))
    return join(layers), upstream, layouts


@settings(max_examples=40, derandomize=True, deadline=None)
@given(drawn=pyramids())
def test_any_pyramid(emulated, drawn):
    check(emulated, *drawn)
