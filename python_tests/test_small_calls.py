"""Small calls of every kind on a GPU against the reference: one short process for compute-sanitizer too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fdkernels as fdk

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

# Of the loss and, as a norm, of the gradient.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class Call(NamedTuple):
    """Layers [N, C, *S], mask [N, 1, *S0] and options, on the CPU."""

    layers: list[Tensor]
    mask: Tensor
    options: dict[str, Any]


def small_calls() -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    found = {}
    # Far from one half: where f and b are nearly equal, L and its gradient amplify every rounding.
    mask, solid = (random(2, 1, 24, 20) > 0.7).float(), (random(2, 1, 5, 7, 9) > 0.7).float()
    for dtype in BOUNDS:
        features, wide = random(2, 5, 24, 20).to(dtype), random(2, 70, 24, 20).to(dtype)
        line, volume = random(2, 3, 301).to(dtype), random(2, 3, 5, 7, 9).to(dtype)
        for name, layer, of in (
            ("contiguous", features, mask),
            ("channels_last", features.to(memory_format=torch.channels_last), mask),
            ("channels_last-wide", wide.to(memory_format=torch.channels_last), mask),
            ("transposed", features.mT.contiguous().mT, mask),
            ("1-D", line, mask.flatten(2)[..., :301]),
            ("3-D", volume, solid),
            ("3-D-channels_last", volume.to(memory_format=torch.channels_last_3d), solid),
        ):
            found[f"{name}-{str(dtype).removeprefix('torch.')}"] = Call([layer], of, {})
    pyramid = [random(2, 4, 24, 20), random(2, 9, 12, 10), random(2, 33, 5, 4), random(2, 2, 1, 1)]
    ignored = torch.where(random(2, 1, 24, 20) > 0.8, 255.0, mask)
    soft = random(2, 1, 24, 20).square().requires_grad_()
    shuffled = {"exchange": "shuffle", "pairing": torch.tensor([1, 0])}
    return found | {
        "pyramid": Call(pyramid, mask, {}),
        "shuffled": Call(pyramid, mask, shuffled),
        "released": Call(pyramid, mask, {"convention": "released"}),
        # Not for the single pixel, whose two means are equal.
        "region_mean": Call(pyramid[:3], mask, {"convention": "region_mean"}),
        "ignore_index": Call(pyramid, ignored, {"ignore_index": 255}),
        "boolean-mask": Call(pyramid, mask.bool(), {}),
        "soft-mask": Call(pyramid, soft, {}),
        **classes(pyramid, random),
    }


def classes(pyramid: list[Tensor], random: Callable[..., Tensor]) -> dict[str, Call]:
    """Calls over several regions, with and without second moments."""
    few, many = ((random(2, 24, 20) * number).long() for number in (3, 40))
    planes = random(2, 3, 24, 20).square().requires_grad_()
    multiclass, multilabel = {"mode": "multiclass"}, {"mode": "multilabel"}
    shuffled = {"exchange": "shuffle", "pairing": torch.tensor([1, 0])}
    # Not for the single pixel, which has one class alone.
    maps = pyramid[:3]
    return {
        "classes": Call(maps, few, multiclass | {"num_classes": 3}),
        "classes-channels_last": Call(
            [layer.to(memory_format=torch.channels_last) for layer in maps],
            few,
            multiclass | {"num_classes": 3},
        ),
        "classes-bfloat16": Call([layer.bfloat16() for layer in maps], few, multiclass | {"num_classes": 3}),
        "classes-40": Call(maps[:2], many, multiclass | {"num_classes": 40}),
        "classes-shuffled": Call(maps, few, multiclass | shuffled | {"num_classes": 3}),
        "classes-pairs": Call(maps, few, multiclass | {"num_classes": 3, "pairs": [(0, 1), (2, 0)]}),
        "multilabel-soft": Call(maps, planes, multilabel | {"num_classes": 3}),
        "fisher": Call(maps, (few > 1).float().unsqueeze(1), {"convention": "fisher"}),
        "fisher-classes": Call(maps, few, multiclass | {"num_classes": 3, "convention": "fisher"}),
        "fisher-soft": Call(maps, planes, multilabel | {"num_classes": 3, "convention": "fisher"}),
    }


CALLS = small_calls()


def run(call: Call, device: str, backend: str) -> list[Tensor]:
    """Losses and gradients, with a gradient from elsewhere by `tap`, as double on the CPU."""
    # detach() before to(): a copy keeps the strides.
    leaves = [layer.detach().to(device).requires_grad_() for layer in call.layers]
    mask = call.mask.detach().to(device).requires_grad_(call.mask.requires_grad)
    options = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in call.options.items()
    }
    tapped, loss = fdk.tap(leaves, mask, backend=backend, **options)
    plain = fdk.feature_discrepancy_loss(leaves, mask, backend=backend, **options)
    (loss + plain + sum(layer.sum() for layer in tapped)).backward()
    inputs = [*leaves, mask] if mask.requires_grad else leaves
    return [tensor.detach().cpu().double() for tensor in (loss, plain, *(i.grad for i in inputs))]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", CALLS)
def test_a_small_call_matches_the_reference(name, backend):
    reason = fdk.backends()[backend]
    if reason is not None:
        pytest.skip(f"backend {backend!r}: {reason}")
    call = CALLS[name]
    found, expected = run(call, "cuda", backend), run(call, "cpu", "reference")
    for got, right in zip(found, expected, strict=True):
        error = (got - right).norm() / right.norm().clamp(min=1)
        assert error <= BOUNDS[call.layers[0].dtype]


def small_norms() -> dict[str, tuple[nn.Module, nn.Module, Tensor]]:
    """Normalisation, activation and map [N, C, *S]."""
    generator = torch.Generator().manual_seed(1)
    found: dict[str, tuple[nn.Module, nn.Module, Tensor]] = {}
    for dtype in BOUNDS:
        x = torch.randn(2, 20, 24, 20, generator=generator).to(dtype)
        odd = torch.randn(2, 7, 5, 7, generator=generator).to(dtype)
        volume = torch.randn(2, 5, 5, 7, 9, generator=generator).to(dtype)
        for name, norm, activation, of in (
            ("batch", nn.BatchNorm2d(20), nn.ReLU(), x),
            ("batch-channels_last", nn.BatchNorm2d(20), nn.ReLU(), channels_last(x)),
            ("instance", nn.InstanceNorm2d(20, affine=True), nn.LeakyReLU(), x),
            ("instance-channels_last", nn.InstanceNorm2d(20, affine=True), nn.LeakyReLU(), channels_last(x)),
            ("odd", nn.BatchNorm2d(7), nn.ReLU(), odd),
            ("odd-channels_last", nn.BatchNorm2d(7), nn.ReLU(), channels_last(odd)),
            ("3-D", nn.InstanceNorm3d(5), nn.ReLU(), volume),
        ):
            found[f"{name}-{str(dtype).removeprefix('torch.')}"] = (norm, activation, of)
    return found


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


NORMS = small_norms()


class Network(nn.Module):
    """A block with a name, as taps ask for it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def run_norm(name: str, fuses: bool, device: str, backend: str) -> list[Tensor]:
    """Loss, output, gradients of map and parameters and the running statistics, as double on the CPU."""
    norm, activation, x = NORMS[name]
    model = Network(copy.deepcopy(norm), activation).to(device)
    if fuses:
        fdk.fuse_norms(model, ["block"])
    mask = (torch.rand(2, 1, *x.shape[2:], generator=torch.Generator().manual_seed(2)) > 0.7).float()
    leaf, mask = x.detach().to(device).requires_grad_(), mask.to(device)
    with fdk.use_backend(backend), fdk.FeatureTaps(model, ["block"], fused=True) as taps:
        with taps.mask(mask):
            y = model(leaf)
        loss = fdk.FeatureDiscrepancyLoss(1).to(device)(taps, mask)
        (loss + y.float().square().sum() / 100).backward()
    grads = [parameter.grad for parameter in model.parameters()]
    found = [loss, y, leaf.grad, *grads, *model.buffers()]
    return [tensor.detach().cpu().double() for tensor in found]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", NORMS)
def test_a_small_norm_matches_torch(name, backend):
    reason = fdk.backends()[backend]
    if reason is not None:
        pytest.skip(f"backend {backend!r}: {reason}")
    found, expected = run_norm(name, True, "cuda", backend), run_norm(name, False, "cpu", "reference")
    for got, right in zip(found, expected, strict=True):
        error = (got - right).norm() / right.norm().clamp(min=1)
        assert error <= BOUNDS[NORMS[name][2].dtype]
