"""Find the ultrasound region on a screen, and text and marks burned into it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from fdkernels.segmentation.data.prepare.options import Box

# The screen around the image is black up to compression noise: grey value, and block side in pixels.
BLACK = 10
BLOCK = 8

# Minimum channel difference of a coloured pixel. B-mode is grey; compression changes channels far less.
COLOURED = 48

# A drawn line differs from the pixels 2 to both sides of it; speckle is as wide as the beam.
STROKE_REACH = 2
STROKE_RISE = 96

# On ground of one value, as outside the beam, a smaller difference shows a line. The ground is the median
# of a square of that side (of every third pixel of it), flat where at least that share of the square has
# its value, to within the noise.
FAINT_RISE = 16
GROUND_SIDE = 15
GROUND_STEP = 3
FLAT_SHARE = 0.6
GROUND_NOISE = 2

# Minimum number of marked pixels of a kind; unannotated images contain single ones.
LEAST_MARKS = 5

# A picture that uses less than half of the range hides what rises less: it is looked at stretched as well.
# There a stroke must also rise by this many times the median step between neighbours, the noise.
STRETCHED_BELOW = 128
NOISE_STEPS = 7


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

    At least 5 pixels of one kind are annotation:

    - coloured: the channels differ by at least 48 of 255;
    - strokes: brighter, or darker, by at least 96 than both pixels 2 to the left and right, or both
      pixels 2 above and below: part of a sharp line at most 3 pixels wide. Letters, calipers and
      dotted lines match; speckle and specular echoes are wider or softer;
    - faint strokes: as these, by at least 16, where the ground around is flat.

    A picture that uses less than half of the 256 levels is also looked at with its range stretched to
    255, and with its levels spaced evenly over it: marks that differ by a level from what is around
    them are as readable to whoever stretches the file. What counts there must also exceed the noise.

    Broad marks are not detected, nor faint ones on speckle.

    Args:
        picture: uint8 [H, W] or [H, W, 3].
    """
    low, high = _range(picture)
    for seen, noise in _views(picture, low, high):
        # Compression tints a stretched picture, so colours count there only where none could be seen.
        if seen.ndim == 3 and (not noise or high - low < COLOURED):
            spread = np.ptp(seen, axis=2)
            coloured = int((spread >= max(COLOURED, noise * np.median(spread))).sum())
            if coloured >= LEAST_MARKS:
                return f"{coloured} coloured pixels"
        grey = _brightness(seen).astype(np.int16)
        rise = max(STROKE_RISE, noise * _median_step(grey))
        for kind, values in (("bright", grey), ("dark", -grey)):
            strokes = int(_strokes(values, rise).sum())
            if strokes >= LEAST_MARKS:
                return f"{strokes} pixels of thin {kind} strokes"
    faint = int(_faint_strokes(_brightness(picture)).sum())
    if faint >= LEAST_MARKS:
        return f"{faint} pixels of thin faint strokes"
    return None


def _range(picture: np.ndarray) -> tuple[int, int]:
    """Return the levels that picture uses from and to, but for fewer pixels than a mark has."""
    levels = np.sort(picture, axis=None)
    ignored = min(LEAST_MARKS - 1, (levels.size - 1) // 2)
    return int(levels[ignored]), int(levels[-1 - ignored])


def _views(picture: np.ndarray, low: int, high: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the picture and, if it uses few levels, two stretched ones; with the factor of their noise."""
    yield picture, 0
    if 0 < high - low < STRETCHED_BELOW:
        stretched = (picture.astype(np.float32) - low) * (255 / (high - low))
        yield np.rint(stretched).clip(0, 255).astype(np.uint8), NOISE_STEPS
    levels, place = np.unique(picture, return_inverse=True)
    if 1 < levels.size < STRETCHED_BELOW:
        spaced = np.rint(np.linspace(0, 255, levels.size)).astype(np.uint8)
        yield spaced[place.reshape(picture.shape)], NOISE_STEPS


def _median_step(grey: np.ndarray) -> float:
    """Return the median difference between neighbours in a row of `grey` [H, W]; 0 without any."""
    steps = np.abs(np.diff(grey, axis=1))
    return float(np.median(steps)) if steps.size else 0.0


def _strokes(grey: np.ndarray, rise: float) -> np.ndarray:
    """Mark the pixels of thin strokes of `grey`, int16 [H, W], that rise so far; returns bool [H, W]."""
    reach = STROKE_REACH
    found = np.zeros(grey.shape, dtype=bool)
    for axis in (0, 1):
        lines = np.moveaxis(grey, axis, 0)
        beside = np.maximum(lines[: -2 * reach], lines[2 * reach :])
        rises = lines[reach:-reach] - beside >= rise
        np.moveaxis(found, axis, 0)[reach:-reach] |= rises
    return found


def _faint_strokes(grey: np.ndarray) -> np.ndarray:
    """Mark the pixels of thin strokes on flat ground of `grey`, uint8 [H, W]; returns bool [H, W]."""
    coarse = ndimage.median_filter(grey[::GROUND_STEP, ::GROUND_STEP], GROUND_SIDE // GROUND_STEP)
    ground = coarse.repeat(GROUND_STEP, axis=0).repeat(GROUND_STEP, axis=1)[: grey.shape[0], : grey.shape[1]]
    flat = ndimage.uniform_filter((grey == ground).astype(np.float32), GROUND_SIDE) >= FLAT_SHARE
    difference = np.abs(grey.astype(np.int16) - ground)
    is_ground, reach = difference <= GROUND_NOISE, STROKE_REACH
    between = np.zeros(grey.shape, dtype=bool)
    for axis in (0, 1):
        lines = np.moveaxis(is_ground, axis, 0)
        np.moveaxis(between, axis, 0)[reach:-reach] |= lines[: -2 * reach] & lines[2 * reach :]
    found: np.ndarray = flat & between & (difference >= FAINT_RISE)
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
    parts, count = ndimage.label(filled)
    if not count:
        return np.zeros_like(filled)
    return np.asarray(parts == 1 + np.bincount(parts[filled], minlength=count + 1)[1:].argmax())


__all__ = ["annotation", "content_box"]
