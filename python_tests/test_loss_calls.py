"""The loss as a call: what it keeps for backward, its dtypes, repeatability, reductions and weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import fdkernels as fdk
import oracles

PAIRINGS = {
    "none": None,
    "shuffle": torch.tensor([1, 2, 0]),
    "pooled": torch.tensor([[0, 1], [2, 1]]),
}


def test_features_may_be_changed_in_place_before_backward():
    weight = torch.randn(2, 3, 4, 4, requires_grad=True)
    mask = torch.rand(2, 4, 4)
    (wanted,) = torch.autograd.grad(fdk.feature_discrepancy_loss(weight * 2, mask), weight)
    features = weight * 2
    loss = fdk.feature_discrepancy_loss(features, mask)
    features.zero_()  # nothing of it is kept
    assert torch.equal(torch.autograd.grad(loss, weight)[0], wanted)


@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
@pytest.mark.parametrize("convention", ["paper", "released"])
def test_less_than_a_hundredth_of_the_features_is_kept_for_backward(backend, device, convention, exchange):
    layers = [torch.randn(3, 256, s, s, device=device, requires_grad=True) for s in (8, 4)]
    mask = torch.rand(3, 1, 8, 8, device=device) > 0.5
    pairing = PAIRINGS[exchange]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        fdk.feature_discrepancy_loss(
            layers,
            mask,
            convention=convention,
            exchange=exchange,
            pairing=None if pairing is None else pairing.to(device),
            backend=backend,
        )
    # The maps are tiny here, so that the two sums of a channel's 64 or 16 pixels, and the slopes of the loss
    # with respect to them, are counted by themselves.
    of_features = sum(layer.nbytes for layer in layers)
    of_sums = 2 * 3 * 512 * 4
    assert sum(kept.values()) <= 0.01 * of_features + 2 * of_sums


@pytest.mark.parametrize("exchange", oracles.EXCHANGES)
def test_the_same_bits_twice(backend, device, exchange):
    layers = [torch.randn(3, c, s, s, device=device, requires_grad=True) for c, s in ((9, 17), (33, 8))]
    mask = torch.rand(3, 17, 17, device=device)
    pairing = PAIRINGS[exchange]
    pairing = None if pairing is None else pairing.to(device)

    def run() -> tuple[Tensor, ...]:
        loss = fdk.feature_discrepancy_loss(layers, mask, exchange=exchange, pairing=pairing, backend=backend)
        return loss, *torch.autograd.grad(loss, layers)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_features_give_a_float32_loss_and_a_gradient_of_their_own_dtype(backend, device, dtype):
    features = torch.randn(2, 3, 8, 8, device=device).to(dtype).requires_grad_()
    loss = fdk.feature_discrepancy_loss(features, torch.rand(2, 8, 8, device=device), backend=backend)
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, features)[0].dtype == dtype


def test_works_under_autocast(backend, device):
    conv = torch.nn.Conv2d(1, 4, 3, padding=1).to(device)
    images, mask = torch.randn(2, 1, 8, 8, device=device), torch.rand(2, 8, 8, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        features = conv(images)
        loss = fdk.feature_discrepancy_loss(
            features, mask, layer_weights=torch.ones(1, device=device), backend=backend
        )
    assert features.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    same = fdk.feature_discrepancy_loss(features, mask, backend=backend)
    torch.testing.assert_close(loss, same)
    loss.backward()
    assert conv.weight.grad.isfinite().all()


def test_works_with_deterministic_algorithms(backend, device, nan_filled):
    features = torch.randn(2, 3, 8, 8, device=device, requires_grad=True)
    loss = fdk.feature_discrepancy_loss(
        features, torch.rand(2, 16, 16, device=device), exchange="shuffle", backend=backend
    )
    assert torch.autograd.grad(loss, features)[0].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_of_several_layers(reduction):
    layers = [torch.randn(3, c, 4) for c in (2, 5)]
    mask = torch.rand(3, 4)
    entries = fdk.feature_discrepancy_loss(layers, mask, reduction="none")
    assert entries.shape == (3, 2)
    loss = fdk.feature_discrepancy_loss(layers, mask, reduction=reduction)
    assert loss.shape == ()
    torch.testing.assert_close(loss, entries.mean() if reduction == "mean" else entries.sum())
    weights = torch.tensor([2.0, -0.5])
    weighted = fdk.feature_discrepancy_loss(layers, mask, reduction=reduction, layer_weights=weights)
    per_layer = entries.mean(0) if reduction == "mean" else entries.sum(0)
    torch.testing.assert_close(weighted, (weights * per_layer).sum())


def test_layer_weights_of_a_list_of_numbers_are_taken():
    layers, mask = [torch.randn(2, 3, 4), torch.randn(2, 3, 4)], torch.rand(2, 4)
    loss = fdk.feature_discrepancy_loss(layers, mask, layer_weights=[0.5, 2])
    wanted = fdk.feature_discrepancy_loss(layers, mask, layer_weights=torch.tensor([0.5, 2.0]))
    assert torch.equal(loss, wanted)


@pytest.mark.parametrize("exchange", ["shuffle", "pooled"])
def test_random_pairs_are_repeatable_by_generator(exchange):
    features, mask = torch.randn(6, 3, 5), torch.rand(6, 5)
    domains = torch.tensor([0, 1, 0, 0, 1, 0])

    def loss(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        options = {"exchange": exchange, "generator": generator, "domains": domains}
        return fdk.feature_discrepancy_loss(features, mask, **options).item()

    assert loss(3) == loss(3)
    assert len({loss(seed) for seed in range(8)}) > 1
