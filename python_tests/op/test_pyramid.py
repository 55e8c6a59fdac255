"""The description of a call: what two calls share, what a registered op is given, and parts of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import ALL_LAYOUTS, Case, cases, lay_out
from fdkernels.conventions import EXCHANGES, NORMS, REDUCTIONS, REGION_WEIGHTS, Options
from fdkernels.op.pyramid import Weights, accumulate_dtype, describe, pack, select_layers, unpack


@given(cases(layouts=ALL_LAYOUTS))
def test_a_pyramid_is_read_back_from_its_integers(case: Case):
    pyramid = describe(case.features())
    packed = pack(pyramid)
    assert all(type(number) is int for number in packed)
    read = unpack(packed)
    for field in ("layers", "channels", "pixels", "dtype", "total_channels"):
        assert getattr(read, field) == getattr(pyramid, field)


@given(cases(layouts=ALL_LAYOUTS))
def test_a_pyramid_says_of_its_layers_what_they_are(case: Case):
    features = case.features()
    pyramid = describe(features)
    assert pyramid.channels == tuple(layer.shape[1] for layer in features)
    assert pyramid.pixels == tuple(math.prod(layer.shape[2:]) for layer in features)
    assert pyramid.total_channels == sum(pyramid.channels)
    assert pyramid.dtype == accumulate_dtype(features)
    assert pyramid.strides == tuple(layer.stride() for layer in features)
    for described, layer in zip(pyramid.layers, features, strict=True):
        assert (described.shape, described.dtype) == (tuple(layer.shape), layer.dtype)
        assert (described.channels, described.pixels) == (layer.shape[1], math.prod(layer.shape[2:]))
        gradient = torch.empty_strided(described.shape, described.stride)
        assert gradient.untyped_storage().size() == 4 * layer.numel()  # dense


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "turned"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_dense_features_have_gradients_of_their_strides(layout, rank):
    features = lay_out(torch.randn(2, 3, *(5, 4, 6)[:rank]), layout)
    assert describe([features]).layers[0].stride == features.stride()


@pytest.mark.parametrize("layout", ["sliced", "strided", "expanded", "repeated", "constant"])
def test_other_features_have_contiguous_gradients(layout):
    features = lay_out(torch.randn(2, 3, 5, 4), layout)
    assert describe([features]).layers[0].stride == (60, 20, 4, 1)


def test_calls_of_one_kind_share_their_description():
    first, second = ([torch.randn(2, 3, 4), torch.randn(2, 5, 2)] for _ in range(2))
    assert describe(first) is describe(second)
    assert describe(first[:1]) is not describe(first)


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [
        ((torch.float32,), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float64), torch.float64),
    ],
    ids=str,
)
def test_the_accumulation_dtype_is_float64_if_a_layer_is(dtypes, wanted):
    assert accumulate_dtype([torch.empty(1, 1, 1, dtype=dtype) for dtype in dtypes]) == wanted


def test_selected_layers_keep_the_dtype_of_the_call():
    layers = [torch.randn(2, C, 4).to(dtype) for C, dtype in ((3, torch.float32), (2, torch.float64))]
    pyramid = describe(layers)
    part = pyramid.select([0])
    assert (part.channels, part.pixels, part.dtype) == ((3,), (4,), torch.float64)
    assert pyramid.select([0, 1]) is pyramid


def test_selected_sums_and_weights_are_those_of_the_layers():
    pyramid = describe([torch.randn(2, C, 4) for C in (1, 2, 3)])
    sums = torch.arange(2 * 2 * 6.0).view(2, 2, 6)
    assert torch.equal(select_layers(sums, pyramid, [0, 2]), sums[..., [0, 3, 4, 5]])
    assert select_layers(sums, pyramid, [0, 1, 2]) is sums
    fg, bg = [torch.rand(2, 4) for _ in range(3)], [torch.rand(2, 4) for _ in range(3)]
    part = Weights(fg, bg).select([2, 0])
    assert [part.fg[0] is fg[2], part.fg[1] is fg[0], part.bg[0] is bg[2], part.bg[1] is bg[0]] == [True] * 4
    assert Weights(fg, []).select([1]).bg == []


NUMBERS = st.floats(min_value=0, allow_nan=False)


ANY_OPTIONS = st.builds(
    Options,
    st.sampled_from(REGION_WEIGHTS),
    st.booleans(),
    st.sampled_from(NORMS),
    NUMBERS,
    NUMBERS,
    st.sampled_from(EXCHANGES),
    st.sampled_from(REDUCTIONS),
)


@given(ANY_OPTIONS)
def test_options_are_read_back_from_their_text(options: Options):
    assert Options.from_text(options.as_text()) == options


def test_the_layers_that_train_are_described_once_for_all_steps():
    pyramid = describe([torch.empty(2, C, 4, 4) for C in (3, 5, 7)])
    assert pyramid.select([0, 2]) is pyramid.select([0, 2])
    assert pyramid.select([0, 2]).channels == (3, 7)
    assert pyramid.select([0, 1, 2]) is pyramid
