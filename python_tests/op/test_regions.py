"""The functions over any number of regions in every language, against float64 written by definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import ALL_LAYOUTS, FEATURE_DTYPES, lay_out
from fdkernels.op.pyramid import Pyramid, Regions, accumulate_dtype, describe
from oracles import assert_within, unit

pytestmark = pytest.mark.usefixtures("nan_filled")

COUNTS = (1, 2, 3, 8)
KINDS = ("one-hot", "soft", "bytes", "soft with ignored", "bytes with ignored")


def regions_for(features: Sequence[Tensor], count: int, kind: str, moments: bool) -> Regions:
    """Random regions; under moments with a pivot near the features for each of them."""
    dtype, generator = accumulate_dtype(features), torch.Generator().manual_seed(count)
    weights = []
    for layer in features:
        shape = (layer.shape[0], count, layer.shape[2:].numel())
        w = torch.rand(shape, generator=generator, dtype=torch.float64)
        if not kind.startswith("soft"):
            w = (w == w.amax(1, keepdim=True)).double()
        if "ignored" in kind:
            w = w * (torch.rand(shape[0], 1, shape[2], generator=generator) > 1 / 3)
        stored = torch.uint8 if kind.startswith("bytes") else dtype
        weights.append(w.to(stored).contiguous().to(layer.device))
    pivots = None
    if moments:
        rows = [layer.detach().cpu().double().flatten(2)[:, :, 0] for layer in features]
        pivots = torch.cat(rows, dim=-1).expand(count, -1, -1) + torch.randn(count, 1, 1)
        pivots = pivots.to(dtype).to(features[0].device)
    return Regions(weights, "ignored" in kind, pivots)


def by_definition(
    features: Sequence[Tensor], regions: Regions, g: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Sums, masses, gradients of the features and of the weights in float64, and what each adds up.

    For g [R or 2R, N, ΣC]; the gradients are those of Σ g·S, by autograd.
    """
    pyramid = describe(features)
    S, S_size, M, leaves = [], [], [], []
    for index, layer in enumerate(features):
        F = layer.detach().cpu().double().requires_grad_()
        w = regions.weights[index].cpu().double()
        valid = (w != 0).any(1, keepdim=True)
        w = torch.where(w > 1, math.nan, w).requires_grad_()
        x = F.flatten(2).unsqueeze(1)  # [N, 1, C, P]
        if regions.pivots is not None:
            p = regions.pivots.cpu().double().split(pyramid.channels, dim=-1)[index]  # [R, N, C]
            x = x - p.transpose(0, 1).unsqueeze(-1)  # [N, R, C, P]
        if regions.selects:
            x = torch.where(valid.unsqueeze(2), x, 0)
        rows = [x * w.unsqueeze(2)] + ([] if regions.pivots is None else [x.square() * w.unsqueeze(2)])
        S.append(torch.cat([row.sum(-1).transpose(0, 1) for row in rows]))
        S_size.append(torch.cat([row.abs().sum(-1).transpose(0, 1) for row in rows]))
        M.append(w.sum(-1).transpose(0, 1))
        leaves.append((F, w))
    sums, masses = torch.cat(S, dim=-1), torch.stack(M, dim=-1)
    if g is None:
        return [sums, torch.cat(S_size, dim=-1), masses], []
    grads = torch.autograd.grad((sums * g.cpu().double()).sum(), [leaf for pair in leaves for leaf in pair])
    assert len(grads) == 2 * len(features)
    return list(grads[::2]), list(grads[1::2])


