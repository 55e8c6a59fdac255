"""Lesions that were drawn as an outline and not filled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import ndimage

from fdkernels.segmentation.data.prepare.options import Outlines

# A part is an outline where filling what it encloses multiplies its pixels by at least this.
GROWTH = 1.25

# Half the gap of an open outline that is closed, as a share of the longer side of what is drawn; in pixels.
GAP_SHARE = 0.05
LEAST_REACH, MOST_REACH = 2, 8

# A part so many times longer than it is wide at its widest is a line and encloses nothing.
LENGTH = 10

_EIGHT = np.ones((3, 3), dtype=bool)


def without_outlines(path: Path, lesion: np.ndarray, outlines: Outlines) -> tuple[np.ndarray, int]:
    """Refuse or fill parts of a mask that are outlines; return it, bool [H, W], and how many were filled.

    A part is an outline if filling what it encloses makes it at least a quarter larger. A gap of up to a
    tenth of the drawing's longer side (4 to 16 pixels) does not open it. A line, at least ten times
    longer than wide, is an outline with a larger gap, or a stray stroke.

    Args:
        path: the mask's file, for messages.
        lesion: bool [H, W].
        outlines: "refuse", "fill", or "keep" for masks with rings that are meant.

    Raises:
        ValueError: the mask contains an outline and `outlines` is "refuse", or a line and it is not "keep".
    """
    if outlines == "keep":
        return lesion, 0
    filled, count = _filled(lesion)
    if count and outlines == "refuse":
        raise ValueError(
            f"{path} must be filled, got an outline: of the {int(filled.sum())} pixels inside, "
            f"{int(lesion.sum())} are drawn; fill it, here with --outlines fill, or set --outlines keep "
            "if the lesion is a ring"
        )
    length, width = _longest_line(filled)
    if length:
        raise ValueError(
            f"{path} must contain regions, got a line of {length} pixels, {width} wide, that encloses "
            "nothing; close and fill it, or set --outlines keep if the lesion is a line"
        )
    return filled, count


def _filled(lesion: np.ndarray) -> tuple[np.ndarray, int]:
    """Fill the outlines of `lesion`, bool [H, W]; return it and their number."""
    if not lesion.any():
        return lesion, 0
    (drawn,) = ndimage.find_objects(lesion.astype(np.uint8))
    side = max(extent.stop - extent.start for extent in drawn)
    most = int(np.clip(round(GAP_SHARE * side), LEAST_REACH, MOST_REACH))
    # A margin, so that growing parts do not enclose something with the edge.
    part, count = np.pad(lesion[drawn], most + 1), 0
    for reach in range(most + 1):  # the smallest that closes a gap changes the shape least
        grown = part if reach == 0 else ndimage.distance_transform_edt(~part) <= reach
        closed = ndimage.binary_fill_holes(grown)
        if (closed == grown).all():
            continue
        inside = closed if reach == 0 else ndimage.distance_transform_edt(closed) > reach
        labels, number = ndimage.label(closed, _EIGHT)
        for label in range(1, number + 1):
            here = labels == label
            whole = here & (inside | part)
            if (here & ~grown).any() and whole.sum() >= GROWTH * (part & here).sum():
                part = part | whole
                count += 1
    filled = lesion.copy()
    filled[drawn] = part[most + 1 : -most - 1, most + 1 : -most - 1]
    return filled, count


def _longest_line(lesion: np.ndarray) -> tuple[int, int]:
    """Return length and width in pixels of the longest part that is a line; zeros if there is none."""
    parts, number = ndimage.label(lesion, _EIGHT)
    found = (0, 0)
    depths = ndimage.distance_transform_edt(np.pad(lesion, 1))[1:-1, 1:-1]
    for part in range(1, number + 1):
        here = parts == part
        # The middle of a line of width w is (w + 1) / 2 from the nearest pixel outside.
        width = max(round(2 * float(depths[here].max()) - 1), 1)
        length = int(here.sum()) // width
        if length >= LENGTH * width:
            found = max(found, (length, width))
    return found


__all__ = ["without_outlines"]
