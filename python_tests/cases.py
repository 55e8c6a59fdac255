"""Features and masks to try things on: described, made from a seed, and drawn by hypothesis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from oracles import CONVENTIONS, EXCHANGES, RESIZES

FEATURE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "sliced", "strided", "expanded", "transposed")
HARD_MASKS = ("bool", "uint8", "int64", "hard float")
MASK_DTYPES = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int64": torch.int64,
    "hard float": torch.float32,
    "soft": torch.float32,
    "soft double": torch.float64,
    "soft half": torch.float16,
    "soft bfloat": torch.bfloat16,
    "soft grad": torch.float32,
    "soft double grad": torch.float64,
}


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values [N, C, *S] with other strides; "expanded" repeats the first channel's values."""
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout in ("sliced", "strided"):
        step = 2 if layout == "strided" else 1
        room = torch.full([step * s + 2 for s in values.shape], math.nan, dtype=values.dtype)
        view = room[tuple(slice(1, 1 + step * s, step) for s in values.shape)]
        return view.copy_(values)
    if layout == "expanded":
        return values[:, :1].contiguous().expand(values.shape)
    return values.contiguous()


@dataclass(frozen=True)
class Case:
    """Features and a mask, described; a failing one is printed as it stands."""

    shapes: tuple[tuple[int, ...], ...]
    mask_shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    layouts: tuple[str, ...] = ("contiguous",)
    mask_kind: str = "bool"
    mask_fill: str = "random"
    ignore_index: float | None = None
    seed: int = 0

    @property
    def batch(self) -> int:
        return self.shapes[0][0]

    @property
    def has_ties(self) -> bool:
        """Whether max-pooling has more than one gradient with respect to the mask."""
        return self.mask_kind.endswith("grad") and self.mask_fill not in ("random", "first ignored")

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def features(self, device: torch.device | str = "cpu") -> list[Tensor]:
        generator = self._generator()
        layers = []
        for i, shape in enumerate(self.shapes):
            dtype = self.dtypes[i % len(self.dtypes)]
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            layer = lay_out(values.to(device), self.layouts[i % len(self.layouts)])
            layers.append(layer.detach().requires_grad_())
        return layers

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        generator = self._generator()
        soft = torch.rand(self.mask_shape, generator=generator, dtype=torch.float64)
        level = torch.rand((), generator=generator)
        hard = self.mask_kind in HARD_MASKS
        values = (soft < level).double() if hard else soft
        if self.mask_fill == "empty":
            values.zero_()
        elif self.mask_fill == "full":
            values.fill_(1)
        elif self.mask_fill == "first empty":
            values[:1] = 0
        mask = values.to(MASK_DTYPES[self.mask_kind])
        if self.ignore_index is not None:
            ignored = torch.rand(self.mask_shape, generator=generator) < 0.3
            if self.mask_fill == "first ignored":
                ignored[:1] = True
            mask = mask.masked_fill(ignored, self.ignore_index)
        mask = mask.to(device)
        return mask.requires_grad_() if self.mask_kind.endswith("grad") else mask


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype] = FEATURE_DTYPES,
    mask_kinds: Sequence[str] = tuple(MASK_DTYPES),
    max_layers: int = 3,
    max_size: int = 9,
    min_batch: int = 1,
) -> Case:
    """Pyramids of one to three spatial dimensions with a mask of their size or of another."""
    rank = draw(st.integers(1, 3))
    N = draw(st.integers(min_batch, 4))
    most = max_size if rank < 3 else min(max_size, 4)

    def size() -> tuple[int, ...]:
        return tuple(draw(st.integers(1, most)) for _ in range(rank))

    layers = draw(st.integers(1, max_layers))
    shapes = [(N, draw(st.integers(1, 9)), *size()) for _ in range(layers)]
    relation = draw(st.sampled_from(("same", "double", "other")))
    if relation == "same":
        spatial = shapes[0][2:]
    else:
        spatial = tuple(2 * s for s in shapes[0][2:]) if relation == "double" else size()
    channel = draw(st.booleans())
    kind = draw(st.sampled_from(mask_kinds))
    ignore: float | None = None
    fills = ["random", "random", "first empty", "empty", "full"]
    if kind != "bool" and draw(st.booleans()):
        ignore = draw(st.sampled_from((255, 2) if kind == "uint8" else (-1, 255)))
        fills.append("first ignored")
    return Case(
        shapes=tuple(shapes),
        mask_shape=(N, 1, *spatial) if channel else (N, *spatial),
        dtypes=tuple(draw(st.sampled_from(dtypes)) for _ in range(layers)),
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(layers)),
        mask_kind=kind,
        mask_fill=draw(st.sampled_from(fills)),
        ignore_index=ignore,
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def partners(draw: st.DrawFn, exchange: str, batch: int) -> Tensor | None:
    """A pairing for an exchange; any sample may meet any other, some twice and some not at all."""
    sample = st.integers(0, batch - 1)
    if exchange == "shuffle":
        return torch.tensor(draw(st.lists(sample, min_size=batch, max_size=batch)))
    if exchange == "pooled":
        return torch.tensor(draw(st.lists(st.tuples(sample, sample), min_size=1, max_size=5)))
    return None


