"""Small calls of every kind on a GPU, compared with the reference; gpu_suite.sh checks their memory accesses.

python benchmarks/small_calls.py [--device cuda] [--backends cuda triton]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fdkernels

# Of the loss and, as a norm, of the gradient.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def calls() -> Iterator[tuple[str, list[Tensor], Tensor, dict[str, Any]]]:
    """Name, layers, mask and options of each call, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    # Far from one half: where f and b are nearly equal, L and its gradient amplify every rounding.
    mask = (random(2, 1, 24, 20) > 0.7).float()
    for dtype in BOUNDS:
        name = str(dtype).removeprefix("torch.")
        features = random(2, 5, 24, 20).to(dtype)
        wide = random(2, 70, 24, 20).to(dtype)
        yield f"contiguous {name}", [features], mask, {}
        yield f"channels_last {name}", [features.to(memory_format=torch.channels_last)], mask, {}
        yield f"channels_last wide {name}", [wide.to(memory_format=torch.channels_last)], mask, {}
        yield f"transposed {name}", [features.mT.contiguous().mT], mask, {}
        yield f"1-D {name}", [random(2, 3, 301).to(dtype)], mask.flatten(2)[..., :301], {}
        volume = random(2, 3, 5, 7, 9).to(dtype)
        solid = (random(2, 1, 5, 7, 9) > 0.7).float()
        yield f"3-D {name}", [volume], solid, {}
        yield (
            f"3-D channels_last {name}",
            [volume.to(memory_format=torch.channels_last_3d)],
            solid,
            {},
        )
    pyramid = [random(2, 4, 24, 20), random(2, 9, 12, 10), random(2, 33, 3, 5), random(2, 2, 1, 1)]
    yield "pyramid", pyramid, mask, {}
    yield "shuffled", pyramid, mask, {"exchange": "shuffle", "pairing": torch.tensor([1, 0])}
    yield "released", pyramid, mask, {"convention": "released"}
    # Not for the single pixel, whose two means are equal.
    yield "region_mean", pyramid[:3], mask, {"convention": "region_mean"}
    ignored = torch.where(random(2, 1, 24, 20) > 0.8, 255.0, mask)
    yield "ignore_index", pyramid, ignored, {"ignore_index": 255}
    yield "boolean mask", pyramid, mask.bool(), {}
    yield "soft mask", pyramid, random(2, 1, 24, 20).square().requires_grad_(), {}


def run(
    layers: list[Tensor], mask: Tensor, options: dict[str, Any], device: str, backend: str
) -> list[Tensor]:
    """Loss and gradients of a call, with a gradient from elsewhere by `tap`, as double on the CPU."""
    # detach() before to(): a copy keeps the strides.
    leaves = [layer.detach().to(device).requires_grad_() for layer in layers]
    own_mask = mask.detach().to(device).requires_grad_(mask.requires_grad)
    options = {
        key: value.to(device) if isinstance(value, Tensor) else value for key, value in options.items()
    }
    tapped, loss = fdkernels.tap(leaves, own_mask, backend=backend, **options)
    plain = fdkernels.feature_discrepancy_loss(leaves, own_mask, backend=backend, **options)
    (loss + plain + sum(layer.sum() for layer in tapped)).backward()
    inputs = [*leaves, own_mask] if mask.requires_grad else leaves
    return [tensor.detach().cpu().double() for tensor in (loss, plain, *(i.grad for i in inputs))]


def main() -> None:
    """Run every call on every backend; the exit status is 1 if a number is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"])
    arguments = parser.parse_args()
    wrong = 0
    for name, layers, mask, options in calls():
        truth = run(layers, mask, options, "cpu", "reference")
        for backend in arguments.backends:
            got = run(layers, mask, options, arguments.device, backend)
            errors = [
                ((a - b).norm() / b.norm().clamp(min=1)).item() for a, b in zip(got, truth, strict=True)
            ]
            error = torch.tensor(errors).max().item()
            right = error <= BOUNDS[layers[0].dtype]
            wrong += not right
            print(f"{'ok' if right else 'WRONG':6} {backend:7} {name:28} {error:.1e}")
    sys.exit(min(wrong, 1))


if __name__ == "__main__":
    main()
