"""Features and masks to try things on: described, made from a seed, and drawn by hypothesis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fdkernels.conventions import Options
from fdkernels.op.pyramid import Pyramid, Weights, accumulate_dtype, describe
from oracles import CONVENTIONS, EXCHANGES, RESIZES, Formula, formula_of

FEATURE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "sliced", "strided", "expanded", "transposed")
# Also the dimensions in reverse, maps that repeat a row of pixels, and maps that repeat one number.
ALL_LAYOUTS = (*LAYOUTS, "turned", "repeated", "constant")
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
# Sizes of a mask and of a layer at which floor((cell + 0.5) * float32(from / to)) names another pixel than
# (2 * cell + 1) * from // (2 * to), in one dimension at least: smaller layers, larger ones, and both at once.
# Every language is fed these: the backends in op/test_masks.py, the emulated CUDA kernels in cuda_emulation.
NEAREST_SIZES = (
    ((26,), (11,)),
    ((28,), (23,)),
    ((52,), (22,)),
    ((64,), (55,)),
    ((224,), (184,)),
    ((256,), (244,)),
    ((4,), (41,)),
    ((12,), (74,)),
    ((26, 28), (11, 23)),
    ((8, 52), (4, 11)),
    ((62, 4), (7, 82)),
    ((2, 26, 28), (1, 11, 23)),
    ((52, 3, 30), (22, 3, 29)),
    ((2, 3, 26), (41, 3, 11)),
)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values [N, C, *S] with other strides; layouts that repeat take the first of `values`."""
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout in ("sliced", "strided"):
        step = 2 if layout == "strided" else 1
        room = values.new_full([step * s + 2 for s in values.shape], math.nan)
        view = room[tuple(slice(1, 1 + step * s, step) for s in values.shape)]
        return view.copy_(values)
    if layout == "turned":
        order = tuple(reversed(range(values.dim())))
        return values.permute(order).contiguous().permute(order)
    if layout == "expanded":
        return values[:, :1].contiguous().expand(values.shape)
    if layout == "repeated":
        kept = (slice(0, 1), slice(None), *[slice(0, 1)] * (values.dim() - 3), slice(None))
        return values[kept].contiguous().expand(values.shape)
    if layout == "constant":
        return values[tuple(slice(0, 1) for _ in values.shape)].contiguous().expand(values.shape)
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
    layouts: Sequence[str] = LAYOUTS,
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
        layouts=tuple(draw(st.sampled_from(layouts)) for _ in range(layers)),
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


WEIGHT_KINDS = ("uint8", "wide", "mixed", "valid uint8", "valid wide", "valid mixed")


def weights_for(features: Sequence[Tensor], kind: str, generator: torch.Generator | None = None) -> Weights:
    """Weights [N, P] of each layer, as backends take them.

    "uint8" holds 0 and 1, "wide" anything between in the accumulation dtype, "mixed" both by turns. Under
    "valid" a third of the pixels is left out.
    """
    wide = accumulate_dtype(features)
    fg, bg = [], []
    for index, layer in enumerate(features):
        shape = (layer.shape[0], layer.shape[2:].numel())
        is_byte = kind.endswith("uint8") or (kind.endswith("mixed") and index % 2 == 1)
        y = torch.rand(shape, generator=generator, dtype=torch.float64)
        y = (y > 0.5).to(torch.uint8) if is_byte else y.to(wide)
        v = (torch.rand(shape, generator=generator) > 1 / 3).to(y.dtype)
        fg.append((v * y if kind.startswith("valid") else y).to(layer.device))
        bg.append((v * (1 - y)).to(layer.device))
    return Weights(fg, bg if kind.startswith("valid") else [])


@dataclass(frozen=True)
class SumsCase:
    """Sums and masses of a pyramid, and the options by which they become losses."""

    channels: tuple[int, ...]
    pixels: tuple[int, ...]
    batch: int
    convention: str | Formula
    dtype: torch.dtype = torch.float64
    left_out: tuple[tuple[bool, bool], ...] = ()
    exchange: str = "none"
    reduction: str = "mean"
    eps: float = 1e-12
    pairing: Tensor | None = None
    seed: int = 0
    bad: float | None = None

    @property
    def options(self) -> Options:
        formula = formula_of(self.convention)
        return Options(
            region_weight=formula.region_weight,
            masked_background=formula.masked_background,
            norm=formula.norm,
            log_scale=formula.log_scale,
            eps=self.eps,
            exchange=self.exchange,
            reduction=self.reduction,
        )

    @property
    def formula(self) -> dict[str, Any]:
        """The same as `oracles.losses_of` takes it."""
        names = ("channels", "pixels", "reduction", "convention", "exchange", "pairing", "eps")
        return {name: getattr(self, name) for name in names}

    @property
    def pyramid(self) -> Pyramid:
        sizes = zip(self.channels, self.pixels, strict=True)
        return describe([torch.empty((self.batch, C, P), dtype=self.dtype, device="meta") for C, P in sizes])

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
        return sums.to(device), masses.to(device)


FORMULAS = st.builds(
    Formula,
    st.sampled_from(("valid", "none", "region", "pixels")),
    st.sampled_from(("vector", "channel_sum", "relative", "batch")),
    st.sampled_from((0.3, 0.5, 1.0)),
    st.booleans(),
)


@st.composite
def sums_cases(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    reductions: Sequence[str] = ("mean", "sum"),
) -> SumsCase:
    """What a call of `Kernels.losses` may hold, under a convention or any other formula."""
    exchange = draw(st.sampled_from(EXCHANGES))
    batch = draw(st.integers(1 if exchange == "none" else 2, 4))
    layers = draw(st.integers(1, 3))
    pairing = draw(partners(exchange, batch))
    if exchange == "pooled" and draw(st.booleans()):
        pairing = torch.cat([pairing, torch.tensor([[-1, 1]])])
    regions = [(False, False)] * 5 + [(True, False), (False, True), (True, True)]
    return SumsCase(
        channels=tuple(draw(st.integers(1, 9)) for _ in range(layers)),
        pixels=tuple(draw(st.integers(1, 99)) for _ in range(layers)),
        batch=batch,
        convention=draw(st.one_of(st.sampled_from(CONVENTIONS), FORMULAS)),
        dtype=draw(st.sampled_from(dtypes)),
        left_out=tuple(draw(st.sampled_from(regions)) for _ in range(batch)),
        exchange=exchange,
        reduction=draw(st.sampled_from(reductions)),
        eps=draw(st.sampled_from((1e-12, 1e-6, 1e-2))),
        pairing=pairing,
        seed=draw(st.integers(0, 2**16)),
    )
