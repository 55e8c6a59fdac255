"""Read polygons from Aperio ImageScope XML and rasterise them to a mask.

    Annotations/Annotation/Regions/Region/Vertices/Vertex[@X, @Y]

X is the column and Y the row, in pixels, as integers or decimals; polygons are closed implicitly.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from defusedxml import DefusedXmlException, ElementTree

_MOST_BYTES = 2**26  # MoNuSeg's largest file has 5 MB
_FARTHEST = 1e6  # maximum |X| and |Y| in pixels
_MOST_CROSSINGS = 10**7  # edge-row crossings of one polygon; bounds the memory
_CACHED = 1024  # masks per process; a packed mask of 1000x1000 takes 125 kB


def read_polygons(path: Path) -> list[np.ndarray]:
    """Read the polygons, each float64 [vertices, 2] of X and Y in pixels, in file order.

    Skips regions with fewer than three vertices: they enclose no area.

    Raises:
        ValueError: the file is missing, is not XML, exceeds 64 MiB, defines entities, has another
            root element than `Annotations`, or a vertex lacks X or Y or exceeds a million pixels.
    """
    try:
        size = path.stat().st_size
        root = ElementTree.parse(path).getroot() if size <= _MOST_BYTES else None
    except DefusedXmlException as error:
        raise ValueError(f"{path} cannot be read, it defines entities: {error}") from error
    except (OSError, SyntaxError, LookupError, ValueError) as error:  # the last two: invalid encodings
        raise ValueError(f"{path} cannot be read: {error}") from error
    if root is None:
        raise ValueError(f"{path} must have at most {_MOST_BYTES} bytes, got {size}")
    if root.tag != "Annotations":
        raise ValueError(f"{path} must have ImageScope's root element Annotations, got {root.tag}")
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
                f"pixels; region {number} does not"
            )
        if len(corners) >= 3:
            polygons.append(np.array(corners))  # [vertices, 2]
    return polygons


def _rows(low: np.ndarray, high: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs of an edge and an image row with low <= row < high, as two int arrays [pairs].

    Args:
        low, high: lower and upper Y of each edge, [edges].
        height: number of image rows.
    """
    first, stop = np.ceil(np.clip([low, high], 0, height)).astype(int)  # [edges]
    counts = stop - first
    if (pairs := int(counts.sum())) > _MOST_CROSSINGS:
        raise ValueError(f"a polygon must cross the image rows at most {_MOST_CROSSINGS} times, got {pairs}")
    edges = np.repeat(np.arange(len(low)), counts)
    within = np.arange(pairs) - np.repeat(np.cumsum(counts) - counts, counts)
    return edges, first[edges] + within


def _fill(depth: np.ndarray, polygon: np.ndarray) -> None:
    """Add a polygon [vertices, 2] to `depth` [H, W + 1]: +1 at the start of a pixel run, -1 after its end.

    A pixel belongs to a run if its centre is inside the polygon or on its outline: between two
    crossings of its row, on a horizontal edge, or on a vertex.
    """
    height, width = depth.shape[0], depth.shape[1] - 1
    x, y = polygon.T  # [edges], start of each edge
    next_x, next_y = np.roll(polygon, -1, axis=0).T  # [edges], end of each edge
    edge, row = _rows(np.minimum(y, next_y), np.maximum(y, next_y), height)
    # Multiply before dividing: integer coordinates stay exact.
    crossing = x[edge] + (row - y[edge]) * (next_x - x)[edge] / (next_y - y)[edge]
    order = np.lexsort((crossing, row))  # every row has an even number of crossings: in, out, in, out
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
    """Rasterise the union of the polygons to bool [H, W].

    A pixel is foreground if its centre (row r, column c is at X = c, Y = r) is inside a polygon or on
    its outline, as in scikit-image's `draw.polygon`: MoNuSeg's outlines run through the border pixels
    of a nucleus. Self-intersecting polygons are filled by the even-odd rule; polygons are clipped to
    the image.

    Args:
        polygons: arrays [vertices, 2] of X and Y in pixels.
        size: width and height of the image in pixels.

    Raises:
        ValueError: the edges of a polygon cross image rows more than ten million times.
    """
    width, height = size
    depth = np.zeros((height, width + 1), dtype=np.int32)  # [H, W + 1]
    for polygon in polygons:
        _fill(depth, polygon)
    mask: np.ndarray = depth[:, :width].cumsum(axis=1) > 0  # [H, W]
    return mask


@lru_cache(maxsize=_CACHED)
def _packed(path: Path, size: tuple[int, int], modified: int) -> np.ndarray:
    """Rasterise the file and pack the mask to bits; `modified` is part of the cache key."""
    polygons = read_polygons(path)
    try:
        return np.packbits(fill_polygons(polygons, size))
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def polygon_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read the mask of an ImageScope file as bool [H, W]; up to 1024 masks are cached in memory.

    Every epoch needs the mask, and parsing and rasterising take longer than reading the image.

    Args:
        path: the `.xml` file.
        size: width and height of the image in pixels.

    Raises:
        ValueError: the file cannot be read or used, see `read_polygons` and `fill_polygons`.
    """
    try:
        modified = path.stat().st_mtime_ns
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    width, height = size
    bits = np.unpackbits(_packed(path, size, modified), count=width * height)
    return bits.reshape(height, width).astype(bool)


__all__ = ["fill_polygons", "polygon_mask", "read_polygons"]
