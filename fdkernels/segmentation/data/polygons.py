"""Outlines of objects in the XML of Aperio ImageScope, and the mask they enclose.

    Annotations/Annotation/Regions/Region/Vertices/Vertex[@X, @Y]

X is the column and Y the row, in pixels, as integers or decimals; an outline is closed by itself.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from defusedxml import DefusedXmlException, ElementTree

_MOST_BYTES = 2**26  # the largest file of MoNuSeg has 5 MB
_FARTHEST = 1e6  # pixels from the corner of the image
_CACHED = 1024  # masks of a process; packed to bits, one of 1000x1000 takes 125 kB


def read_polygons(path: Path) -> list[np.ndarray]:
    """The outlines in the file, each float64 [vertices, 2] of X and Y, in the order of the file.

    Regions with fewer than three vertices enclose nothing and are left out.

    Raises:
        ValueError: the file is missing, no XML, too large, defines entities, holds no
            `Annotations`, or a vertex without X and Y of at most a million pixels.
    """
    try:
        size = path.stat().st_size
        root = ElementTree.parse(path).getroot() if size <= _MOST_BYTES else None
    except DefusedXmlException as error:
        raise ValueError(f"{path} cannot be read, it defines entities: {error}") from error
    except (OSError, SyntaxError, LookupError, ValueError) as error:  # the last two: odd encodings
        raise ValueError(f"{path} cannot be read: {error}") from error
    if root is None:
        raise ValueError(f"{path} must have at most {_MOST_BYTES} bytes, got {size}")
    if root.tag != "Annotations":
        raise ValueError(f"{path} must hold ImageScope's element Annotations, got {root.tag}")
    polygons = []
    for number, region in enumerate(root.iterfind("Annotation/Regions/Region"), 1):
        try:
            corners = [
                (float(vertex.attrib["X"]), float(vertex.attrib["Y"]))
                for vertex in region.iterfind("Vertices/Vertex")
            ]
            finite = all(abs(x) <= _FARTHEST and abs(y) <= _FARTHEST for x, y in corners)
        except (KeyError, ValueError):
            finite = False
        if not finite:
            raise ValueError(
                f"{path} must give X and Y of every vertex as numbers of at most {_FARTHEST:.0e} "
                f"pixels, which region {number} does not"
            )
        if len(corners) >= 3:
            polygons.append(np.array(corners))  # [vertices, 2]
    return polygons


def _fill(mask: np.ndarray, polygon: np.ndarray) -> None:
    """Sets `mask` [H, W] where a pixel's centre lies in the polygon [vertices, 2] or on its outline."""
    height, width = mask.shape
    x, y = polygon.T  # [edges], where an edge begins
    next_x, next_y = np.roll(polygon, -1, axis=0).T  # [edges], where it ends
    first, last = max(math.ceil(y.min()), 0), min(math.floor(y.max()), height - 1)
    for row in range(first, last + 1):
        crosses = (np.minimum(y, next_y) <= row) & (row < np.maximum(y, next_y))
        run, rise = (next_x - x)[crosses], (next_y - y)[crosses]
        # Multiplied before it is divided, so that whole numbers stay exact.
        at = np.sort(x[crosses] + (row - y[crosses]) * run / rise)  # inside from even to odd places
        begins = y == row
        level = begins & (next_y == row)  # edges along the row, which cross it nowhere
        starts = np.concatenate((at[::2], np.minimum(x, next_x)[level], x[begins]))
        stops = np.concatenate((at[1::2], np.maximum(x, next_x)[level], x[begins]))
        left = np.ceil(starts).clip(0, width).astype(int)
        right = np.floor(stops).clip(-1, width - 1).astype(int) + 1
        for start, stop in zip(left, right, strict=True):
            mask[row, start:stop] = True


def fill_polygons(polygons: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The union of the polygons as bool [H, W]: pixels whose centre lies inside or on an outline.

    The centre of the pixel in row r and column c is X = c, Y = r. The outlines of MoNuSeg run
    through the border pixels of a nucleus, which is why these belong to it, as they do in
    scikit-image's `draw.polygon`. An outline that crosses itself is filled by the even-odd rule,
    and what lies outside the image is cut off.

    Args:
        polygons: each [vertices, 2] of X and Y.
        size: width and height of the image.
    """
    width, height = size
    mask = np.zeros((height, width), dtype=bool)  # [H, W]
    for polygon in polygons:
        _fill(mask, polygon)
    return mask


@lru_cache(maxsize=_CACHED)
def _packed(path: Path, size: tuple[int, int], modified: int) -> np.ndarray:
    """`fill_polygons` of the file as bits; `modified` makes a changed file another entry."""
    return np.packbits(fill_polygons(read_polygons(path), size))


def polygon_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The mask in an ImageScope file as bool [H, W], kept for the life of the process.

    Reading a file and filling its polygons takes longer than reading the image, and each epoch
    asks for it again. Nothing is written beside the data.

    Args:
        path: the `.xml`.
        size: width and height of the image.

    Raises:
        ValueError: as `read_polygons`.
    """
    try:
        modified = path.stat().st_mtime_ns
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    width, height = size
    bits = np.unpackbits(_packed(path, size, modified), count=width * height)
    return bits.reshape(height, width).astype(bool)


__all__ = ["fill_polygons", "polygon_mask", "read_polygons"]
