"""Masks as they are drawn: PNG or TIFF, the lesion dark on light or light on dark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fdkernels.segmentation.data.image_io import opened
from fdkernels.segmentation.data.prepare.options import MaskPolarity

# So much of a mask's outermost pixels must agree on what is background.
_MAJORITY = 2 / 3


def read_drawn_mask(path: Path, polarity: MaskPolarity) -> np.ndarray:
    """The lesion of the mask at `path` as bool [H, W].

    The values are those that a viewer shows: a palette, or the inverting table with which Fiji
    writes TIFF files, is applied; an alpha channel is dropped.

    Args:
        path: a PNG or TIFF file of one image and two grey values.
        polarity: see `PrepareOptions`.

    Raises:
        ValueError: the file cannot be read, holds several images or more than two grey values, is
            empty, or its outermost pixels do not decide what is background.
    """
    with opened(path) as image:
        values = np.array(_flat(image))  # [H, W]
    grey = np.unique(values)
    if grey.size > 2:
        raise ValueError(
            f"{path} must hold two grey values, lesion and background, got {grey.size} between "
            f"{grey[0]} and {grey[-1]}"
        )
    if grey.size < 2:
        raise ValueError(f"{path} is empty: every pixel is {grey[0]}")
    light: np.ndarray = values == grey[1]  # [H, W]
    if polarity == "auto":
        polarity = _drawn(path, light)
    return light if polarity == "light" else ~light


def _flat(image: Image.Image) -> Image.Image:
    """The picture in one channel: deep ones as they are, others as 8-bit grey without alpha."""
    if image.mode.startswith(("I", "F")):
        return image
    # A palette with transparent entries has to be resolved with its alpha first.
    return (image.convert("RGBA") if image.mode == "P" else image).convert("L")


def _drawn(path: Path, light: np.ndarray) -> MaskPolarity:
    """How the lesion is drawn, by what most of the outermost pixels are."""
    edge = np.concatenate([light[0], light[-1], light[1:-1, 0], light[1:-1, -1]])
    share = edge.mean()
    if share >= _MAJORITY:
        return "dark"
    if share <= 1 - _MAJORITY:
        return "light"
    raise ValueError(
        f"{path} has its lighter value on {share:.0%} of the outermost pixels, so they do not decide what "
        "is background; name the mask polarity"
    )


__all__ = ["read_drawn_mask"]
