"""What is measured: layers as a UNet has them, by name.

A name is a layer and the side of the input image: `enc1-256` is the first encoder level of a UNet with 64
base channels at 256x256, [N, 64, 256, 256]. Decoder levels have the shapes of the encoder levels. A pyramid
is a call with several layers and a mask of the input's size, which everyone has to resize.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

BATCH = 4
BASE_CHANNELS = 64
LEVELS = ("enc1", "enc2", "enc3", "enc4", "bottleneck")
TAPS = (*LEVELS, "dec4", "dec3", "dec2", "dec1")
# Layers of a pyramid.
PYRAMIDS = {"pyramid": TAPS, "deep": ("enc4", "bottleneck", "dec4")}

# `enc1-128` is [4, 64, 128, 128]; `pyramid-32` has small layers alone, from 32x32 down to 2x2.
CPU_NAMES = (
    *(f"{level}-256" for level in LEVELS),
    "enc1-128",
    "pyramid-256",
    "deep-256",
    "pyramid-32",
)
CUDA_NAMES = ("pyramid-512", "enc1-512", "enc2-512", *CPU_NAMES)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """One call of the loss.

    Args:
        name: the layer or pyramid and the side of the input, as above.
        layers: [N, C, H, W] of each layer.
        mask_size: H, W of the mask.
        dtype: of the features.
        layout: `"contiguous"` or `"channels_last"`.
        device: `"cpu"` or `"cuda"`.
    """

    name: str
    layers: tuple[tuple[int, int, int, int], ...]
    mask_size: tuple[int, int]
    dtype: torch.dtype
    layout: str
    device: str

    @property
    def id(self) -> str:
        """The name of the case with what it is computed in, such as `enc1-256-float32-contiguous-cpu`."""
        return f"{self.name}-{dtype_name(self.dtype)}-{self.layout}-{self.device}"

    @property
    def feature_bytes(self) -> int:
        """The bytes of all layers: what forward has to read, and backward to write."""
        size = torch.empty((), dtype=self.dtype).element_size()
        return size * sum(n * c * h * w for n, c, h, w in self.layers)

    def shrunk(self) -> Case:
        """The same case with few channels and pixels, for checks that should be fast."""
        layers = tuple((2, max(2, c // 32), max(2, h // 16), max(2, w // 16)) for _, c, h, w in self.layers)
        height, width = self.mask_size
        mask_size = max(2, height // 16), max(2, width // 16)
        return replace(self, layers=layers, mask_size=mask_size)


class Inputs(NamedTuple):
    """The tensors of a case.

    Attributes:
        layers: [N, C, H, W] of each layer, in the layout of the case, asking for gradients.
        mask: [N, 1, H0, W0] float32, 0 or 1.
    """

    layers: list[Tensor]
    mask: Tensor


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def cases(device: str) -> list[Case]:
    """All cases of a device, `"cpu"` or `"cuda"`."""
    names = CUDA_NAMES if device == "cuda" else CPU_NAMES
    # The two that differ most first: a time limit cuts off the end.
    variants = (
        (torch.float32, "contiguous"),
        (torch.bfloat16, "channels_last"),
        (torch.float32, "channels_last"),
        (torch.bfloat16, "contiguous"),
    )
    return [named_case(name, dtype, layout, device) for dtype, layout in variants for name in names]


def named_case(name: str, dtype: torch.dtype, layout: str, device: str) -> Case:
    """The case of that name."""
    stem, side_text = name.split("-")
    side = int(side_text)
    taps = PYRAMIDS.get(stem, (stem,))
    layers = tuple(_tap_shape(tap, side) for tap in taps)
    mask_size = (side, side) if stem in PYRAMIDS else layers[0][2:]
    return Case(name, layers, mask_size, dtype, layout, device)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random features in [0, 1), as after a ReLU without its zeros, and a random binary mask."""
    generator = torch.Generator(case.device).manual_seed(seed)
    layers = []
    for shape in case.layers:
        features = torch.empty(
            shape, dtype=case.dtype, device=case.device, memory_format=LAYOUTS[case.layout]
        )
        layers.append(features.uniform_(generator=generator).requires_grad_())
    mask = torch.rand((case.layers[0][0], 1, *case.mask_size), generator=generator, device=case.device)
    return Inputs(layers, (mask > 0.6).float())


def _tap_shape(tap: str, side: int) -> tuple[int, int, int, int]:
    level = LEVELS.index(tap.replace("dec", "enc"))
    return BATCH, BASE_CHANNELS * 2**level, side // 2**level, side // 2**level
