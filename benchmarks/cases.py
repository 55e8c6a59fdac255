"""What is measured: calls of the loss, by name.

| name | layers | size of the mask |
| --- | --- | --- |
| `enc1-256` | the output of one tap of the UNet, 4 images of 256² | the layer's |
| `unet-512`, `nucleisegnet-256` | the nine taps of a network: 4 images of 512², 16 of 256² | the image's |
| `pyramid-256`, `deep-256` | all nine taps of the UNet, the three smallest alone; 4 images | the image's |
| `bool-256` and others | `enc1-256` | bool, uint8, int64, soft, or with pixels to ignore |
| `shuffle-256`, `pooled-256` | `deep-256` with an exchange | the image's |
| `released-256` | `enc1-256` under the convention of the authors' code | the layer's |
| `volume-64`, `volumes-64` | a map of 2 volumes of 64³; three levels of them | the volume's |
| `scaling-32` | one map of 32 MiB | the layer's |

The shapes are those that the networks of `fdkernels.models` have when they run.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdkernels import FeatureTaps, models

BATCH = 4
NETWORK_BATCH = {512: 4, 256: 16}
LEVELS = ("enc1", "enc2", "enc3", "enc4", "bottleneck")
# Taps of a pyramid of the UNet.
PYRAMIDS = {"pyramid": (*LEVELS, "dec4", "dec3", "dec2", "dec1"), "deep": ("enc4", "bottleneck", "dec4")}
MASK_KINDS = ("bool", "uint8", "int64", "soft", "ignore")
EXCHANGES = ("shuffle", "pooled")
IGNORED = 255
FORMATS = {
    "contiguous": (torch.contiguous_format,) * 3,
    "channels_last": (torch.contiguous_format, torch.channels_last, torch.channels_last_3d),
}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One call of the loss.

    Args:
        name: as above.
        layers: [N, C, *S] of each layer.
        mask_size: the spatial size of the mask.
        dtype: of the features.
        layout: `"contiguous"` or `"channels_last"`.
        device: `"cpu"` or `"cuda"`.
        mask_kind: `"binary"` is float32 of 0 and 1; else one of `MASK_KINDS`.
        convention: `"paper"` or `"released"`.
        exchange: `"none"`, `"shuffle"` or `"pooled"`.
    """

    name: str
    layers: tuple[Shape, ...]
    mask_size: Shape
    dtype: torch.dtype
    layout: str
    device: str
    mask_kind: str = "binary"
    convention: str = "paper"
    exchange: str = "none"

    @property
    def id(self) -> str:
        """The name of the case with what it is computed in, such as `enc1-256-float32-contiguous-cpu`."""
        return f"{self.name}-{dtype_name(self.dtype)}-{self.layout}-{self.device}"

    @property
    def feature_bytes(self) -> int:
        """The bytes of all layers: what forward has to read, and backward to write."""
        return self.dtype.itemsize * sum(math.prod(shape) for shape in self.layers)

    @property
    def ignore_index(self) -> int | None:
        """The value of the mask's pixels that do not count."""
        return IGNORED if self.mask_kind == "ignore" else None

    @property
    def is_plain(self) -> bool:
        """Whether the kernels are looked at: the mask is binary, the loss the paper's, without a series."""
        usual = (self.mask_kind, self.convention, self.exchange) == ("binary", "paper", "none")
        return usual and not self.name.startswith("scaling")

    def shrunk(self) -> Case:
        """The same case with few channels and pixels, for checks that should be fast."""
        layers = tuple(
            (2, max(2, channels // 32), *(max(2, size // 16) for size in spatial))
            for _, channels, *spatial in self.layers
        )
        return replace(self, layers=layers, mask_size=tuple(max(2, size // 16) for size in self.mask_size))


class Inputs(NamedTuple):
    """The tensors of a case.

    Attributes:
        layers: [N, C, *S] of each layer, in the layout of the case, asking for gradients.
        mask: [N, 1, *S0], of the case's kind.
        pairing: who meets whom under an exchange: [N], or [K, 2] for `"pooled"`.
    """

    layers: list[Tensor]
    mask: Tensor
    pairing: Tensor | None = None


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def named_case(name: str, dtype: torch.dtype, layout: str, device: str) -> Case:
    """The case of that name.

    Raises:
        ValueError: no case has that name.
    """
    stem, _, number = name.rpartition("-")
    size = int(number)
    options: dict[str, Any] = {}
    if stem in models.names():
        layers = tuple(tap_shapes(stem, size, NETWORK_BATCH[size]).values())
    elif stem == "scaling":
        layers = (_shape_of(size, dtype),)
    elif stem in ("volume", "volumes"):
        levels = range(3 if stem == "volumes" else 1)
        layers = tuple((2, 32 * 2**level, *[size // 2**level] * 3) for level in levels)
    else:
        taps = PYRAMIDS.get(stem, (stem,))
        if stem in MASK_KINDS:
            taps, options["mask_kind"] = ("enc1",), stem
        elif stem in EXCHANGES:
            taps, options["exchange"] = PYRAMIDS["deep"], stem
        elif stem == "released":
            taps, options["convention"] = ("enc1",), stem
        shapes = tap_shapes("unet", size, BATCH)
        unknown = set(taps) - shapes.keys()
        if unknown:
            raise ValueError(f"name must be that of a case, got {name!r}")
        layers = tuple(shapes[tap] for tap in taps)
    mask_size = (size, size) if len(layers) > 1 and stem != "volumes" else layers[0][2:]
    return Case(name, layers, mask_size, dtype, layout, device, **options)


@functools.cache
def tap_shapes(network: str, side: int, batch: int) -> dict[str, Shape]:
    """What each tap of a network puts out for images of side², by its name; nothing is computed."""
    with torch.device("meta"):
        model = models.create(network)
        images = torch.empty(batch, 3, side, side)
    with torch.no_grad(), FeatureTaps(model, model.tap_names) as taps:
        model(images)
        return {name: tuple(layer.shape) for name, layer in zip(model.tap_names, taps.features, strict=True)}


def _shape_of(mib: int, dtype: torch.dtype) -> Shape:
    """A map of so many MiB, a power of two: 64 or 128 channels, 4 samples."""
    pixels = mib * 2**20 // dtype.itemsize // (BATCH * 64)
    doubled = pixels.bit_length() % 2 == 0
    side = math.isqrt(pixels // 2 if doubled else pixels)
    return BATCH, 128 if doubled else 64, side, side


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random features in [0.5, 1.5) and a random mask.

    Under "released" features with a mean of one half would cancel to nothing but rounding.
    """
    generator = torch.Generator(case.device).manual_seed(seed)
    layers = []
    for shape in case.layers:
        features = torch.empty(
            shape,
            dtype=case.dtype,
            device=case.device,
            memory_format=FORMATS[case.layout][len(shape) - 3],
        )
        layers.append(features.uniform_(0.5, 1.5, generator=generator).requires_grad_())
    batch = case.layers[0][0]
    noise = torch.rand((batch, 1, *case.mask_size), generator=generator, device=case.device)
    return Inputs(layers, _mask(case.mask_kind, noise), _pairing(case.exchange, batch, case.device))


def _mask(kind: str, noise: Tensor) -> Tensor:
    foreground = noise > 0.6
    if kind == "soft":
        return noise.square()
    if kind == "ignore":
        return foreground.to(torch.uint8).masked_fill(noise < 0.1, IGNORED)
    dtypes = {"bool": torch.bool, "uint8": torch.uint8, "int64": torch.int64}
    return foreground.to(dtypes.get(kind, torch.float32))


def _pairing(exchange: str, batch: int, device: str) -> Tensor | None:
    samples = torch.arange(batch, device=device)
    if exchange == "shuffle":
        return samples.roll(1)
    if exchange == "pooled":  # the first half of the batch is one data set, the second the other
        return torch.stack([samples[: batch // 2], samples[batch - batch // 2 :]], dim=1)
    return None
