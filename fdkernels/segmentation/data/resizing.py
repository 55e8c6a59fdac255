"""Bring an image and its mask to the size at which a network sees them."""

from __future__ import annotations

import numpy as np
from PIL import Image

_ROUNDING = 1e-6  # of the weights that Pillow adds up


def resize_image(image: Image.Image, side: int) -> Image.Image:
    """Resize to a square by bilinear interpolation, over all pixels that a new one covers."""
    return image.resize((side, side), Image.Resampling.BILINEAR)


def resize_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """Resize a mask to a square, where its foreground covers at least half of a pixel.

    Both sizes span the same square, as they do for the image, so that the mask lies on its image. (The
    nearest pixel, at even factors, would be half a pixel of the file beside it.) Where exactly half of a
    pixel is covered, which at even factors is common and would widen every object, it is foreground if
    the bilinear average, which reaches into the neighbours, is at least one half.

    Args:
        mask: bool [H, W].
        side: S, the new side in pixels.

    Returns:
        bool [S, S].
    """
    # In units of 1 / S of an old pixel every edge is a whole number, so that halves are exact.
    covered = _sums(_sums(mask, side, np.int32).T, side, np.int64).T  # [S, S], of H * W
    larger: np.ndarray = 2 * covered > mask.size
    if (tied := 2 * covered == mask.size).any():
        grey = Image.fromarray(mask.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
        larger |= tied & (np.array(grey) >= 0.5 - _ROUNDING)
    return larger


def _sums(values: np.ndarray, side: int, dtype: type[np.signedinteger]) -> np.ndarray:
    """Sum values [H, W] over `side` equal parts of the rows, in units of 1 / `side` of a row, [side, W]."""
    rows = len(values)
    whole, part = np.divmod(np.arange(side + 1) * rows, side)  # [side + 1], the edges
    below = np.zeros((rows + 1, *values.shape[1:]), dtype)
    np.cumsum(values, axis=0, dtype=dtype, out=below[1:])
    start = below[whole] * side  # [side + 1, W]
    cut = part > 0
    start[cut] += values[whole[cut]] * part[cut, None].astype(dtype)
    return np.diff(start, axis=0)


__all__ = ["resize_image", "resize_mask"]