@st.composite
def calls(draw: st.DrawFn, **limits: Any) -> tuple[Case, dict[str, Any]]:
    """A case and the options of a call on it."""
    exchange = draw(st.sampled_from(EXCHANGES))
    case = draw(cases(min_batch=1 if exchange == "none" else 2, **limits))
    weights = None
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(case.seed + 1)
        # As wide as the loss: a narrower weight rounds the gradient of each entry before it adds them up.
        wide = torch.float64 if torch.float64 in case.dtypes else torch.float32
        weights = torch.randn(len(case.shapes), generator=generator, dtype=wide)
        weights.requires_grad_(draw(st.booleans()))
    return case, {
        "convention": draw(st.sampled_from(CONVENTIONS)),
        "exchange": exchange,
        "pairing": draw(partners(exchange, case.batch)),
        "layer_weights": weights,
        "mask_resize": draw(st.sampled_from((None, *RESIZES))),
        "ignore_index": case.ignore_index,
        "eps": draw(st.sampled_from((1e-12, 1e-6, 1e-2))),
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
    }


@dataclass(frozen=True)
class Sums:
    """Sums and masses of a pyramid, as stage log_norm takes them, and the options of a call."""

    channels: tuple[int, ...]
    pixels: tuple[int, ...]
    batch: int
    dtype: torch.dtype
    left_out: tuple[tuple[bool, bool], ...]
    convention: str
    exchange: str
    reduction: str
    eps: float
    pairing: Tensor | None
    seed: int
    bad: float | None = None

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Sums [2, N, ΣC] and masses [2, N, L]; `left_out` says which regions of a sample are empty."""
        generator = torch.Generator().manual_seed(self.seed)
        kind = {"generator": generator, "dtype": self.dtype}
        masses = torch.rand(2, self.batch, len(self.channels), **kind) + 0.1
        sums = torch.randn(2, self.batch, sum(self.channels), **kind)
        for n, regions in enumerate(self.left_out):
            for region, empty in enumerate(regions):
                if empty:
                    masses[region, n] = 0
                    sums[region, n] = 0
        if self.bad is not None:
            sums[:, 0, 1] = self.bad  # in both regions, as a bad feature makes them
        return sums.to(device).requires_grad_(), masses.to(device).requires_grad_()


@st.composite
def sums(
    draw: st.DrawFn,
    conventions: Sequence[str] = CONVENTIONS,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
) -> Sums:
    """What a call of stage log_norm may hold."""
    exchange = draw(st.sampled_from(EXCHANGES))
    batch = draw(st.integers(1 if exchange == "none" else 2, 4))
    layers = draw(st.integers(1, 3))
    pairing = draw(partners(exchange, batch))
    if exchange == "pooled" and draw(st.booleans()):
        pairing = torch.cat([pairing, torch.full((1, 2), -1)])
    return Sums(
        channels=tuple(draw(st.integers(1, 9)) for _ in range(layers)),
        pixels=tuple(draw(st.integers(1, 99)) for _ in range(layers)),
        batch=batch,
        dtype=draw(st.sampled_from(dtypes)),
        left_out=tuple(
            draw(st.sampled_from([(False, False)] * 5 + [(True, False), (False, True), (True, True)]))
            for _ in range(batch)
        ),
        convention=draw(st.sampled_from(conventions)),
        exchange=exchange,
        reduction=draw(st.sampled_from(("mean", "sum", "none"))),
        eps=draw(st.sampled_from((1e-12, 1e-6, 1e-2))),
        pairing=pairing,
        seed=draw(st.integers(0, 2**16)),
    )
