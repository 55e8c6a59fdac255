"""What is Triton's own: how many kernels a call launches, how layers are cut, offsets of 64 bits."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import fdkernels as fdk
import oracles
from cases import ALL_LAYOUTS, SumsCase, lay_out, weights_for
from fdkernels.op import reference
from fdkernels.op import triton as backend
from fdkernels.op.norm_formula import Formula as NormFormula
from fdkernels.op.norm_formula import NormInputs, Running, plain
from fdkernels.op.pyramid import Regions, Weights, describe
from fdkernels.op.triton import launch, norm_access, norm_gradient, norms, second_pass
from kernel_launches import recorded_launches
from oracles import Formula

if reason := fdk.backends()["triton"]:
    pytest.skip(reason, allow_module_level=True)

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are counted by the interpreter"
    ),
    pytest.mark.usefixtures("nan_filled"),
]

# The package has functions by the names of these modules.
gradient, losses, masks, sums = (
    importlib.import_module(f"fdkernels.op.triton.{name}") for name in ("gradient", "losses", "masks", "sums")
)

# Channels and size of the nine maps of a small network, from the first to the last.
PYRAMID = [(2, 16), (4, 8), (8, 4), (16, 2), (32, 1), (16, 2), (8, 4), (4, 8), (2, 16)]
FORWARD = ["sums_kernel", "losses_kernel"]
PAIRINGS = {
    "none": None,
    "shuffle": torch.tensor([1, 1, 0]),  # sample 2 is nobody's partner, 1 is two's
    "pooled": torch.tensor([[0, 1], [-1, 2], [2, 1], [1, 1]]),
}


def options_of(convention="paper", exchange="none", eps=1e-12):
    return SumsCase((), (), 0, convention, exchange=exchange, eps=eps).options


def pyramid_of_a_network(dtype=torch.float32, layout="contiguous", batch=2):
    return [
        lay_out(torch.randn(batch, C, size, size).to(dtype), layout).detach().requires_grad_()
        for C, size in PYRAMID
    ]


def odd_layers(dtypes=(torch.float32,), batch=3):
    """Layers of odd sizes, one with more channels than a block has, in every layout."""
    shapes = [(5, 7, 3), (37, 2, 5), (1, 9, 9), (3, 4, 4)]
    layouts = ("contiguous", "channels_last", "sliced", "transposed")
    return [
        lay_out(torch.randn(batch, *shape).to(dtypes[i % len(dtypes)]), layout)
        for i, (shape, layout) in enumerate(zip(shapes, layouts, strict=True))
    ]


def forget_plans(monkeypatch):
    """Plan anew in each call, with the sizes that a test has set."""
    for module, name in (
        (sums, "plan_layers"),
        (gradient, "plan_layers"),
        (sums, "plan_second_pass"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)


def everything(features, weights, upstream) -> list[torch.Tensor]:
    """What all kernels but those of the masks return for these layers."""
    pyramid = describe(features)
    out = backend.sums(features, weights, pyramid, options_of(), None, True)
    only_sums = backend.sums(features, weights, pyramid, None, None, False)
    grads = backend.gradient(out.sums, out.losses, weights, upstream, pyramid)
    of_weights = backend.mask_gradient(out.sums, weights, features)
    return [*out[:4], *only_sums[:2], *grads, *of_weights.fg, *of_weights.bg]


def assert_near_reference(features, weights, upstream):
    """The numbers of the reference for the same layers in float64."""
    out = everything(features, weights, upstream)
    wide = [layer.double() for layer in features]
    w = Weights([fg.double() for fg in weights.fg], [bg.double() for bg in weights.bg])
    described = describe(wide)
    truth = reference.sums(wide, w, described, options_of(), None, True)
    g, factor = out[0].double(), out[2].double()
    grads = reference.gradient(g, factor, w, upstream, described)
    of_weights = reference.mask_gradient(g, w, wide)
    wanted = [*truth[:4], *truth[:2], *grads, *of_weights.fg, *of_weights.bg]
    for got, value in zip(out, wanted, strict=True):
        scale = value.abs().max().item()
        torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=3e-6 * scale)


@pytest.mark.parametrize(
    ("dtype", "layout", "exchange", "mask"),
    [
        (torch.float32, "contiguous", "none", "bytes"),
        (torch.float32, "channels_last", "shuffle", "floats"),
        (torch.bfloat16, "contiguous", "pooled", "floats"),
        (torch.bfloat16, "channels_last", "none", "bytes"),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_a_pyramid_is_three_launches_forward_with_its_masks_and_one_backward(dtype, layout, exchange, mask):
    features = pyramid_of_a_network(dtype, layout)
    y = torch.rand(2, 16, 16)
    pairing = {"none": None, "shuffle": torch.tensor([1, 0]), "pooled": torch.tensor([[0, 1]])}[exchange]
    with recorded_launches() as names:
        loss = fdk.feature_discrepancy_loss(
            features, y > 0.5 if mask == "bytes" else y, exchange=exchange, pairing=pairing, backend="triton"
        )
    # The mask itself serves the layers of its size; the four smaller sizes are made together.
    assert names == ["masks_kernel", *FORWARD]
    with recorded_launches() as names:
        loss.backward()
    assert names == ["gradient_kernel"]


def test_a_tapped_pyramid_adds_what_arrives_in_its_one_launch_backward():
    features = pyramid_of_a_network(torch.float32, "channels_last")
    mask = torch.rand(2, 16, 16)
    outs, loss = fdk.tap(features, mask, backend="triton")
    arriving = [torch.randn_like(out) for out in outs[::2]]
    with recorded_launches() as names:
        grads = torch.autograd.grad([loss, *outs[::2]], features, [torch.ones(()), *arriving])
    assert names == ["gradient_kernel"]
    separate = fdk.feature_discrepancy_loss(features, mask, backend="reference")
    wanted = list(torch.autograd.grad(separate, features))
    wanted[::2] = [grad + upstream for grad, upstream in zip(wanted[::2], arriving, strict=True)]
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


def test_sums_alone_and_the_gradient_of_a_soft_mask_are_a_launch_each_beside_the_second_pass():
    features = [torch.randn(2, 3, s, s, requires_grad=True) for s in (4, 2)]
    mask = torch.rand(2, 4, 4, requires_grad=True)
    with recorded_launches() as names:
        loss = fdk.feature_discrepancy_loss(features, mask, backend="triton")
    assert names == ["sums_kernel", "second_pass_kernel"]
    with recorded_launches() as names:
        loss.backward()
    assert sorted(names) == ["gradient_kernel", "mask_gradient_kernel"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("moments", [False, True], ids=["sums", "moments"])
def test_a_pyramid_over_three_regions_is_two_launches_forward_and_one_backward(moments, layout):
    features = [layer.detach() for layer in pyramid_of_a_network(layout=layout, batch=1)]
    pyramid = describe(features)
    weights = [
        torch.rand(1, 3, P) if P > 1 else torch.ones(1, 3, P, dtype=torch.uint8) for P in pyramid.pixels
    ]
    pivots = torch.randn(3, 1, pyramid.total_channels) if moments else None
    regions = Regions(weights, selects=True, pivots=pivots)
    with recorded_launches() as names:
        sums, masses = backend.region_sums(features, regions, pyramid)
    assert names == ["region_sums_kernel", "second_pass_kernel"]
    with recorded_launches() as names:
        grads = backend.region_gradient(sums, regions, features if moments else [], features, pyramid)
    assert names == ["region_gradient_kernel"]
    with recorded_launches() as names:
        of_weights = backend.region_weight_gradient(sums, regions, features)
    assert names == ["region_weight_gradient_kernel"]
    wanted = reference.region_sums(features, regions, pyramid)
    for got, value in zip((sums, masses), wanted, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4)
    wanted = reference.region_gradient(sums, regions, features, features, pyramid)
    wanted += reference.region_weight_gradient(sums, regions, features)
    for got, value in zip(grads + of_weights, wanted, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4 * value.abs().max().item())


def norm_inputs(x, given=False):
    C = x.shape[1]
    statistics = torch.rand(2, C, dtype=torch.float64) if given else None
    return NormInputs(x, torch.rand(C), torch.randn(C), statistics, given)


def test_a_norm_is_three_launches_each_way_and_one_where_its_statistics_are_given():
    x, formula = torch.randn(2, 3, 5, 7), NormFormula(False, 1e-5, "relu")
    weights = weights_for([x], "valid wide")
    added = torch.randn(2, 2, 3), weights
    running = Running(torch.zeros(3), torch.ones(3), 0.1)
    with recorded_launches() as names:
        _, statistics, sums = backend.norm_forward(norm_inputs(x), formula, running, weights)
    assert names == ["norm_moments_kernel", "norm_statistics_kernel", "norm_apply_kernel"]
    assert sums is not None
    inputs = norm_inputs(x)._replace(statistics=statistics)
    with recorded_launches() as names:
        backend.norm_backward(inputs, formula, x, added, (True, True, True))
    assert names == ["norm_reduce_kernel", "norm_coefficients_kernel", "norm_gradient_kernel"]
    given = norm_inputs(x, given=True)
    with recorded_launches() as names:
        backend.norm_forward(given, formula, None, weights)
    assert names == ["norm_apply_kernel"]
    with recorded_launches() as names:
        backend.norm_backward(given, formula, x, added, (True, False, False))
    assert names == ["norm_gradient_kernel"]
    with recorded_launches() as names:
        backend.norm_backward(given, formula, x, added, (False, False, True))
    assert names == ["norm_reduce_kernel", "norm_coefficients_kernel"]


@pytest.mark.parametrize("instance", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_norm_of_many_tiles_and_of_offsets_of_64_bits(layout, instance, monkeypatch):
    """Also more partial results than a program of the second pass takes at once."""
    monkeypatch.setattr(norm_access, "plan_layers", launch.plan_layers.__wrapped__)
    monkeypatch.setattr(norm_access, "MERGE", MERGE := {"BLOCK_T": 4, "BLOCK_COLUMN": 2, "num_warps": 4})
    monkeypatch.setattr(norms, "MERGE", MERGE)
    monkeypatch.setattr(norm_gradient, "MERGE", MERGE)
    monkeypatch.setattr(launch, "_BLOCK", 128)
    monkeypatch.setattr(launch, "_PIXELS_OF_CHANNELS", (32,))
    monkeypatch.setattr(launch, "_MIN_TILE_PIXELS", 64)
    x, grad_y = (lay_out(torch.randn(3, 5, 19, 17) + 100, layout) for _ in range(2))
    weights, formula = weights_for([x], "valid wide"), NormFormula(instance, 1e-5, "leaky_relu", 0.1)
    assert norm_access.cut_map(x, formula, weights).plan.tiles > 4
    slopes = torch.randn(2, 3, 5)
    results = []
    for limit in (launch._WIDE, 0):
        monkeypatch.setattr(launch, "_WIDE", limit)
        running = Running(torch.zeros(5), torch.ones(5), 0.1)
        inputs = norm_inputs(x)._replace(weight=torch.ones(5), bias=torch.zeros(5))
        y, statistics, sums = backend.norm_forward(inputs, formula, running, weights)
        inputs = inputs._replace(statistics=statistics)
        grads = backend.norm_backward(inputs, formula, grad_y, (slopes, weights), (True, True, True))
        results.append([y, statistics, sums, *running[:2], *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    y, statistics, sums, mean, variance, *grads = results[0]
    leaf, weight, bias = (t.double().requires_grad_() for t in (x, torch.ones(5), torch.zeros(5)))
    wanted = plain(leaf, weight, bias, None, formula)
    upstream = torch.zeros(3, 5, 19 * 17, dtype=torch.float64)
    for g, w in zip(slopes.double(), (weights.fg[0].double(), weights.bg[0].double()), strict=True):
        upstream += g[..., None] * w[:, None]
    upstream = upstream.view(x.shape) + grad_y.double()
    for got, value in zip(grads, torch.autograd.grad(wanted, [leaf, weight, bias], upstream), strict=True):
        torch.testing.assert_close(got.double(), value, rtol=1e-4, atol=2e-6 * value.abs().max().item())
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=3e-6)
    dims = (2, 3) if instance else (0, 2, 3)
    torch.testing.assert_close(statistics[0], x.double().mean(dims), rtol=1e-8, atol=0)
    torch.testing.assert_close(statistics[1], x.double().var(dims, correction=0), rtol=1e-6, atol=0)
    unbiased = x.double().var(dims)
    unbiased = unbiased.mean(0) if instance else unbiased
    torch.testing.assert_close(variance.double(), 0.9 + 0.1 * unbiased, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean.double(), 0.1 * x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    for got, w in zip(sums.double(), (weights.fg[0].double(), weights.bg[0].double()), strict=True):
        value = (y.double().flatten(2) * w[:, None]).sum(-1)
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-4)


def test_losses_of_given_sums_are_one_launch():
    case = SumsCase((3, 2), (4, 4), 3, "paper")
    with recorded_launches() as names:
        backend.losses(*case.tensors(), case.pyramid, case.options, None)
    assert names == ["losses_kernel"]


def test_more_layers_than_a_launch_holds_take_two_launches_each():
    features = [torch.randn(1, 1, 3) for _ in range(17)]
    weights, pyramid = weights_for(features, "wide"), describe(features)
    with recorded_launches() as names:
        out = backend.sums(features, weights, pyramid, options_of(), None, True)
        backend.losses(out.sums, out.masses, pyramid, options_of(), None)
        backend.gradient(out.sums, None, weights, [], pyramid)
        sizes = [torch.Size([size]) for size in range(1, 18)]
        backend.masks(torch.rand(1, 1, 20), sizes, torch.float32, "area", None)
    kernels = [*FORWARD, "losses_kernel", "gradient_kernel", "masks_kernel"]
    assert names == [name for name in kernels for _ in range(2)]


def test_a_batch_without_samples_launches_nothing():
    features = [torch.randn(0, 3, 4)]
    weights, pyramid = weights_for(features, "wide"), describe(features)
    with recorded_launches() as names:
        out = backend.sums(features, weights, pyramid, options_of(), None, True)
        backend.gradient(out.sums, None, weights, [], pyramid)
        backend.masks(torch.rand(0, 1, 4), [torch.Size([2])], torch.float32, "area", None)
    assert names == []


@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("norm", ["vector", "channel_sum", "relative", "batch"])
def test_layers_of_four_layouts_and_both_kinds_of_masks_share_a_call(norm, exchange):
    features = odd_layers()[1:]
    weights = weights_for(features, "mixed" if exchange == "none" else "valid mixed")
    options = options_of(Formula("region", norm, 0.5), exchange, 1e-2)
    out = backend.sums(features, weights, describe(features), options, PAIRINGS[exchange], True)
    wide = [layer.double() for layer in features]
    w = Weights([fg.double() for fg in weights.fg], [bg.double() for bg in weights.bg])
    truth = reference.sums(wide, w, describe(wide), options, PAIRINGS[exchange], True)
    for got, value in zip(out[:4], truth[:4], strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=2e-6 * value.abs().max().item())


@pytest.mark.parametrize("convention", ["paper", "released"])
@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
def test_loss_and_gradients_match_the_oracle_for_mixed_dtypes(convention, exchange):
    features = odd_layers((torch.float32, torch.bfloat16, torch.float64, torch.float16))
    for layer in features:
        layer.requires_grad_()
    mask = (torch.rand(3, 9, 9) > 0.5).to(torch.int16)
    mask[0, :4] = -1
    pairing = PAIRINGS[exchange] if exchange != "pooled" else torch.tensor([[0, 1], [2, 1]])
    options = {
        "convention": convention, "exchange": exchange, "pairing": pairing, "ignore_index": -1,
        "eps": 1e-3,
    }  # fmt: skip
    # Layers of half precision are held to the error of float32 sums.
    truth = oracles.truth([layer.float() for layer in features], mask, **options)
    loss = fdk.feature_discrepancy_loss(features, mask, backend="triton", aspect="any", **options)
    oracles.assert_within(loss, truth.loss, truth.loss_band, "loss")
    for grad, wanted, band in zip(torch.autograd.grad(loss, features), truth.grads, truth.bands, strict=True):
        oracles.assert_within(grad, wanted, band, "gradient", ulps=1.01)  # the interpreter cuts off


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_layer_of_many_tiles(layout, monkeypatch):
    forget_plans(monkeypatch)
    monkeypatch.setattr(launch, "_BLOCK", 128)
    monkeypatch.setattr(launch, "_PIXELS_OF_CHANNELS", (32,))
    monkeypatch.setattr(launch, "_MIN_TILE_PIXELS", 16)
    monkeypatch.setattr(second_pass, "_REDUCE_TILES", (4, 16))
    features = [lay_out(torch.randn(1, 3, 31, 33), layout)]
    tiles = []
    for programs in (64, 8, 2):
        monkeypatch.setattr(launch, "_PROGRAMS", programs)
        weights = weights_for(features, "valid wide")
        access = launch.access_of_layers(weights, features)
        tiles.append(launch.plan_layers.__wrapped__(access, torch.float32)[0][0].tiles)
        assert_near_reference(features, weights, [])
    assert tiles[0] > 16 > tiles[1] > 4 > tiles[2] > 1


@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("norm", ["vector", "batch"])
def test_more_samples_and_pairs_than_a_tile_holds(norm, exchange, monkeypatch):
    monkeypatch.setattr(losses, "_TILE", 8)
    monkeypatch.setattr(losses, "_COUNT", 2)
    case = SumsCase((4, 3), (5, 2), 3, Formula("region", norm), exchange=exchange, pairing=PAIRINGS[exchange])
    arguments = (*case.tensors(), case.pyramid, case.options, case.pairing)
    for got, value in zip(backend.losses(*arguments), reference.losses(*arguments), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_offsets_of_64_bits_give_the_same(layout, monkeypatch):
    features = [lay_out(torch.randn(2, 3, 5, 7, 9), layout)]
    weights = weights_for(features, "valid uint8")
    forget_plans(monkeypatch)
    results = []
    for limit in (launch._WIDE, 0):
        monkeypatch.setattr(launch, "_WIDE", limit)
        results.append(everything(features, weights, features))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("how", oracles.RESIZES)
def test_positions_of_64_bits_in_a_mask_give_the_same(how, monkeypatch):
    mask = torch.randint(-1, 2, (2, 1, 6, 10), dtype=torch.int16)
    sizes = [torch.Size(size) for size in ((6, 10), (4, 5), (7, 11))]
    narrow = backend.masks(mask, sizes, torch.float32, how, -1)
    monkeypatch.setattr(masks, "_WIDE", 0)
    wide = backend.masks(mask, sizes, torch.float32, how, -1)
    for one, other in zip(narrow, wide, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_offsets_beyond_32_bits_are_reached(monkeypatch):
    # This memory is touched only where the features lie: it must not be filled.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    shape, far = (3, 3, 3, 2, 3), 2**30 + 2**20  # the stride has 32 bits, twice the stride has not
    try:
        memory = torch.empty(2 * far + 1024, dtype=torch.float16)
    except (RuntimeError, torch.OutOfMemoryError):
        pytest.skip("4 GiB of memory cannot be had")
    weights = Weights([torch.rand(3, 18)], [])
    for strides in ((far, 64, 16, 5, 1), (64, far, 16, 5, 1), (64, 16, far, 5, 1), (1, 4, 16, 64, far)):
        features = memory.as_strided(shape, strides)
        features.copy_(torch.randn(shape))
        near = features.contiguous()
        out, wanted = (
            backend.sums([layer], weights, describe([layer]), None, None, False) for layer in (features, near)
        )
        torch.testing.assert_close(out.sums, wanted.sums)
        pyramid = describe([near])
        of_features, of_near = (
            [
                *backend.gradient(out.sums, None, weights, [layer], pyramid),
                *backend.mask_gradient(out.sums, weights, [layer]).fg,
            ]
            for layer in (features, near)
        )
        for one, other in zip(of_features, of_near, strict=True):
            torch.testing.assert_close(one, other)
        # A gradient is written where the strides of the layer say.
        layer = pyramid.layers[0]._replace(stride=strides)
        spread = replace(pyramid, layers=(layer,), strides=(strides,))
        (grad,) = backend.gradient(out.sums, None, weights, [], spread)
        assert grad.stride() == strides
        (dense,) = backend.gradient(out.sums, None, weights, [], pyramid)
        assert torch.equal(grad, dense)
        del grad
