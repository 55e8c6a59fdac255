"""Tensors without values, as memory estimates use them, subclasses, lazy views and other layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fdkernels as fdk
from fdkernels import models

pytestmark = pytest.mark.filterwarnings("error:Accessing the data pointer")

CALLS = {
    "plain": {},
    "ignored": {"ignore_index": 255},
    "entries": {"reduction": "none"},
    "shuffle": {"exchange": "shuffle"},
    "pairing": {"exchange": "shuffle", "pairing": torch.tensor([1, 0])},
    "pooled": {"exchange": "pooled", "domains": torch.tensor([0, 1])},
    "classes": {"mode": "multiclass", "num_classes": 3},
    "fisher": {"mode": "multiclass", "num_classes": 3, "convention": "fisher"},
}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Features, a binary mask, and class indices."""
    features = torch.randn(2, 3, 8, 8, requires_grad=True)
    return features, torch.rand(2, 1, 8, 8).round(), torch.randint(0, 3, (2, 8, 8))


@pytest.mark.parametrize("name", CALLS)
def test_calls_without_values(name):
    call = CALLS[name]
    features, mask, classes = inputs()
    fdk.feature_discrepancy_loss(features, classes if "mode" in call else mask, **call)  # known from now on
    with FakeTensorMode() as mode:
        features, mask, classes = inputs()
        given = {
            key: mode.from_tensor(value) if torch.is_tensor(value) else value for key, value in call.items()
        }
        for _ in range(2):
            loss = fdk.feature_discrepancy_loss(features, classes if "mode" in call else mask, **given)
            (grad,) = torch.autograd.grad(loss.sum(), features)
            assert loss.shape == ((2,) if name == "entries" else ())
            assert (grad.shape, grad.dtype) == (features.shape, features.dtype)


@pytest.mark.parametrize("taps_are", ["apart", "fused", "free"])
def test_a_training_step_without_values(taps_are):
    with FakeTensorMode():
        net = models.create("unet", base_channels=4)
        if taps_are == "free":
            fdk.fuse_norms(net)
        taps = fdk.FeatureTaps(net, net.tap_names, fused=taps_are != "apart")
        crit = fdk.FeatureDiscrepancyLoss(len(net.tap_names))
        optimizer = torch.optim.SGD([*net.parameters(), *crit.parameters()], lr=0.1)
        images, mask = torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32).round()
        for _ in range(2):
            optimizer.zero_grad()
            if taps_are == "free":
                with taps.mask(mask):
                    logits = net(images)
                loss = logits.mean() + crit(taps)
            else:
                loss = net(images).mean() + crit(taps, mask)
            loss.backward()
            optimizer.step()
        assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_mask_without_values_for_features_with_some_is_refused_by_torch():
    features, _, _ = inputs()
    with FakeTensorMode():
        _, mask, _ = inputs()
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        fdk.feature_discrepancy_loss(features, mask)
    net = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    fdk.fuse_norms(net)
    taps = fdk.FeatureTaps(net, ["0"], fused=True)
    with taps.mask(mask):  # the norm would read it first
        net(features)
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        fdk.FeatureDiscrepancyLoss(1)(taps)


class OfTheUser(torch.Tensor):
    """A subclass like those of data libraries."""


def test_the_mask_of_a_subclass_is_checked():
    features, mask, _ = inputs()
    wanted = fdk.feature_discrepancy_loss(features, mask)
    for _ in range(2):
        assert torch.equal(fdk.feature_discrepancy_loss(features, mask.as_subclass(OfTheUser)), wanted)
        with pytest.raises(ValueError, match="divide a 0/255 mask by 255"):
            fdk.feature_discrepancy_loss(features, (mask * 255).as_subclass(OfTheUser))


def lazily(values: Tensor) -> Tensor:
    """The same values, negated in memory, as in the view `x.conj().imag`."""
    return torch._neg_view(-values)


