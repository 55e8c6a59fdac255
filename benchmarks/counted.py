"""The bytes that a call of the loss moves, counted from its shapes, stage by stage: what the design asks for.

Every tensor is counted once for each pass that reads or writes it; what stays in a cache between two of them
is counted all the same. Scratch memory of the second pass over partial sums, about 1 % of the features, is
not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from benchmarks.cases import Case

_MASK_BYTES = {"binary": 4, "soft": 4, "bool": 1, "uint8": 1, "int64": 8, "ignore": 1}


class Stage(NamedTuple):
    """One stage of a call.

    Attributes:
        name: the stage and its direction.
        read, written: bytes.
    """

    name: str
    read: int
    written: int


def count_bytes(case: Case) -> list[Stage]:
    """The stages of a call in order, forward and backward.

    The mask is read once, at the size of the image, and every size below it is made from it; kernels read a
    weight of the mask's own size as it is. Pixels to ignore need a second weight of each size.
    """
    accumulate = 8 if case.dtype == torch.float64 else 4
    batch = case.layers[0][0]
    weights = 2 if case.mask_kind == "ignore" else 1
    mask_bytes = _MASK_BYTES[case.mask_kind]
    pixels = math.prod(case.mask_size)
    sizes = {tuple(layer[2:]) for layer in case.layers}
    as_is = weights == 1 and case.mask_kind != "int64"
    made = [math.prod(size) for size in sizes if not (as_is and size == tuple(case.mask_size))]

    def weight_bytes(layer: tuple[int, ...]) -> int:
        own = as_is and tuple(layer[2:]) == tuple(case.mask_size)
        return batch * math.prod(layer[2:]) * weights * (mask_bytes if own else accumulate)

    features = case.feature_bytes
    layer_weights = sum(map(weight_bytes, case.layers))
    sums = 2 * batch * accumulate * (sum(layer[1] for layer in case.layers) + len(case.layers))
    losses = accumulate * len(case.layers)
    return [
        Stage(
            "layer_masks forward",
            batch * pixels * mask_bytes if made else 0,
            batch * sum(made) * weights * accumulate,
        ),
        Stage("region_sums forward", features + layer_weights, sums),
        Stage("log_norm forward", sums, losses),
        Stage("log_norm backward", sums + losses, sums),
        Stage("region_sums backward", sums + layer_weights, features),
    ]


def tap_bytes(case: Case) -> tuple[int, int]:
    """Bytes of backward where a gradient arrives from the network: by `tap`, and by an op of its own.

    `tap` reads that gradient and writes the sum. A separate op writes a gradient, and autograd reads both and
    writes their sum.
    """
    last = count_bytes(case)[-1]
    return last.read + last.written + case.feature_bytes, last.read + last.written + 3 * case.feature_bytes
