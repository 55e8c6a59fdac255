"""What can be seen on an ultrasound screen: where the picture lies, and what is drawn over it."""

from __future__ import annotations

import numpy as np

from fdkernels.segmentation.data.prepare.options import Box

# The screen around the picture is black, up to the noise of lossy compression.
BLACK = 10
BLOCK = 8

# B-mode is grey. Lossy compression moves its channels apart by far less than this.
COLOURED = 48

# Speckle is as wide as the beam; a drawn line rises from what is 2 pixels off on both sides.
STROKE_REACH = 2
STROKE_RISE = 96

# So many pixels of either kind are annotation; single ones occur in bare pictures.
LEAST_MARKS = 5


def content_box(picture: np.ndarray) -> Box | None:
    """The box around the largest bright part of a screen; None where everything is black.

    The screen is cut into blocks of 8x8 pixels. A block counts where at least half of its pixels
    are brighter than 10 of 255, which tissue is and text is not; blocks that share a side belong
    together. The box around the most blocks that do, without its black rows and columns, is the
    result: it is right to within half a block.

    Args:
        picture: uint8 [H, W] or [H, W, 3].
    """
    bright = _brightness(picture) > BLACK  # [H, W]
    height, width = bright.shape
    padded = np.pad(bright, ((0, -height % BLOCK), (0, -width % BLOCK)))
    down, across = padded.shape[0] // BLOCK, padded.shape[1] // BLOCK
    # A block that hangs over the edge is judged by the pixels that it has.
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
    """What looks drawn on the picture, in words; None where nothing does.

    Two kinds of pixels count, and 5 of a kind make annotation:

    - coloured: the channels differ by at least 48 of 255;
    - strokes: brighter by at least 96 than both pixels 2 to the left and right, or both pixels 2
      above and below, so part of a bright line at most 3 pixels wide with hard edges. Letters,
      calipers and dotted lines are; speckle and specular echoes are wider or softer.

    Dark or broad marks are not seen.

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
    """Which pixels [H, W] belong to thin bright strokes; none within 2 pixels of the edge."""
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
    """The greatest channel, uint8 [H, W]."""
    brightness: np.ndarray = picture if picture.ndim == 2 else picture.max(axis=2)
    return brightness


def _lengths(side: int) -> np.ndarray:
    """How many pixels of the side each block holds."""
    return np.minimum(BLOCK, side - np.arange(0, side, BLOCK))


def _largest_part(filled: np.ndarray) -> np.ndarray:
    """The largest set of True cells [down, across] that hang together by their sides."""
    left = filled.copy()
    largest = np.zeros_like(filled)
    while left.sum() > largest.sum():  # else no part that is left can be larger
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
