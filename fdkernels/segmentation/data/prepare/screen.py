"""Find the ultrasound region on a screen, and text and marks burned into it."""

from __future__ import annotations

import numpy as np

from fdkernels.segmentation.data.prepare.options import Box

# The screen around the image is black up to compression noise: grey value, and block side in pixels.
BLACK = 10
BLOCK = 8

# Minimum channel difference of a coloured pixel. B-mode is grey; compression changes channels far less.
COLOURED = 48

# A drawn line is brighter than the pixels 2 to both sides of it; speckle is as wide as the beam.
STROKE_REACH = 2
STROKE_RISE = 96

# Minimum number of marked pixels of a kind; unannotated images contain single ones.
LEAST_MARKS = 5


def content_box(picture: np.ndarray) -> Box | None:
    """Return the bounding box of the largest bright region of a screen, or None if there is none.

    Divides the screen into blocks of 8x8 pixels. A block is bright if at least half of its pixels
    exceed 10 of 255, as in tissue but not in text; bright blocks that share a side form a region. Trims
    black rows and columns from the box of the largest region. The result is exact to within half a
    block.

    Args:
        picture: uint8 [H, W] or [H, W, 3].
    """
    bright = _brightness(picture) > BLACK  # [H, W]
    height, width = bright.shape
    padded = np.pad(bright, ((0, -height % BLOCK), (0, -width % BLOCK)))
    down, across = padded.shape[0] // BLOCK, padded.shape[1] // BLOCK
    # Blocks at the edge have fewer pixels.
    sizes = np.outer(_lengths(height), _lengths(width))  # [down, across]
    filled = padded.reshape(down, BLOCK, across, BLOCK).sum(axis=(1, 3)) * 2 >= sizes
    part = _largest_part(filled)
    if not part.any():
        return None
    rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
    y0, x0 = int(rows[0]) * BLOCK, int(columns[0]) * BLOCK
    inside = bright[y0 : (int(rows[-1]) + 1) * BLOCK, x0 : (int(columns[-1]) + 1) * BLOCK]
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    return Box(x0 + int(columns[0]), y0 + int(rows[0]), x0 + int(columns[-1]) + 1, y0 + int(rows[-1]) + 1)


def annotation(picture: np.ndarray) -> str | None:
    """Describe the annotation detected on an image, or return None if there is none.

    At least 5 pixels of one of two kinds are annotation:

    - coloured: the channels differ by at least 48 of 255;
    - strokes: brighter by at least 96 than both pixels 2 to the left and right, or both pixels 2
      above and below: part of a bright, sharp line at most 3 pixels wide. Letters, calipers and dotted
      lines match; speckle and specular echoes are wider or softer.

    Dark and broad marks are not detected.

    Args:
        picture: uint8 [H, W] or [H, W, 3].
    """
    if picture.ndim == 3:
        coloured = int((np.ptp(picture, axis=2) >= COLOURED).sum())
        if coloured >= LEAST_MARKS:
            return f"{coloured} coloured pixels"
    strokes = int(_strokes(_brightness(picture)).sum())
    if strokes >= LEAST_MARKS:
        return f"{strokes} pixels of thin bright strokes"
    return None


def _strokes(grey: np.ndarray) -> np.ndarray:
    """Mark the pixels of thin bright strokes, bool [H, W]."""
    grey = grey.astype(np.int16)
    reach = STROKE_REACH
    found = np.zeros(grey.shape, dtype=bool)
    for axis in (0, 1):
        lines = np.moveaxis(grey, axis, 0)
        beside = np.maximum(lines[: -2 * reach], lines[2 * reach :])
        rises = lines[reach:-reach] - beside >= STROKE_RISE
        np.moveaxis(found, axis, 0)[reach:-reach] |= rises
    return found


def _brightness(picture: np.ndarray) -> np.ndarray:
    """Return the maximum over channels, uint8 [H, W]."""
    brightness: np.ndarray = picture if picture.ndim == 2 else picture.max(axis=2)
    return brightness


def _lengths(side: int) -> np.ndarray:
    """Return the number of pixels of each block along a side."""
    return np.minimum(BLOCK, side - np.arange(0, side, BLOCK))


def _largest_part(filled: np.ndarray) -> np.ndarray:
    """Return the largest 4-connected component of `filled`, bool [down, across]."""
    left = filled.copy()
    largest = np.zeros_like(filled)
    while left.sum() > largest.sum():  # otherwise no remaining component can be larger
        part = np.zeros_like(filled)
        part[np.unravel_index(left.argmax(), left.shape)] = True
        while True:
            grown = part.copy()
            grown[1:] |= part[:-1]
            grown[:-1] |= part[1:]
            grown[:, 1:] |= part[:, :-1]
            grown[:, :-1] |= part[:, 1:]
            grown &= filled
            if (grown == part).all():
                break
            part = grown
        left &= ~part
        if part.sum() > largest.sum():
            largest = part
    return largest


__all__ = ["annotation", "content_box"]
