"""Read drawn masks: PNG or TIFF, with a dark lesion on light or a light lesion on dark."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fdkernels.segmentation.data.prepare.options import MaskPolarity
from fdkernels.segmentation.data.reading import shown_grey

# Fraction of a mask's border pixels that must agree for "auto" to take their value as background.
_MAJORITY = 2 / 3


def read_drawn_mask(path: Path, polarity: MaskPolarity) -> np.ndarray:
    """Read the mask at `path` as bool [H, W], True in the lesion.

    Uses the values as a viewer displays them: turns the mask as its orientation tag says, applies a palette
    or an inverting lookup table, as Fiji writes to TIFF files, and drops an alpha channel.

    Args:
        path: a PNG or TIFF file with one image of two grey values.
        polarity: see `PrepareOptions.mask_polarity`.

    Raises:
        ValueError: the file cannot be read, contains several images or more than two grey values, is
            empty, or its border pixels do not determine the background.
    """
    values = shown_grey(path)  # [H, W]
    grey = np.unique(values)
    if grey.size > 2:
        raise ValueError(
            f"{path} must have two grey values, lesion and background, got {grey.size} between "
            f"{grey[0]} and {grey[-1]}"
        )
    if grey.size < 2:
        raise ValueError(f"{path} is empty: every pixel is {grey[0]}")
    light: np.ndarray = values == grey[1]  # [H, W]
    if polarity == "auto":
        polarity = _drawn(path, light)
    return light if polarity == "light" else ~light


def _drawn(path: Path, light: np.ndarray) -> MaskPolarity:
    """Infer the polarity from the border pixels of `light` [H, W], which is True at the lighter value."""
    edge = np.concatenate([light[0], light[-1], light[1:-1, 0], light[1:-1, -1]])
    share = edge.mean()
    if share >= _MAJORITY:
        return "dark"
    if share <= 1 - _MAJORITY:
        return "light"
    raise ValueError(
        f"{path} has its lighter value on {share:.0%} of the border pixels, which does not determine the "
        "background; set the mask polarity"
    )


__all__ = ["read_drawn_mask"]
