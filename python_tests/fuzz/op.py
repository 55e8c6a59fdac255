"""Random calls of the loss on each backend against the float64 oracle, a seed each.

    make fuzz FUZZ_CASES=100000
    cd python_tests && python -m fuzz.op --cases 1000 --first 5000      seeds 5000 to 5999
    cd python_tests && python -m fuzz.op --cases 1 --first 5123         one seed again, with its call

A seed is one call: shapes, dtypes, strides, mask, convention, exchange, reduction. Its loss and gradients
are compared on every backend that runs on the CPU (Triton's interpreter with --backends triton). The band
is the tests': what rounding of sums explains, found by moving them; where a value leaves that, all moves at
once (bands.py) decide.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fdkernels as fdk
import oracles
from bands import widest
from cases import ALL_LAYOUTS, FEATURE_DTYPES, MASK_DTYPES, Case
from fuzz.parallel import in_parallel

MASK_LAYOUTS = ("contiguous", "contiguous", "turned", "strided")


def draw(seed: int) -> tuple[Case, str, dict[str, Any]]:
    """The case of a seed, the layout of its mask, and the options of the call."""
    rng = random.Random(seed)
    exchange = rng.choice(oracles.EXCHANGES)
    rank, N = rng.randint(1, 3), rng.randint(1 if exchange == "none" else 2, 4)
    long = rng.random() < 0.05  # past the length of vectors and runs
    most = {1: 300, 2: 17, 3: 6}[rank] if long else {1: 9, 2: 7, 3: 4}[rank]
    channels = 70 if long else 9

    def size() -> tuple[int, ...]:
        return tuple(rng.randint(1, most) for _ in range(rank))

    layers = rng.randint(1, 1 if long else 3)
    shapes = tuple((N, rng.randint(1, channels), *size()) for _ in range(layers))
    relation = rng.choice(("same", "double", "other"))
    spatial = {"same": shapes[0][2:], "double": tuple(2 * s for s in shapes[0][2:]), "other": size()}[
        relation
    ]
    kind = rng.choice(tuple(MASK_DTYPES))
    ignore: float | None = None
    fills = ["random", "random", "first empty", "empty", "full"]
    if kind != "bool" and rng.random() < 0.5:
        ignore = rng.choice((255, 2) if kind == "uint8" else (-1, 255))
        fills.append("first ignored")
    case = Case(
        shapes=shapes,
        mask_shape=(N, 1, *spatial) if rng.random() < 0.5 else (N, *spatial),
        dtypes=tuple(rng.choice(FEATURE_DTYPES) for _ in range(layers)),
        layouts=tuple(rng.choice(ALL_LAYOUTS) for _ in range(layers)),
        mask_kind=kind,
        mask_fill=rng.choice(fills),
        ignore_index=ignore,
        seed=seed,
    )
    samples = range(N)
    pairing = None
    if exchange == "shuffle":
        pairing = torch.tensor([rng.choice(samples) for _ in samples])
    elif exchange == "pooled":
        pairs = [[rng.choice(samples), rng.choice(samples)] for _ in range(rng.randint(1, 5))]
        pairing = torch.tensor(pairs)
    weights = None
    if rng.random() < 0.5:
        generator = torch.Generator().manual_seed(seed + 1)
        wide = torch.float64 if torch.float64 in case.dtypes else torch.float32
        weights = torch.randn(layers, generator=generator, dtype=wide).requires_grad_(rng.random() < 0.5)
    convention = rng.choice(oracles.CONVENTIONS)
    resize = rng.choice((None, *oracles.RESIZES))
    if case.has_ties and (resize or ("max" if convention == "released" else "area")) == "max":
        resize = "nearest"  # the maximum of equal values has several gradients
    return (
        case,
        rng.choice(MASK_LAYOUTS),
        {
            "convention": convention,
            "exchange": exchange,
            "pairing": pairing,
            "layer_weights": weights,
            "mask_resize": resize,
            "ignore_index": ignore,
            "eps": rng.choice((1e-12, 1e-6, 1e-2)),
            "reduction": rng.choice(("mean", "sum", "none")),
        },
    )


def lay_out_mask(mask: Tensor, layout: str) -> Tensor:
    """The same mask [N, 1, *S0] or [N, *S0] with other strides."""
    laid = mask.detach()
    if layout == "turned":
        order = tuple(reversed(range(laid.dim())))
        laid = laid.permute(order).contiguous().permute(order)
    elif layout == "strided":
        room = torch.full([2 * s for s in laid.shape], 77, dtype=torch.float64).to(laid.dtype)
        laid = room[tuple(slice(None, None, 2) for _ in laid.shape)].copy_(laid)
    return laid.requires_grad_(mask.requires_grad)


def run_backend(
    backend: str, features: Sequence[Tensor], mask: Tensor, options: dict[str, Any], upstream: Any
) -> list[tuple[str, Tensor, float]]:
    """The loss and the gradients by name, each with the roundings of its dtype that it may have."""
    loss = fdk.feature_discrepancy_loss(list(features), mask, **options, aspect="any", backend=backend)
    weights = options["layer_weights"]
    asks = weights is not None and weights.requires_grad
    inputs = [*features, *([mask] if mask.requires_grad else []), *([weights] if asks else [])]
    names = [*(f"layer {i}" for i in range(len(features))), *(["mask"] if mask.requires_grad else [])]
    grads = torch.autograd.grad(
        loss, inputs, upstream(loss).to(loss), allow_unused=True, materialize_grads=True
    )
    found = [("loss", loss, 0.51)]
    for name, value, grad in zip([*names, *(["weights"] if asks else [])], inputs, grads, strict=True):
        assert grad.dtype == value.dtype
        # A weight of several entries adds up their gradients in its dtype; the interpreter cuts off bfloat16.
        ulps = 4.0 if name == "weights" else (1.01 if backend == "triton" else 0.51)
        found.append((f"gradient of {name}", grad, ulps))
    return found


def outside(found: Sequence[tuple[str, Tensor, float]], truth: oracles.Truth) -> str | None:
    """What leaves its band first, in words, or None."""
    wanted = [(truth.loss, truth.loss_band), *zip(truth.grads, truth.bands, strict=True)]
    for (name, value, ulps), (exact, band) in zip(found, wanted, strict=True):
        if not band.isfinite().all():
            return f"{name}: the band is {band}"
        try:
            oracles.assert_within(value, exact, band, name, ulps)
        except AssertionError as error:
            return str(error)
    return None


def check(seed: int, backends: Sequence[str]) -> dict[str, str]:
    """By backend, "moved" or "boxed" where a wider band was needed, or a failure in words."""
    case, layout, options = draw(seed)
    features, mask = case.features(), lay_out_mask(case.mask(), layout)

    def upstream(loss: Tensor) -> Tensor:
        return torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed + 2))

    truth = oracles.truth(features, mask, upstream, moves=0, **options)
    moved = boxed = None
    verdicts = {}
    for backend in backends:
        try:
            found = run_backend(backend, features, mask, options, upstream)
            if outside(found, truth) is None:
                continue
            moved = moved or oracles.truth(features, mask, upstream, **options)
            if outside(found, moved) is None:
                verdicts[backend] = "moved"
                continue
            boxed = boxed or widest(moved, features, mask, upstream, **options)
            verdicts[backend] = outside(found, boxed) or "boxed"
        except Exception as error:
            verdicts[backend] = f"{type(error).__name__}: {error}"
    return verdicts


def run_seeds(first: int, count: int, backends: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """The seeds that needed a wider band or failed."""
    torch.set_num_threads(2 if first % 2 else 1)
    verdicts = ((seed, check(seed, backends)) for seed in range(first, first + count))
    return [(seed, verdict) for seed, verdict in verdicts if verdict]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument(
        "--first", type=int, default=0, help="the first seed; a run that was ended goes on from there"
    )
    parser.add_argument("--backends", nargs="+", default=["reference", "cpu"])
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    started = time.monotonic()
    counts: Counter[str] = Counter()
    failures = []
    for done, verdicts in in_parallel(
        run_seeds, options.first, options.cases, options.jobs, options.backends
    ):
        for seed, by_backend in verdicts:
            for backend, verdict in by_backend.items():
                kind = verdict if verdict in ("moved", "boxed") else "outside"
                counts[f"{backend} {kind}"] += 1
                if kind == "outside":
                    failures.append(seed)
                    print(f"seed {seed}, {backend}: {verdict}\n  {draw(seed)}", flush=True)
        print(f"{done} cases, {time.monotonic() - started:.0f} s, {json.dumps(counts)}", flush=True)
    print(
        f"{options.cases} calls on each of {', '.join(options.backends)}, seeds {options.first} to "
        f"{options.first + options.cases - 1}: {len(failures)} outside of every band"
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