def sizes_of_gradients(
    features: Sequence[Tensor], regions: Regions, g: Tensor, pyramid: Pyramid
) -> tuple[list[Tensor], list[Tensor]]:
    """What the absolute summands of the gradients add up to."""
    R = regions.num_regions
    of_features, of_weights = [], []
    for index, part in enumerate(g.cpu().double().abs().split(pyramid.channels, dim=-1)):
        F = features[index].detach().cpu().double()
        w = regions.weights[index].cpu().double().transpose(0, 1)  # [R, N, P]
        x = F.flatten(2).expand(R, -1, -1, -1)
        a, h = part[:R].unsqueeze(-1), part[R:].unsqueeze(-1)  # [R, N, C, 1]
        if regions.pivots is None:
            slope, of_weight = a.expand_as(x), a * x.abs()
        else:
            p = regions.pivots.cpu().double().split(pyramid.channels, dim=-1)[index].unsqueeze(-1)
            x = (x - p).abs()
            slope, of_weight = a + 2 * h * x, a * x + h * x.square()
        of_features.append((slope * w.unsqueeze(2)).sum(0).reshape(F.shape))
        of_weights.append(of_weight.sum(2).transpose(0, 1))
    return of_features, of_weights


def check(
    kernels: Any, features: Sequence[Tensor], regions: Regions, upstream: Sequence[Tensor | None] = ()
) -> None:
    """Sums, masses and both gradients of all layers are those of the definition."""
    pyramid = describe(features)
    eps, rows = unit(pyramid.dtype), regions.num_regions * (1 if regions.pivots is None else 2)
    sums, masses = kernels.region_sums(features, regions, pyramid)
    (wanted, size, of_masses), _ = by_definition(features, regions)
    assert (sums.dtype, masses.dtype) == (pyramid.dtype, pyramid.dtype)
    assert_within(sums, wanted, 16 * eps * size, "sums", 1)
    assert_within(masses, of_masses, 16 * eps * of_masses, "masses", 1)

    g = torch.randn(rows, *sums.shape[1:], dtype=pyramid.dtype, device=sums.device)
    given = features if regions.pivots is not None else []
    grads = kernels.region_gradient(g, regions, given, upstream, pyramid)
    of_features, of_weights = by_definition(features, regions, g)
    sizes = sizes_of_gradients(features, regions, g, pyramid)
    for index, (grad, layer) in enumerate(zip(grads, pyramid.layers, strict=True)):
        assert (grad.dtype, grad.stride()) == (layer.dtype, layer.stride)
        wanted, size = of_features[index], sizes[0][index]
        if upstream and upstream[index] is not None:
            added = upstream[index].cpu().double()
            wanted, size = wanted + added, size + added.abs()
        # A gradient of a narrow dtype is rounded once more, at the end.
        assert_within(grad, wanted, 8 * eps * size + unit(layer.dtype) * wanted.abs(), "gradient", 1.01)

    for index, grad in enumerate(kernels.region_weight_gradient(g, regions, features)):
        assert (grad.dtype, grad.shape) == (g.dtype, regions.weights[index].shape)
        assert_within(grad, of_weights[index], 16 * eps * sizes[1][index], "gradient of the weights", 1)


