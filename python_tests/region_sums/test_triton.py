"""Backend `triton` of region_sums against float64 in NumPy, with unwritten memory full of NaN."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from fdkernels.region_sums.geometry import Geometry, geometry_of
from fdkernels.region_sums.impl import triton as backend
from fdkernels.region_sums.impl import triton_layers, triton_partials

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED,
    reason="needs a CUDA device or TRITON_INTERPRET=1",
)

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MASKS = ["uint8", "float32", "float64", "valid_uint8", "valid_float32", "valid_float64"]


@pytest.fixture(autouse=True, scope="module")
def _unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _forget_plans(monkeypatch):
    for name in ("plan_layers", "plan_second_pass"):
        monkeypatch.setattr(backend, name, getattr(backend, name).__wrapped__)


def _id(value):
    return str(value).removeprefix("torch.")


def _contiguous(*shape):
    return torch.randn(shape)


def _channels_last(*shape):
    order = [0, *range(2, len(shape)), 1]
    back = [0, len(shape) - 1, *range(1, len(shape) - 1)]
    return torch.randn([shape[dim] for dim in order]).permute(back)


def _sliced(*shape):
    bigger = torch.randn([2 * size + 1 for size in shape])
    return bigger[tuple(slice(1, 2 * size, 2) for size in shape)]


def _cropped(*shape):
    N, C, *S = shape
    bigger = torch.randn([N, C + 2, *(size + 3 for size in S)])
    return bigger[(slice(None), slice(1, C + 1), *(slice(2, size + 2) for size in S))]


def _turned(*shape):
    return torch.randn(*reversed(shape)).permute(*reversed(range(len(shape))))


def _expanded(*shape):
    return torch.randn(1, shape[1], *[1] * (len(shape) - 3), shape[-1]).expand(shape)


def _constant(*shape):
    return torch.randn([1] * len(shape)).expand(shape)


LAYOUTS = [_contiguous, _channels_last, _sliced, _cropped, _turned, _expanded, _constant]


def _place(tensor, dtype):
    """On the device in that dtype, with the strides and the shared elements of `tensor`."""
    base = tensor.as_strided([1 + _last_offset(tensor)], [1], tensor.storage_offset())
    base = base.to(device=DEVICE, dtype=dtype, copy=True)
    return base.as_strided(tensor.shape, tensor.stride())


def _last_offset(tensor):
    return sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _masks(features, kind):
    """fg and bg for every layer; a third of the pixels is not valid where bg is given."""
    dtype = getattr(torch, kind.removeprefix("valid_"))
    fg, bg = [], []
    for layer in features:
        y = torch.rand(layer.shape[0], layer.shape[2:].numel())
        y = (y > 0.5).to(dtype) if dtype == torch.uint8 else y.to(dtype)
        v = (torch.rand(y.shape) > 1 / 3).to(dtype)
        fg.append((v * y if kind.startswith("valid") else y).to(DEVICE))
        bg.append((v * (1 - y)).to(DEVICE))
    return fg, bg if kind.startswith("valid") else []


def _float64(tensor):
    return tensor.detach().cpu().double().numpy()


def _weights(fg, bg, index):
    w_fg = _float64(fg[index])
    w_bg = _float64(bg[index]) if bg else 1 - w_fg
    return w_fg, w_bg, (w_fg != 0) | (w_bg != 0)


def _flat(features):
    return _float64(features).reshape(*features.shape[:2], features.shape[2:].numel())


def _expected_forward(features, fg, bg):
    """Sums and masses by (R2), and what their absolute summands add up to."""
    sums, sizes, masses = [], [], []
    for index, layer in enumerate(features):
        w_fg, w_bg, valid = _weights(fg, bg, index)
        F = np.where(valid[:, None], _flat(layer), 0)
        sums.append([(F * w[:, None]).sum(2) for w in (w_fg, w_bg)])
        sizes.append([(abs(F) * w[:, None]).sum(2) for w in (w_fg, w_bg)])
        masses.append([w_fg.sum(1), w_bg.sum(1)])
    return np.concatenate(sums, 2), np.concatenate(sizes, 2), np.stack(masses, 2)


def _expected_gradients(grad_sums, fg, bg, upstream, features):
    """By (R3) and (R4) for every layer, the gradients of features, fg and bg, and their sizes."""
    expected = []
    start = 0
    for index, layer in enumerate(features):
        w_fg, w_bg, valid = _weights(fg, bg, index)
        F = np.where(valid[:, None], _flat(layer), 0)
        g_fg, g_bg = _float64(grad_sums)[..., start : start + F.shape[1]]
        start += F.shape[1]
        terms = [g_fg[:, :, None] * w_fg[:, None], g_bg[:, :, None] * w_bg[:, None]]
        if upstream and upstream[index] is not None:
            terms.append(_flat(upstream[index]))
        mask_terms = [(g_fg[:, :, None] * F), (g_bg[:, :, None] * F)]
        if not bg:
            mask_terms = [mask_terms[0] - mask_terms[1]]
        expected.append(
            (
                (sum(terms).reshape(layer.shape), sum(map(abs, terms)).reshape(layer.shape)),
                *((term.sum(1), abs(term).sum(1)) for term in mask_terms),
            )
        )
    return expected


def _assert_near(actual, expected, size):
    """Rounded once, after a few roundings in the dtype that accumulates."""
    info = torch.finfo(actual.dtype)
    rounding = info.eps / 2
    if actual.dtype == torch.bfloat16 and INTERPRETED:
        rounding = info.eps  # the interpreter cuts bfloat16 off, a GPU rounds to nearest
    wide = torch.float64 if actual.dtype == torch.float64 else torch.float32
    rounding += 8 * torch.finfo(wide).eps
    error = abs(_float64(actual) - expected)
    assert error.shape == size.shape
    assert (error <= rounding * size + info.smallest_normal).all(), (error / size).max()


def _check(features, fg, bg, upstream=()):
    """Forward and all of backward, against NumPy."""
    dtype = torch.float64 if any(F.dtype == torch.float64 for F in features) else torch.float32
    sums, masses = backend.forward(features, fg, bg)
    expected, size, expected_masses = _expected_forward(features, fg, bg)
    assert sums.dtype == masses.dtype == dtype
    _assert_near(sums, expected, size)
    _assert_near(masses, expected_masses, expected_masses)

    grad_sums = torch.randn(sums.shape, dtype=dtype, device=DEVICE)
    geometry = [geometry_of(layer) for layer in features]
    grads, grad_fg, grad_bg = backend.backward(grad_sums, fg, bg, upstream, features, geometry)
    expected = _expected_gradients(grad_sums, fg, bg, upstream, features)
    assert (len(grads), len(grad_fg), len(grad_bg)) == (len(features), len(features), len(bg))
    for index, layer in enumerate(features):
        grad = grads[index]
        assert (grad.dtype, grad.stride()) == (layer.dtype, geometry[index].stride)
        _assert_near(grad, *expected[index][0])
        _assert_near(grad_fg[index], *expected[index][1])
        assert grad_fg[index].dtype == dtype
        if bg:
            _assert_near(grad_bg[index], *expected[index][2])


def test_sums_and_gradients_by_hand():
    features = torch.tensor([[[1.0, 2.0, 4.0], [-1.0, 0.5, 3.0]]], device=DEVICE)
    fg = torch.tensor([[1.0, 0.25, 0.0]], device=DEVICE)
    sums, masses = backend.forward([features], [fg], [])
    assert sums.tolist() == [[[1.5, -0.875]], [[5.5, 3.375]]]
    assert masses.tolist() == [[[1.25]], [[1.75]]]
    grad_sums = torch.tensor([[[2.0, 3.0]], [[-4.0, 8.0]]], device=DEVICE)
    geometry = geometry_of(features)
    grads = backend.backward(grad_sums, [fg], [], [], [features], [geometry])
    assert grads[0][0].tolist() == [[[2.0, -2.5, -4.0], [3.0, 6.75, 8.0]]]
    assert grads[1][0].tolist() == [[6 + 5, 12 - 2.5, 24 - 15]]
    assert grads[2] == []


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__[1:])
@pytest.mark.parametrize("dtype", FLOATS, ids=_id)
def test_layouts_and_dtypes_match_float64(layout, dtype):
    torch.manual_seed(0)
    features = [_place(layout(2, 5, 6, 7), dtype), _place(layout(2, 9, 4, 2, 5), dtype)]
    fg, bg = _masks(features, "valid_float32")
    upstream = [torch.randn(layer.shape, device=DEVICE).to(dtype) for layer in features]
    _check(features, fg, bg, upstream)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=_id)
def test_masks_of_every_kind_match_float64(mask, dtype):
    torch.manual_seed(1)
    features = [_place(_contiguous(3, 4, 11), dtype), _place(_channels_last(3, 6, 5, 3), dtype)]
    _check(features, *_masks(features, mask))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__[1:])
def test_upstream_of_any_layout_is_added(layout):
    torch.manual_seed(2)
    features = [_place(make(2, 3, 5, 4), torch.float32) for make in (_contiguous, _channels_last)]
    fg, bg = _masks(features, "uint8")
    upstream = [_place(layout(2, 3, 5, 4), torch.float32), None]
    _check(features, fg, bg, upstream)
    _check(features, fg, bg, upstream[::-1])


def test_layers_of_different_dtype_and_rank_lie_side_by_side():
    torch.manual_seed(3)
    makers = [_contiguous(2, 3, 9), _channels_last(2, 17, 3, 3), _cropped(2, 1, 2, 4, 3)]
    features = [_place(F, dtype) for F, dtype in zip(makers, FLOATS[1:], strict=True)]
    _check(features, *_masks(features, "float64"))
    _check(features[1:], *_masks(features[1:], "valid_uint8"))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 70)),
    spatial=st.lists(st.integers(1, 11), min_size=1, max_size=3),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(FLOATS),
    mask=st.sampled_from(MASKS),
    seed=st.integers(0, 2**16),
)
def test_any_shape_matches_float64(shape, spatial, layout, dtype, mask, seed):
    torch.manual_seed(seed)
    N, C = shape
    F = layout(N, C, *spatial) if N else torch.randn(N, C, *spatial)
    features = [_place(F, dtype) if N else F.to(device=DEVICE, dtype=dtype)]
    _check(features, *_masks(features, mask))


@pytest.mark.parametrize("layout", [_contiguous, _channels_last], ids=["contiguous", "last"])
def test_a_layer_of_many_tiles_matches_float64(layout, monkeypatch):
    torch.manual_seed(4)
    _forget_plans(monkeypatch)
    monkeypatch.setattr(triton_layers, "_BLOCK", 128)
    monkeypatch.setattr(triton_layers, "_PIXELS_OF_CHANNELS", (32,))
    monkeypatch.setattr(triton_layers, "_MIN_TILE_PIXELS", 16)
    monkeypatch.setattr(triton_partials, "_REDUCE_TILES", (4, 16))
    features = [_place(layout(1, 3, 31, 33), torch.float32)]
    tiles = []
    for programs in (64, 8, 2):
        monkeypatch.setattr(triton_layers, "_PROGRAMS", programs)
        layer = triton_layers.describe(features, _masks(features, "uint8")[0])
        tiles.append(backend.plan_layers((layer,), torch.float32, False)[0][0].tiles)
        _check(features, *_masks(features, "valid_float32"))
    assert tiles[0] > 16 > tiles[1] > 4 > tiles[2] > 1


def test_pixel_numbers_of_64_bits_give_the_same(monkeypatch):
    torch.manual_seed(5)
    features = [_place(_cropped(2, 3, 5, 7, 9), torch.float32)]
    fg, bg = _masks(features, "valid_uint8")
    geometry = [geometry_of(features[0])]
    results = []
    _forget_plans(monkeypatch)
    for limit in (triton_layers._WIDE, 0):
        monkeypatch.setattr(triton_layers, "_WIDE", limit)
        sums, masses = backend.forward(features, fg, bg)
        grads = backend.backward(sums, fg, bg, [], features, geometry)
        results.append([sums, masses, *(grad for part in grads for grad in part)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_offsets_beyond_32_bits_are_reached(monkeypatch):
    # This memory is touched only where the features lie: it must not be filled.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    shape, far = (3, 3, 3, 2, 3), 2**30 + 2**20  # the stride has 32 bits, twice the stride has not
    try:
        memory = torch.empty(2 * far + 1024, dtype=torch.float16, device=DEVICE)
    except (RuntimeError, torch.OutOfMemoryError):
        pytest.skip("4 GiB of memory cannot be had")
    fg = torch.rand(3, 18, device=DEVICE)
    for strides in ((far, 64, 16, 5, 1), (64, far, 16, 5, 1), (64, 16, far, 5, 1), (1, 4, 16, 64, far)):
        features = memory.as_strided(shape, strides)
        features.copy_(torch.randn(shape))
        sums, _ = backend.forward([features], [fg], [])
        _assert_near(sums, *_expected_forward([features], [fg], [])[:2])
        expected = _expected_gradients(sums, [fg], [], [features], [features])[0]
        geometry = [Geometry(shape, strides, torch.float16)]
        grads = backend.backward(sums, [fg], [], [features], [features], geometry)
        _assert_near(grads[0][0], *expected[0])
        _assert_near(grads[1][0], *expected[1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy")  # the interpreter computes with NumPy
def test_pixels_that_are_not_valid_have_no_effect_whatever_they_hold():
    torch.manual_seed(6)
    features = torch.randn(2, 3, 4, 5, device=DEVICE)
    (fg,), (bg,) = _masks([features], "valid_float32")
    ignored = ((fg == 0) & (bg == 0)).reshape(2, 1, 4, 5).expand_as(features)
    grad_sums = torch.randn(2, 2, 3, device=DEVICE)
    results = []
    for value in (0.0, math.nan, math.inf):
        layer = features.masked_fill(ignored, value)
        geometry = [geometry_of(layer)]
        grads = backend.backward(grad_sums, [fg], [bg], [], [layer], geometry)
        results.append([*backend.forward([layer], [fg], [bg]), *(part[0] for part in grads)])
    assert (results[0][2][ignored] == 0).all()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_valid_pixel_that_is_not_finite_reaches_both_sums(value):
    features = torch.randn(2, 3, 4, device=DEVICE)
    features[1, 2, 3] = value
    fg = torch.ones(2, 4, dtype=torch.uint8, device=DEVICE)
    for bg in ([], [1 - fg]):
        sums, _ = backend.forward([features], [fg], bg)
        assert not sums[:, 1, 2].isfinite().any()
        assert sums[1, 1, 2].isnan()
        sums[:, 1, 2] = 0
        assert sums.isfinite().all()


def test_a_gradient_that_is_not_finite_reaches_every_valid_pixel():
    fg = torch.tensor([[1.0, 0.0, 0.0]], device=DEVICE)
    bg = torch.tensor([[0.0, 1.0, 0.0]], device=DEVICE)
    grad_sums = torch.tensor([[[math.nan]], [[1.0]]], device=DEVICE)
    geometry = [Geometry((1, 1, 3), (3, 3, 1), torch.float32)]
    grad = backend.backward(grad_sums, [fg], [bg], [], [], geometry)[0][0].flatten()
    assert grad.isnan().tolist() == [True, True, False]
    assert grad[2] == 0


@pytest.mark.parametrize("layout", [_contiguous, _channels_last, _sliced])
def test_the_same_input_gives_the_same_bits(layout):
    torch.manual_seed(7)
    features = [_place(layout(2, 7, 23, 31), torch.bfloat16)]
    fg, bg = _masks(features, "valid_float32")
    geometry = [geometry_of(features[0])]
    runs = []
    for _ in range(2):
        sums, masses = backend.forward(features, fg, bg)
        grads = backend.backward(sums, fg, bg, features, features, geometry)
        runs.append([sums, masses, *(grad for part in grads for grad in part)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_sample_gives_the_same_bits_in_any_batch():
    torch.manual_seed(8)
    features = torch.randn(3, 5, 40, 17, device=DEVICE)
    fg = torch.rand(3, 40 * 17, device=DEVICE)
    sums, masses = backend.forward([features], [fg], [])
    alone = backend.forward([features[2:]], [fg[2:]], [])
    assert torch.equal(sums[:, 2:], alone[0])
    assert torch.equal(masses[:, 2:], alone[1])


def test_only_the_gradients_asked_for_come_back():
    features = [torch.randn(1, 2, 3, device=DEVICE), torch.randn(1, 4, 2, 2, device=DEVICE)]
    fg, bg = _masks(features, "valid_float32")
    sums, _ = backend.forward(features, fg, bg)
    geometry = [geometry_of(layer) for layer in features]
    for asked in ([], features):
        grads = backend.backward(sums, fg, bg, [], asked, geometry if not asked else [])
        assert [len(part) for part in grads] == ([0, 2, 2] if asked else [2, 0, 0])


def test_a_gradient_of_sums_with_strides_is_taken():
    features = torch.randn(2, 3, 5, device=DEVICE)
    fg = torch.rand(2, 5, device=DEVICE)
    grad_sums = torch.randn(1, 1, 3, device=DEVICE).expand(2, 2, 3)
    results = [
        backend.backward(g, [fg], [], [], [features], [geometry_of(features)])
        for g in (grad_sums, grad_sums.contiguous())
    ]
    for a, b in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.equal(a[0], b[0])