class Negation(torch.autograd.Function):
    """-x, whose gradient is a lazy view."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return -x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch._neg_view(grad)


@pytest.mark.parametrize("given", [{}, {"mode": "multiclass", "num_classes": 3}], ids=["binary", "classes"])
def test_features_that_are_negated_in_memory(backend, device, given):
    features, *masks = (values.detach().to(device) for values in inputs())
    mask = masks[1 if given else 0]
    wanted = fdk.region_sums(features, mask, backend=backend, **given)
    assert torch.equal(fdk.region_sums(lazily(features), mask, backend=backend, **given).fg, wanted.fg)


def test_a_gradient_that_arrives_negated_in_memory(backend, device):
    features, mask, _ = (
        values.detach().to(device).requires_grad_(values.requires_grad) for values in inputs()
    )
    grads = []
    for is_lazy in (True, False):
        out, loss = fdk.tap(features, mask, backend=backend)
        used = Negation.apply(out) if is_lazy else -out
        grads += torch.autograd.grad((used * torch.arange(8.0, device=device)).sum() + loss, features)
    assert torch.equal(*grads)


@pytest.mark.parametrize("size", [8, 4], ids=["as it is", "resized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_that_is_negated_in_memory(backend, device, size, dtype):
    features, mask, _ = (values.detach().to(device) for values in inputs())
    features, mask = features[..., :size, :size], mask.to(dtype)
    wanted = fdk.feature_discrepancy_loss(features, mask, backend=backend)
    for _ in range(2):
        assert torch.equal(fdk.feature_discrepancy_loss(features, lazily(mask), backend=backend), wanted)


def left_behind(*tensors: Tensor) -> list[Tensor]:
    """The tensors as a transform has wrapped them that has ended since."""
    kept = []

    def keep(*wrapped: Tensor) -> Tensor:
        kept.extend(one * 1 for one in wrapped)
        return wrapped[0].sum()

    torch.func.grad(keep, argnums=tuple(range(len(tensors))))(*tensors)
    return kept


@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)])
def test_what_a_transform_has_left_behind(which):
    features, mask, _ = inputs()
    features = features.detach()
    wanted = fdk.feature_discrepancy_loss(features, mask), *fdk.region_sums(features, mask)
    pairs = zip(which, (features, mask), left_behind(features, mask), strict=True)
    given = [dead if is_dead else alive for is_dead, alive, dead in pairs]
    with pytest.raises(RuntimeError, match="data pointer"):
        given[0 if which[0] else 1].data_ptr()  # so that this tests what it says
    for _ in range(2):
        got = fdk.feature_discrepancy_loss(*given), *fdk.region_sums(*given)
        assert all(map(torch.equal, got, wanted))


def test_a_mask_that_a_transform_has_left_behind_reaches_free_taps():
    images, mask = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8).round()
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    fdk.fuse_norms(net)
    taps, crit = fdk.FeatureTaps(net, ["2"]), fdk.FeatureDiscrepancyLoss(1)
    losses = []
    for given in (mask, *left_behind(mask)):
        with taps.mask(given):
            net(images)
        losses.append(crit(taps))
    assert torch.equal(*losses)


@pytest.mark.parametrize("lazy", ["input", "mask and gradient"])
def test_a_norm_between_lazy_views(lazy):
    net = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())).train()
    images, mask = torch.randn(4, 3, 32, 32), torch.rand(4, 1, 32, 32).round()
    results = []
    fdk.fuse_norms(net)
    for kind in (lazy, "nothing"):
        net.zero_grad()
        x = (lazily(images) if kind == "input" else images.clone()).requires_grad_()
        taps = fdk.FeatureTaps(net, ["0"], fused=True)
        with taps.mask(lazily(mask) if kind == "mask and gradient" else mask):
            y = net(x)
        y = Negation.apply(y) if kind == "mask and gradient" else -y
        crit = fdk.FeatureDiscrepancyLoss(1, alpha_init=0.5)
        ((y * torch.linspace(0, 1, 32)).sum() + crit(taps)).backward()
        taps.close()
        results.append([y.detach().clone(), x.grad.clone(), net[0][0].weight.grad.clone()])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["features", "mask"])
@pytest.mark.parametrize("made", ["sparse", "nested"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_not_dense_is_refused(what, made):
    features, mask, _ = inputs()
    given = {"features": features.detach(), "mask": mask}
    dense = given[what]
    given[what] = dense.to_sparse() if made == "sparse" else torch.nested.nested_tensor(list(dense))
    with pytest.raises(TypeError, match=f"{what} must be a dense tensor, got .*{made}"):
        fdk.feature_discrepancy_loss(**given)
