"""How often the kernels of a normalisation read and write each map, counted element by element."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fdkernels as fdk
from cases import lay_out, weights_for
from fdkernels.op.kernels import norm_kernels_of
from fdkernels.op.norm_formula import Formula, NormInputs

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or fdk.backends()["triton"] is not None,
    reason="transfers are counted by Triton's interpreter, with TRITON_INTERPRET=1",
)
# Beyond whole maps: the first value of each channel of a tile, about which squares are taken.
ORIGINS = 0.02


@contextmanager
def transfers(**maps: Tensor) -> Iterator[Counter[str]]:
    """Count by name, such as `read x`, the elements of maps that kernels load and store."""
    from triton.runtime.interpreter import InterpreterBuilder

    counts: Counter[str] = Counter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def count(way: str, pointers: Any, mask: Any) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        for name, values in maps.items():
            start = values.data_ptr()
            counts[f"{way} {name}"] += int(((addresses >= start) & (addresses < start + values.nbytes)).sum())

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        count("read", pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        count("written", pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    InterpreterBuilder.create_masked_load = counted_load
    InterpreterBuilder.create_masked_store = counted_store
    try:
        yield counts
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store


@pytest.mark.parametrize("with_loss", [False, True], ids=["without the loss", "with the loss"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_map_moves_eight_times_with_the_loss_or_without(layout, with_loss, monkeypatch):
    kernels = norm_kernels_of("triton")
    assert kernels is not None
    x, grad_y = (lay_out(torch.randn(2, 8, 40, 41), layout) for _ in range(2))
    out, grad_x = torch.empty_like(x), torch.empty_like(x)
    weights = weights_for([x], "uint8") if with_loss else None
    inputs = NormInputs(x, torch.ones(8), torch.zeros(8), None, False)
    formula = Formula(False, 1e-5, "relu")

    empty_like = torch.empty_like
    rooms = {"forward": out, "backward": grad_x}
    way = "forward"
    # The maps that are written are known before.
    monkeypatch.setattr(
        torch, "empty_like", lambda of, **how: rooms[way] if of is x else empty_like(of, **how)
    )
    with transfers(x=x, grad_y=grad_y, out=out, grad_x=grad_x) as counts:
        _, statistics, _ = kernels.norm_forward(inputs, formula, None, weights)
        way = "backward"
        added = None if weights is None else (torch.randn(2, 2, 8), weights)
        kernels.norm_backward(inputs._replace(statistics=statistics), formula, grad_y, added, (True,) * 3)
    maps = {name: count / x.numel() for name, count in counts.items() if count}
    assert maps == {
        "read x": pytest.approx(4, abs=ORIGINS),
        "written out": 1,
        "read grad_y": 2,
        "written grad_x": 1,
    }
