"""The CUDA kernels of both gradients, run on the CPU, against the reference in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import FEATURE_DTYPES
from cuda_emulation.build import Emulation
from cuda_emulation.calls import run_gradient, run_mask_gradient
from cuda_emulation.pyramids import (
    DENSE_LAYOUTS,
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
from fdkernels.op.pyramid import Weights


def check_gradient(
    emulated: Emulation,
    inputs: Inputs,
    factor: Tensor | None = None,
    upstream: Sequence[Tensor | None] = (),
    layouts: Sequence[str] = (),
) -> list[Tensor]:
    """Compares within a multiple of the rounding error of what is added up, and one of the result."""
    features, weights = inputs.wide()
    shape = (2, inputs.batch, sum(inputs.pyramid.channels))
    grad_sums = torch.randn(shape, dtype=torch.float64).to(inputs.accumulate)
    grads = run_gradient(emulated, grad_sums, factor, inputs, upstream, layouts)
    g, pyramid = grad_sums.double(), Inputs(features, weights).pyramid
    added = [None if u is None else u.double() for u in upstream]
    size = [None if u is None else u.abs() for u in added]
    by = None if factor is None else factor.double()
    wanted = reference.gradient(g, by, weights, added, pyramid)
    band = reference.gradient(g.abs(), None if by is None else by.abs(), weights, size, pyramid)
    u = UNIT[inputs.accumulate]
    for grad, value, terms in zip(grads, wanted, band, strict=True):
        rounding = 1.05 * UNIT[grad.dtype] * value.abs() + torch.finfo(grad.dtype).smallest_normal * 1e-3
        assert_within(grad, value, 5 * u * terms + rounding, "a gradient")
    return grads


def check_mask_gradient(emulated: Emulation, inputs: Inputs) -> Weights:
    features, weights = inputs.wide()
    shape = (2, inputs.batch, sum(inputs.pyramid.channels))
    grad_sums = torch.randn(shape, dtype=torch.float64).to(inputs.accumulate)
    got = run_mask_gradient(emulated, grad_sums, inputs)
    g = grad_sums.double()
    wanted = reference.mask_gradient(g, weights, features)
    # Without background weights the reference subtracts the second coefficient from the first.
    g = torch.stack([g[0].abs(), g[1].abs() if weights.bg else -g[1].abs()])
    band = reference.mask_gradient(g, weights, [layer.abs() for layer in features])
    for grad, value, terms in zip(
        [*got.fg, *got.bg], [*wanted.fg, *wanted.bg], [*band.fg, *band.bg], strict=True
    ):
        assert_within(grad, value, 20 * UNIT[inputs.accumulate] * terms, "a weight's gradient")
    return got


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FEATURE_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_dtype_mask_and_layout(emulated, rank, dtype, layout):
    """The first shape allows vector accesses, the second one does not."""
    for shape in ((2, 16, *(4, 3, 16)[3 - rank :]), (3, 5, *(3, 7, 5)[3 - rank :])):
        for mask_dtype in MASK_DTYPES:
            for has_bg in (False, True):
                inputs = make_layer(shape, dtype, layout, mask_dtype, has_bg)
                upstream = lay_out(torch.randn(shape).to(dtype), layout)
                check_gradient(emulated, inputs)
                check_gradient(emulated, inputs, torch.randn(1, dtype=inputs.accumulate), [upstream])
                check_mask_gradient(emulated, inputs)


@pytest.mark.parametrize("has_bg", [False, True], ids=["implied", "given"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced by vectors", "strided"])
@pytest.mark.parametrize(
    "shape", [(1, 3, 8208), (2, 24, 64, 80), (1, 70, 33, 65), (1, 2, 9, 16, 24)], ids=str
)
def test_several_tiles_of_a_plane(emulated, shape, layout, has_bg):
    inputs = make_layer(shape, torch.float32, layout, torch.float32, has_bg)
    check_gradient(emulated, inputs, layouts=["channels_last" if layout == "channels_last" else "contiguous"])
    check_mask_gradient(emulated, inputs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 2, 1, 1), (2, 300, 1), (0, 3, 5, 4), (2, 1, 1, 9, 1)], ids=str
)
def test_one_pixel_one_channel_and_no_sample(emulated, shape, layout):
    for has_bg in (False, True):
        inputs = make_layer(shape, torch.float32, layout, torch.float32, has_bg)
        check_gradient(emulated, inputs)
        check_mask_gradient(emulated, inputs)


@pytest.mark.parametrize("has_bg", [False, True], ids=["implied", "given"])
@pytest.mark.parametrize("wide", [False, True], ids=["float32 sums", "float64 sums"])
def test_a_pyramid_of_more_layers_than_a_launch_takes(emulated, launches, wide, has_bg):
    dtypes = FEATURE_DTYPES if wide else [d for d in FEATURE_DTYPES if d != torch.float64]
    inputs = join(
        [
            make_layer(
                (2, 1 + 5 * i % 19, *(3 + i, 8, 2)[: 1 + i % 3]),
                dtypes[i % len(dtypes)],
                LAYOUTS[i % len(LAYOUTS)],
                MASK_DTYPES[i % 3],
                has_bg,
            )
            for i in range(19)
        ]
    )
    layouts = [DENSE_LAYOUTS[i % 5] for i in range(19)]
    check_gradient(emulated, inputs, torch.randn(19, dtype=inputs.accumulate), layouts=layouts)
    check_mask_gradient(emulated, inputs)
    # A launch takes sixteen layers of one kind; pixels that fill no vectors make another kind.
    one, other = (
        [make_layer((2, 3, 3, side), torch.float32, "contiguous", torch.float32, has_bg)] for side in (8, 5)
    )
    for pyramid, expected in (
        (one * 19, 2),
        (one * 16, 1),
        (one * 8 + other + one, 2),
        (other + one * 18, 3),
    ):
        launches.count()
        check_gradient(emulated, join(pyramid))
        assert launches.count() == expected
        check_mask_gradient(emulated, join(pyramid))
        assert launches.count() == expected


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
        layer = make_layer(shape, dtype, layout, torch.uint8, has_bg=True)
        check_gradient(emulated, join([layer, layer]), None, [upstream, None], [layout, layout])


def test_a_factor_of_any_stride_is_read_in_place(emulated):
    inputs = join(
        [
            make_layer((5, 3, 34, 50), torch.float32, "contiguous", torch.float32, True),
            make_layer((5, 16, 24, 32), torch.bfloat16, "channels_last", torch.float32, True),
            make_layer((5, 5, 3, 2), torch.float32, "contiguous", torch.uint8, True),
        ]
    )
    upstream = [None, torch.randn(5, 16, 24, 32).bfloat16(), None]
    check_gradient(emulated, inputs, torch.tensor(0.7).expand(3), upstream)
    check_gradient(emulated, inputs, torch.randn(6)[::2], upstream)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_in_any_order_of_blocks(emulated, launches, layout):
    inputs = make_layer((2, 7, 65, 63), torch.float32, layout, torch.float32, has_bg=True)
    results = []
    for order in (0, 0, -1, 1, 2):
        launches.order(order)
        torch.manual_seed(0)
        grads = check_mask_gradient(emulated, inputs)
        results.append([*check_gradient(emulated, inputs), *grads.fg, *grads.bg])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_weights_off_the_alignment_of_vectors_are_read_one_by_one(emulated):
    for dtype in MASK_DTYPES:
        features, (fg, bg) = make_layer((2, 4, 8, 8), torch.float32, "contiguous", dtype, has_bg=True)
        for weights in (
            Weights([lay_out(fg[0], "off alignment")], bg),
            Weights(fg, [lay_out(bg[0], "off alignment")]),
        ):
            check_gradient(emulated, Inputs(features, weights))
            check_mask_gradient(emulated, Inputs(features, weights))


@st.composite
def calls(draw: st.DrawFn) -> tuple[Inputs, Tensor | None, list[Tensor | None], list[str]]:
    """Layers, a factor, upstream gradients and layouts of the results."""
    N, has_bg = draw(st.integers(0, 4)), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layers, upstream, layouts = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        spatial = draw(st.lists(st.integers(1, 12) | st.sampled_from((16, 32)), min_size=1, max_size=3))
        shape = (N, draw(st.integers(1, 40)), *spatial)
        dtype, layout = draw(st.sampled_from(FEATURE_DTYPES)), draw(st.sampled_from(LAYOUTS))
        layers.append(make_layer(shape, dtype, layout, draw(st.sampled_from(MASK_DTYPES)), has_bg))
        added = draw(st.sampled_from((None, *LAYOUTS)))
        upstream.append(None if added is None else lay_out(torch.randn(shape).to(dtype), added))
        layouts.append(draw(st.sampled_from(DENSE_LAYOUTS)))
    inputs = join(layers)
    factor = torch.randn(len(layers), dtype=inputs.accumulate) if draw(st.booleans()) else None
    return inputs, factor, upstream, layouts


@settings(max_examples=40, derandomize=True, deadline=None)
@given(call=calls())
def test_any_pyramid(emulated, call):
    inputs, factor, upstream, layouts = call
    check_gradient(emulated, inputs, factor, upstream, layouts)
    check_mask_gradient(emulated, inputs)
