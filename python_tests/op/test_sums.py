"""`sums` of every backend under given weights, against float64 truth, with unwritten memory full of NaN."""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import ALL_LAYOUTS, FEATURE_DTYPES, WEIGHT_KINDS, Case, cases, lay_out, weights_for
from fdkernels.conventions import Options
from fdkernels.op import reference
from fdkernels.op.kernels import kernels_of
from fdkernels.op.pyramid import Sums, Weights, accumulate_dtype, describe
from oracles import assert_within, sums_under, unit

pytestmark = pytest.mark.usefixtures("nan_filled")

PAPER = Options("valid", False, "vector", 1.0, 1e-12, "none", "mean")
DEFINED = (None, PAPER)  # with options the losses are made in the same call


def run(backend: str, features: list[Tensor], weights: Weights, options: Options | None = None) -> Sums:
    return kernels_of(backend).sums(features, weights, describe(features), options, None, options is not None)


def check(backend: str, features: list[Tensor], weights: Weights, options: Options | None = None) -> Sums:
    """Sums and masses of all layers are those of the formula."""
    features = [layer.detach() for layer in features]
    out = run(backend, features, weights, options)
    dtype = accumulate_dtype(features)
    assert out.sums.dtype == out.masses.dtype == dtype
    assert out.masses.shape == (2, features[0].shape[0], len(features))
    parts = out.sums.split([layer.shape[1] for layer in features], dim=-1)
    for index, (layer, part) in enumerate(zip(features, parts, strict=True)):
        w_bg = weights.bg[index].cpu() if weights.bg else None
        truth = sums_under(layer.cpu(), weights.fg[index].cpu(), w_bg)
        u = unit(dtype)
        assert_within(part[0], truth.fg, u * truth.abs_fg, "foreground")
        assert_within(part[1], truth.bg, u * truth.abs_bg, "background")
        mass = truth.fg_mass + truth.bg_mass
        assert_within(out.masses[0, :, index], truth.fg_mass, u * mass, "foreground mass")
        assert_within(out.masses[1, :, index], truth.bg_mass, u * mass, "background mass")
    return out


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("dtype", FEATURE_DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_every_layout_and_dtype(backend, device, layout, dtype):
    shapes = [(2, 5, 6, 7), (2, 9, 4, 5)]
    features = [lay_out(torch.randn(shape).to(device, dtype), layout) for shape in shapes]
    check(backend, features, weights_for(features, "valid wide"))


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_weights_of_every_kind(backend, device, kind, dtype):
    features = [torch.randn(3, 4, 11), lay_out(torch.randn(3, 6, 15), "channels_last"), torch.randn(3, 1, 1)]
    features = [layer.to(device, dtype) for layer in features]
    check(backend, features, weights_for(features, kind))


@pytest.mark.parametrize("options", DEFINED, ids=["sums", "losses"])
def test_layers_of_any_dtype_layout_and_size_lie_side_by_side(backend, device, for_all, options):
    @for_all(cases(layouts=ALL_LAYOUTS, max_size=11), st.sampled_from(WEIGHT_KINDS))
    def check_case(case: Case, kind: str) -> None:
        features = case.features(device)
        generator = torch.Generator().manual_seed(case.seed)
        check(backend, features, weights_for(features, kind, generator), options)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("options", DEFINED, ids=["sums", "losses"])
def test_layers_of_other_ranks_lie_side_by_side(backend, device, layout, options):
    shapes = [(2, 3, 9), (2, 17, 3, 3), (2, 1, 2, 4, 3)]
    dtypes = FEATURE_DTYPES[1:]
    features = [
        lay_out(torch.randn(s).to(device, dtype), layout) for s, dtype in zip(shapes, dtypes, strict=True)
    ]
    check(backend, features, weights_for(features, "mixed"), options)
    check(backend, features[1:], weights_for(features[1:], "valid mixed"), options)


def test_more_layers_than_a_launch_holds(backend, device, interpreted):
    features = [torch.randn(2, 1 + i % 3, 3 + i % 4, device=device) for i in range(17 if interpreted else 37)]
    check(backend, features, weights_for(features, "valid mixed"), PAPER)


def test_sums_and_masses_by_hand(backend, device):
    features = torch.tensor([[[1.0, 2.0, 4.0], [-1.0, 0.5, 3.0]]], device=device)
    fg = torch.tensor([[1.0, 0.25, 0.0]], device=device)
    out = run(backend, [features], Weights([fg], []))
    assert out.sums.tolist() == [[[1.5, -0.875]], [[5.5, 3.375]]]
    assert out.masses.tolist() == [[[1.25]], [[1.75]]]
    assert out.losses is None
    assert out.slopes is None


def test_weights_that_leave_pixels_out_by_hand(backend, device):
    features = torch.tensor([[[1.0, 2.0, 4.0], [-1.0, 0.5, 3.0]]], device=device)
    fg = torch.tensor([[1.0, 0.25, 0.0]], device=device)
    bg = torch.tensor([[0.0, 0.5, 0.0]], device=device)
    out = run(backend, [features], Weights([fg], [bg]))
    assert out.sums.tolist() == [[[1.5, -0.875]], [[1.0, 0.25]]]
    assert out.masses.tolist() == [[[1.25]], [[0.5]]]


def test_losses_and_slopes_are_those_of_the_sums(backend, device):
    features = [torch.randn(3, C, s, device=device) for C, s in ((5, 20), (3, 7))]
    pairing = torch.tensor([[0, 1], [-1, 2], [2, 1]], device=device)
    options = Options("region", False, "vector", 0.5, 1e-6, "pooled", "mean")
    weights = weights_for(features, "wide")
    out = kernels_of(backend).sums(features, weights, describe(features), options, pairing, True)
    losses, slopes = reference.losses(out.sums, out.masses, describe(features), options, pairing)
    torch.testing.assert_close(out.losses, losses)
    torch.testing.assert_close(out.slopes, slopes)


def test_losses_are_added_up_where_asked(backend, device):
    features = [torch.randn(2, 5, 6, 7, device=device), torch.randn(2, 37, 10, device=device)]
    weights = weights_for(features, "mixed")
    each, together = (
        kernels_of(backend).sums(features, weights, describe(features), PAPER, None, True, adds_up=asked)
        for asked in (False, True)
    )
    assert together.losses.shape == ()
    torch.testing.assert_close(together.losses, each.losses.double().sum().float())
    assert all(
        torch.equal(getattr(each, name), getattr(together, name)) for name in ("sums", "masses", "slopes")
    )


def test_without_slopes_nothing_else_changes(backend, device):
    features = [torch.randn(2, 5, 6, 7, device=device), torch.randn(2, 37, 10, device=device)]
    weights = weights_for(features, "mixed")
    with_slopes, without = (
        kernels_of(backend).sums(features, weights, describe(features), PAPER, None, asked)
        for asked in (True, False)
    )
    assert with_slopes.slopes.shape == with_slopes.sums.shape
    assert without.slopes is None
    assert all(torch.equal(a, b) for a, b in zip(with_slopes[:3], without[:3], strict=True))


@pytest.mark.parametrize("kind", ["wide", "valid uint8"])
def test_a_sample_gives_the_same_bits_in_any_batch(backend, device, kind):
    if backend == "reference" and device.type == "cuda":
        pytest.skip("torch's matrix products on a GPU do not promise it")
    features = torch.randn(3, 5, 40, 17, device=device)
    weights = weights_for([features], kind)
    whole = run(backend, [features], weights)
    last = Weights([w[2:] for w in weights.fg], [w[2:] for w in weights.bg])
    alone = run(backend, [features[2:]], last)
    assert torch.equal(whole.sums[:, 2:], alone.sums)
    assert torch.equal(whole.masses[:, 2:], alone.masses)


@pytest.mark.parametrize("options", DEFINED, ids=["sums", "losses"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_the_same_bits_twice(backend, device, layout, options):
    features = lay_out(torch.randn(2, 7, 23, 31, dtype=torch.bfloat16).to(device), layout)
    weights = weights_for([features], "valid wide")
    first, second = (run(backend, [features], weights, options) for _ in range(2))
    made = [(a, b) for a, b in zip(first, second, strict=True) if a is not None]
    assert len(made) == (2 if options is None else 4)
    assert all(torch.equal(a, b) for a, b in made)


def test_what_pixels_hold_that_are_left_out_has_no_effect(backend, device):
    features = torch.randn(2, 3, 4, 5, device=device)
    (fg,), (bg,) = weights = weights_for([features], "valid wide")
    left_out = ((fg == 0) & (bg == 0)).reshape(2, 1, 4, 5).expand_as(features)
    clean = run(backend, [features.masked_fill(left_out, 0.0)], weights)
    for value in (math.nan, math.inf):
        dirty = run(backend, [features.masked_fill(left_out, value)], weights)
        assert torch.equal(clean.sums, dirty.sums)
        assert torch.equal(clean.masses, dirty.masses)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("has_bg", [False, True], ids=["implied", "given"])
def test_a_valid_pixel_that_is_not_finite_reaches_both_sums(backend, device, bad, has_bg):
    features = torch.randn(2, 3, 4, device=device)
    features[1, 2, 3] = bad
    fg = torch.ones(2, 4, dtype=torch.uint8, device=device)
    sums = run(backend, [features], Weights([fg], [1 - fg] if has_bg else [])).sums
    assert not sums[:, 1, 2].isfinite().any()
    assert sums[1, 1, 2].isnan()  # 0 times NaN or Inf
    sums[:, 1, 2] = 0
    assert sums.isfinite().all()


@pytest.mark.parametrize("has_bg", [False, True], ids=["implied", "given"])
def test_a_weight_that_is_nan_reaches_sums_and_masses(backend, device, has_bg):
    features = torch.randn(2, 3, 4, device=device)
    fg = torch.rand(2, 4, device=device)
    fg[1, 2] = math.nan
    out = run(backend, [features], Weights([fg], [1 - fg] if has_bg else []))
    assert out.sums[:, 1].isnan().all()
    assert out.masses[:, 1].isnan().all()
    assert out.sums[:, 0].isfinite().all()
    assert out.masses[:, 0].isfinite().all()


@pytest.mark.parametrize("options", DEFINED, ids=["sums", "losses"])
@pytest.mark.parametrize("shapes", [[(0, 3, 4)], [(0, 2, 4, 4), (0, 5, 2, 3)]], ids=["a layer", "two layers"])
def test_a_batch_without_samples(backend, device, shapes, options):
    features = [torch.randn(shape, device=device) for shape in shapes]
    channels = sum(shape[1] for shape in shapes)
    out = run(backend, features, weights_for(features, "valid wide"), options)
    assert out.sums.shape == (2, 0, channels)
    assert out.masses.shape == (2, 0, len(shapes))
    if options is not None:
        assert out.losses.tolist() == [0.0] * len(shapes)
        assert out.slopes.shape == out.sums.shape


@pytest.mark.parametrize("options", DEFINED, ids=["sums", "losses"])
def test_a_layer_without_channels(backend, device, options):
    features = [torch.randn(2, 0, 3, device=device), torch.randn(2, 2, 3, device=device)]
    weights = weights_for(features, "wide")
    out = run(backend, features, weights, options)
    alone = run(backend, features[1:], Weights(weights.fg[1:], []), options)
    assert torch.equal(out.sums, alone.sums)
    torch.testing.assert_close(out.masses[0, :, 0], weights.fg[0].sum(1))
    if options is not None:
        assert out.losses[0].item() == pytest.approx(-math.log(options.eps), rel=1e-6)
        assert torch.equal(out.losses[1:], alone.losses)


def test_one_pixel(backend, device):
    features = torch.tensor([[2.0, -3.0]], device=device).reshape(1, 2, 1, 1)
    out = run(backend, [features], Weights([torch.full((1, 1), 0.25, device=device)], []))
    assert out.sums.tolist() == [[[0.5, -0.75]], [[1.5, -2.25]]]
    assert out.masses.tolist() == [[[0.25]], [[0.75]]]


@pytest.mark.parametrize("channels_last", [False, True])
def test_offsets_beyond_32_bits_lead_to_the_right_elements(backend, device, channels_last):
    if device.type != "cpu":
        pytest.skip("the memory is lent by the system of the host")
    # The second sample lies 2^31 elements behind the first, in memory of which only what is used exists.
    reach = 2**31 + 8
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, 4 * (reach + 64), flags=flags)
    except (OSError, ValueError) as error:
        pytest.skip(f"the system does not lend {4 * reach} bytes: {error}")
    flat = torch.frombuffer(memory, dtype=torch.float32)
    features = flat.as_strided((2, 2, 3), (reach, 1, 2) if channels_last else (reach, 3, 1))
    features.copy_(torch.arange(12.0).reshape(2, 2, 3))
    out = run(backend, [features], Weights([torch.ones(2, 3)], []))
    assert out.sums[0].tolist() == [[0 + 1 + 2, 3 + 4 + 5], [6 + 7 + 8, 9 + 10 + 11]]


def test_cancelling_regions_keep_their_digits(backend, device, interpreted):
    if interpreted:
        pytest.skip("the interpreter adds up a million pixels for a minute")
    # 2^20 pixels of ±1000 that cancel but for one of 1: a float32 sum in one chain would lose it.
    values = torch.full((1, 1, 2**20), 1000.0)
    values[..., 1::2] = -1000.0
    values[..., 12345] += 1.0
    fg = torch.ones(1, 2**20, dtype=torch.uint8, device=device)
    out = run(backend, [values.to(device)], Weights([fg], []))
    assert math.isclose(out.sums[0].item(), 1.0, abs_tol=2**20 * 1000 * 1e-9)
    assert out.sums[1].item() == 0.0
