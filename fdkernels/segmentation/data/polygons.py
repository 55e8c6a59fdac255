"""Outlines of objects in the XML of Aperio ImageScope, and the mask they enclose.

    Annotations/Annotation/Regions/Region/Vertices/Vertex[@X, @Y]

X is the column and Y the row, in pixels, as integers or decimals; an outline is closed by itself.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from defusedxml import DefusedXmlException, ElementTree

_MOST_BYTES = 2**26  # the largest file of MoNuSeg has 5 MB
_FARTHEST = 1e6  # pixels from the corner of the image
_MOST_CROSSINGS = 10**7  # of rows by one polygon, which bounds the memory for it
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


def _rows(low: np.ndarray, high: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of an edge and an image row with low <= row < high, as two index arrays [pairs]."""
    first, stop = np.ceil(np.clip([low, high], 0, height)).astype(int)  # [edges]
    counts = stop - first
    if (pairs := int(counts.sum())) > _MOST_CROSSINGS:
        raise ValueError(
            f"a polygon must cross the rows of its image {_MOST_CROSSINGS} times at most, got {pairs}"
        )
    edges = np.repeat(np.arange(len(low)), counts)
    within = np.arange(pairs) - np.repeat(np.cumsum(counts) - counts, counts)
    return edges, first[edges] + within


def _fill(depth: np.ndarray, polygon: np.ndarray) -> None:
    """Counts a polygon [vertices, 2] in `depth` [H, W + 1]: +1 where a run of its pixels begins, -1 after it.

    A pixel belongs to a run if its centre lies in the polygon or on its outline: between two
    crossings of its row, on an edge along the row, or on a vertex.
    """
    height, width = depth.shape[0], depth.shape[1] - 1
    x, y = polygon.T  # [edges], where an edge begins
    next_x, next_y = np.roll(polygon, -1, axis=0).T  # [edges], where it ends
    edge, row = _rows(np.minimum(y, next_y), np.maximum(y, next_y), height)
    # Multiplied before it is divided, so that whole numbers stay exact.
    crossing = x[edge] + (row - y[edge]) * (next_x - x)[edge] / (next_y - y)[edge]
    order = np.lexsort((crossing, row))  # each row is crossed an even number of times: in, out, in, out
    on_row = (y == np.floor(y)) & (y >= 0) & (y < height)
    level = on_row & (y == next_y)
    starts = np.concatenate((crossing[order[::2]], np.minimum(x, next_x)[level], x[on_row]))
    stops = np.concatenate((crossing[order[1::2]], np.maximum(x, next_x)[level], x[on_row]))
    rows = np.concatenate((row[order[::2]], y[level], y[on_row])).astype(int)
    left = np.ceil(starts).clip(0, width).astype(int)
    right = (np.floor(stops) + 1).clip(0, width).astype(int)
    run = left < right
    np.add.at(depth, (rows[run], left[run]), 1)
    np.add.at(depth, (rows[run], right[run]), -1)


def fill_polygons(polygons: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The union of the polygons as bool [H, W]: pixels whose centre lies inside or on an outline.

    The centre of the pixel in row r and column c is X = c, Y = r. The outlines of MoNuSeg run
    through the border pixels of a nucleus, which is why these belong to it, as they do in
    scikit-image's `draw.polygon`. An outline that crosses itself is filled by the even-odd rule,
    and what lies outside the image is cut off.

    Args:
        polygons: each [vertices, 2] of X and Y.
        size: width and height of the image.

    Raises:
        ValueError: a polygon crosses more rows than any outline drawn by hand.
    """
    width, height = size
    depth = np.zeros((height, width + 1), dtype=np.int32)  # [H, W + 1]
    for polygon in polygons:
        _fill(depth, polygon)
    mask: np.ndarray = depth[:, :width].cumsum(axis=1) > 0  # [H, W]
    return mask


@lru_cache(maxsize=_CACHED)
def _packed(path: Path, size: tuple[int, int], modified: int) -> np.ndarray:
    """`fill_polygons` of the file as bits; `modified` makes a changed file another entry."""
    polygons = read_polygons(path)
    try:
        return np.packbits(fill_polygons(polygons, size))
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


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
