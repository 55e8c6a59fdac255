"""torch.func's transforms and forward-mode differentiation give what plain autograd gives, or a sentence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, func, nn
from torch.autograd import forward_ad

import fdkernels as fdk
from fdkernels.transforms import in_transform, innermost
from oracles import CONVENTIONS

F = torch.randn(3, 4, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MASK = torch.rand(3, 1, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
PAIRINGS = {"none": None, "shuffle": torch.tensor([1, 2, 0]), "pooled": torch.tensor([[0, 1], [2, 1]])}


def loss(features: Tensor, mask: Tensor = MASK, **options) -> Tensor:
    return fdk.feature_discrepancy_loss(features, mask, **options)


def plain_gradient(features: Tensor, **options) -> Tensor:
    leaf = features.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf, **options), leaf)[0]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("exchange", PAIRINGS)
def test_grad_is_the_gradient_of_backward(convention, exchange):
    options = {"convention": convention, "exchange": exchange, "pairing": PAIRINGS[exchange]}
    grad = func.grad(lambda x: loss(x, **options))(F)
    torch.testing.assert_close(grad, plain_gradient(F, **options))


@pytest.mark.parametrize("mask_resize", ["area", "max", "nearest"])
def test_grad_takes_ignored_pixels_and_every_resize(mask_resize):
    hard = (MASK > 0.5).long()
    hard[0, 0, :3] = 255
    options = {"mask": hard, "ignore_index": 255, "mask_resize": mask_resize}
    grad = func.grad(lambda x: loss(x, **options))(F)
    torch.testing.assert_close(grad, plain_gradient(F, **options))


def test_jvp_is_the_product_with_the_gradient():
    tangent = torch.randn_like(F)
    value, product = func.jvp(loss, (F,), (tangent,))
    torch.testing.assert_close(value, loss(F))
    torch.testing.assert_close(product, (plain_gradient(F) * tangent).sum())


def test_dual_numbers_carry_the_product_with_the_gradient():
    tangent = torch.randn_like(F)
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(loss(forward_ad.make_dual(F, tangent)))
    torch.testing.assert_close(out.tangent, (plain_gradient(F) * tangent).sum())


def test_hessian_and_jacrev_are_those_of_double_backward():
    small, mask = F[:2, :2, :2, :2].clone(), MASK[:2, :, :2, :2]
    wanted = torch.autograd.functional.hessian(lambda x: loss(x, mask), small)
    torch.testing.assert_close(func.hessian(lambda x: loss(x, mask))(small), wanted)
    entries = func.jacrev(lambda x: loss(x, mask, reduction="none"))(small)
    torch.testing.assert_close(entries.mean(0), func.grad(lambda x: loss(x, mask))(small))


@pytest.mark.parametrize(
    "options", [{}, {"mask_resize": "max"}, {"mask_resize": "nearest"}, {"reduction": "none"}]
)
def test_vmap_is_a_loop(options):
    many, masks = torch.randn(5, *F.shape, dtype=F.dtype), torch.rand(5, *MASK.shape, dtype=F.dtype)
    together = func.vmap(lambda x, m: loss(x, m, **options))(many, masks)
    torch.testing.assert_close(
        together, torch.stack([loss(x, m, **options) for x, m in zip(many, masks, strict=True)])
    )


def test_gradients_of_samples_by_vmap_of_grad():
    of_each = func.vmap(func.grad(lambda x, m: loss(x[None], m[None])))(F, MASK)
    wanted = torch.stack([plain_gradient(x[None], mask=m[None])[0] for x, m in zip(F, MASK, strict=True)])
    torch.testing.assert_close(of_each, wanted)


def test_masks_and_weights_are_differentiated_too():
    leaf = MASK.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(F, leaf), leaf)
    torch.testing.assert_close(func.grad(lambda m: loss(F, m))(MASK), wanted)
    torch.testing.assert_close(func.jvp(lambda m: loss(F, m), (MASK,), (MASK,))[1], (wanted * MASK).sum())
    of_weights = func.grad(lambda w: loss([F, F], layer_weights=w))(torch.ones(2, dtype=F.dtype))
    torch.testing.assert_close(of_weights, loss(F).expand(2))


def test_tap_and_region_sums_are_transformed():
    def through(x: Tensor) -> Tensor:
        out, value = fdk.tap(x, MASK)
        return out.sum() + value

    torch.testing.assert_close(func.grad(through)(F), plain_gradient(F) + 1)
    small, mask = F[:1, :2, :2, :2], MASK[:1, :, :2, :2]
    jacobian = func.jacrev(lambda x: fdk.region_sums(x, mask).fg)(small)  # [1, 2, 1, 2, 2, 2]
    torch.testing.assert_close(jacobian[0, 1, 0, 1], mask[0, 0])
    assert (jacobian[0, 1, 0, 0] == 0).all()


def test_functional_call_over_a_tapped_network_gives_the_gradients_of_backward():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))
    image, mask = torch.randn(2, 3, 8, 12), torch.rand(2, 1, 8, 12)

    def of_parameters(parameters: dict[str, Tensor]) -> Tensor:
        with fdk.FeatureTaps(net, ["1"]) as taps:
            return func.functional_call(net, parameters, image).mean() + loss(taps.features, mask)

    parameters = dict(net.named_parameters())
    grads = func.grad(of_parameters)({name: value.detach() for name, value in parameters.items()})
    wanted = torch.autograd.grad(of_parameters(parameters), list(parameters.values()))
    for got, want in zip(grads.values(), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("transform", [func.grad, func.vmap])
def test_bad_values_are_refused_inside_a_transform(transform):
    given = (F, 255 * MASK) if transform is func.grad else (F[None], 255 * MASK[None])
    with pytest.raises(ValueError, match=r"mask must have values in \[0, 1\], got values from"):
        transform(loss)(*given)
    with pytest.raises(ValueError, match=r"pairing must contain sample indices from 0 to 2"):
        transform(lambda x: loss(x, exchange="shuffle", pairing=torch.tensor([1, 2, 3])))(given[0])


def test_a_named_backend_is_refused_inside_a_transform_and_the_reference_is_not():
    if fdk.backends()["cpu"] is None:
        with pytest.raises(RuntimeError, match=r"backend='cpu' cannot be transformed by"):
            func.grad(lambda x: loss(x, backend="cpu"))(F)
        with (
            fdk.use_backend("cpu"),
            pytest.raises(RuntimeError, match=r"take backend='auto' or 'refer"),
        ):
            func.grad(loss)(F)
    torch.testing.assert_close(func.grad(lambda x: loss(x, backend="reference"))(F), plain_gradient(F))


def test_the_kernels_are_taken_outside_of_transforms_alone():
    seen = []
    func.grad(lambda x: seen.append((in_transform(), x)) or x.sum())(F)
    assert seen[0][0]
    assert not in_transform()
    assert innermost(F) is F
    nested = []
    func.vmap(func.grad(lambda x: nested.append(innermost(x)) or x.sum()))(F)
    assert nested[0].shape == F.shape


@pytest.mark.parametrize("transform", [func.grad, func.vmap])
def test_compiled_transforms_give_what_eager_ones_give(transform):
    given = F if transform is func.grad else F[None]
    compiled = torch.compile(transform(loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given), transform(loss)(given))


def test_the_criterion_and_fused_taps_run_inside_a_transform():
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3, padding=1), torch.nn.Conv2d(3, 1, 1))
    crit = fdk.FeatureDiscrepancyLoss(1, alpha_init=0.5)
    images, mask = torch.randn(2, 1, 4, 4), (torch.rand(2, 4, 4) > 0.5).float()
    weights = dict(net.named_parameters())
    with fdk.FeatureTaps(net, ["0"], fused=True) as taps:

        def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
            torch.func.functional_call(net, weights, (images,))
            return crit(taps, mask)

        got = torch.func.grad(loss)(weights)
        assert crit.layer_losses is None
        assert crit.steps == 0
        wanted = torch.autograd.grad(loss(weights), net[0].weight)
    torch.testing.assert_close(got["0.weight"], wanted[0])