def made(shapes: Sequence[tuple[int, ...]], layout: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [lay_out((torch.randn(shape) + 3).to(device, dtype), layout) for shape in shapes]


@pytest.mark.parametrize("moments", [False, True], ids=["sums", "moments"])
@pytest.mark.parametrize("dtype", FEATURE_DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_every_layout_and_dtype(language, layout, dtype, moments):
    kernels, device = language
    features = made(((2, 5, 6, 7), (2, 9, 4, 5)), layout, dtype, device)
    check(kernels, features, regions_for(features, 3, "soft with ignored", moments))


@pytest.mark.parametrize("moments", [False, True], ids=["sums", "moments"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", COUNTS)
def test_any_number_of_regions_of_every_kind(language, count, kind, moments):
    kernels, device = language
    features = made(((3, 4, 11), (3, 6, 15), (3, 1, 1)), "contiguous", torch.float32, device)
    features[1] = lay_out(features[1], "channels_last")
    check(kernels, features, regions_for(features, count, kind, moments))


def test_more_regions_than_one_read_serves(language):
    kernels, device = language
    features = made(((2, 3, 11), (2, 4, 6)), "contiguous", torch.float32, device)
    features[1] = lay_out(features[1], "channels_last")
    check(kernels, features, regions_for(features, 33, "soft with ignored", moments=True))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (1, 70, 19, 23), (2, 2, 1, 1500), (1, 1, 3, 3)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sizes_beyond_a_tile(language, shape, layout):
    kernels, device = language
    features = made((shape,), layout, torch.float32, device)
    check(kernels, features, regions_for(features, 4, "soft with ignored", moments=True))


@pytest.mark.parametrize("moments", [False, True], ids=["sums", "moments"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_an_upstream_gradient_is_added_where_there_is_one(language, layout, moments):
    kernels, device = language
    features = made(((2, 3, 5, 4), (2, 4, 3, 3)), "contiguous", torch.float32, device)
    regions = regions_for(features, 3, "soft", moments)
    upstream = [lay_out(torch.randn(2, 3, 5, 4).to(device), layout), None]
    check(kernels, features, regions, upstream)
    check(kernels, features, regions, [None, None])


@pytest.mark.parametrize("moments", [False, True], ids=["sums", "moments"])
def test_what_an_ignored_pixel_holds_has_no_effect_and_any_other_nan_is_seen(language, moments):
    kernels, device = language
    features = made(((2, 3, 4, 4),), "contiguous", torch.float32, device)
    regions = regions_for(features, 3, "soft with ignored", moments)
    ignored = ~(regions.weights[0] != 0).any(1).reshape(2, 1, 4, 4)
    dirty = [torch.where(ignored, math.nan, features[0])]
    pyramid = describe(features)
    for clean, got in zip(
        kernels.region_sums(features, regions, pyramid),
        kernels.region_sums(dirty, regions, pyramid),
        strict=True,
    ):
        assert torch.equal(clean, got)
    if moments:
        g = torch.randn(6, 2, 3, device=device)
        (grad,) = kernels.region_gradient(g, regions, dirty, [], pyramid)
        assert grad.isfinite().all()
        (of_weights,) = kernels.region_weight_gradient(g, regions, dirty)
        assert of_weights.isfinite().all()
    seen = Regions(regions.weights, selects=False, pivots=regions.pivots)
    sums, _ = kernels.region_sums(dirty, seen, pyramid)
    assert sums.isnan().all()


def test_a_byte_beyond_1_stands_for_nan(language):
    kernels, device = language
    features = made(((1, 2, 2, 2),), "contiguous", torch.float32, device)
    weights = torch.tensor([[[0, 1, 0, 0], [1, 0, 1, 255]]], dtype=torch.uint8, device=device)
    sums, masses = kernels.region_sums(features, Regions([weights], selects=False), describe(features))
    assert masses.isnan().flatten().tolist() == [False, True]
    assert sums[0].isfinite().all()
    assert sums[1].isnan().all()


def test_the_same_input_gives_the_same_bits(language):
    kernels, device = language
    features = made(((2, 17, 30, 31),), "contiguous", torch.float32, device)
    regions, pyramid = regions_for(features, 5, "soft", moments=True), describe(features)
    first = kernels.region_sums(features, regions, pyramid)
    second = kernels.region_sums(features, regions, pyramid)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_moments_about_a_pivot_keep_their_digits_where_the_features_lie_far_from_0(language):
    """Variances by Q - S²/M, from float32 features of mean 1000 and deviation 1."""
    kernels, device = language
    features = [(1000 + torch.randn(1, 4, 64, 64)).to(device)]
    regions = regions_for(features, 2, "one-hot", moments=True)
    pivots = features[0].flatten(2)[:, :, 0].expand(2, 1, 4)
    sums, masses = kernels.region_sums(features, regions._replace(pivots=pivots), describe(features))
    S, Q, M = sums[:2].double(), sums[2:].double(), masses.double()
    got = Q / M - (S / M).square()
    for k in range(2):
        chosen = features[0].double().flatten(2)[0][:, regions.weights[0][0, k] != 0]
        wanted = chosen.var(1, correction=0)
        assert torch.allclose(got[k, 0].cpu(), wanted.cpu(), rtol=1e-6, atol=0)
