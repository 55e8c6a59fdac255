"""Read regions from Aperio ImageScope XML and rasterise them to a mask.

    Annotations/Annotation/Regions/Region[@Type, @NegativeROA]/Vertices/Vertex[@X, @Y]

X is along the columns and Y along the rows, in pixels, as integers or decimals; X = 1, Y = 1 is the centre
of the first pixel, as the MoNuSeg challenge rasterises such files (MATLAB's poly2mask). Type is 0 for a
polygon, closed implicitly, 1 for a rectangle and 2 for an ellipse, given by their corners, 3 for an arrow,
4 for a ruler. NegativeROA="1" marks a hole or an area to leave out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from defusedxml import DefusedXmlException, ElementTree

_MOST_BYTES = 2**26  # MoNuSeg's largest file has 5 MB
_FARTHEST = 1e6  # maximum |X| and |Y| in pixels
_MOST_CROSSINGS = 10**7  # edge-row crossings of one polygon; bounds the memory
_ORIGIN = 1.0  # X and Y of the centre of the first pixel
_POLYGON, _RECTANGLE, _ELLIPSE = "0", "1", "2"
_AREAS = frozenset({_POLYGON, _RECTANGLE, _ELLIPSE})
_NO_AREA = {"3": " (an arrow)", "4": " (a ruler)"}
_CACHED = 1024  # masks per process; a packed mask of 1000x1000 takes 125 kB


@dataclass(frozen=True)
class Region:
    """An area of an image.

    Attributes:
        corners: float64 [vertices, 2], column and row in pixels; 0, 0 is the centre of the first pixel. Of
            a polygon, or two opposite ones of the box around an ellipse.
        ellipse: the area is the ellipse inside the box.
        negative: the pixels of the area are background, whatever other regions say.
    """

    corners: np.ndarray
    ellipse: bool = False
    negative: bool = False


def read_regions(path: Path) -> list[Region]:
    """Read the regions in file order, and subtract 1 from X and Y.

    Skips polygons with fewer than three vertices: they enclose no area.

    Raises:
        ValueError: the file is missing, is not XML, exceeds 64 MiB, defines entities, has another
            root element than `Annotations`, a vertex lacks X or Y or exceeds a million pixels, or a region
            is of a type that encloses no area (arrow, ruler) or that is unknown.
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
    found = (
        _region(element, f"{path} must ", f"region {number}")
        for number, element in enumerate(root.iterfind("Annotation/Regions/Region"), 1)
    )
    return [region for region in found if region is not None]


def _region(element: Any, must: str, called: str) -> Region | None:
    """Read one region, None if it encloses no area; `must` and `called` begin and end an error's sentence."""
    kind, sign = element.get("Type") or _POLYGON, element.get("NegativeROA") or "0"
    if kind not in _AREAS or sign not in {"0", "1"}:
        raise ValueError(
            f"{must}hold polygons, rectangles and ellipses (Type 0, 1 and 2) that are negative areas or "
            f"not (NegativeROA 1 or 0), got Type {kind}{_NO_AREA.get(kind, '')} with NegativeROA {sign}; "
            f"delete or redraw {called}"
        )
    corners = _corners(element)  # [vertices, 2]
    if corners is None:
        raise ValueError(
            f"{must}give X and Y of every vertex as numbers of at most {_FARTHEST:.0e} pixels; {called} "
            "does not"
        )
    if kind == _ELLIPSE and len(corners) not in {2, 4}:
        raise ValueError(
            f"{must}give an ellipse by two or four vertices, the corners of its box, got {len(corners)} "
            f"in {called}"
        )
    if kind == _RECTANGLE and len(corners) == 2:
        (x, y), (u, v) = corners
        corners = np.array([[x, y], [u, y], [u, v], [x, v]])
    if kind != _ELLIPSE and len(corners) < 3:
        return None
    return Region(corners - _ORIGIN, ellipse=kind == _ELLIPSE, negative=sign == "1")


def _corners(element: Any) -> np.ndarray | None:
    """Read X and Y of a region's vertices, float64 [vertices, 2]; None if one is missing or too far."""
    vertices = element.iterfind("Vertices/Vertex")
    try:
        corners = [(float(vertex.attrib["X"]), float(vertex.attrib["Y"])) for vertex in vertices]
    except (KeyError, ValueError):
        return None
    finite = all(abs(x) <= _FARTHEST and abs(y) <= _FARTHEST for x, y in corners)
    return np.array(corners).reshape(-1, 2) if finite else None


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


def _polygon_runs(polygon: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return row, first and last column (not rounded) of the runs of a polygon [vertices, 2], each [runs].

    A pixel belongs to a run if its centre is inside the polygon or on its outline: between two
    crossings of its row, on a horizontal edge, or on a vertex.
    """
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
    return np.concatenate((row[order[::2]], y[level], y[on_row])).astype(int), starts, stops


def _ellipse_runs(box: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the same of the ellipse in a box given by corners [vertices, 2]: centres inside it or on it."""
    (x, y), (u, v) = box.min(axis=0), box.max(axis=0)
    width, tall = u - x, v - y
    first, stop = np.ceil(np.clip([y, np.floor(v) + 1], 0, height)).astype(int)
    if not (width and tall) or stop <= first:
        return np.zeros(0, int), np.zeros(0), np.zeros(0)
    row = np.arange(first, stop)
    # Four times the squared half of a run; whole numbers stay exact until the root.
    chord = (tall * tall - (2 * row - y - v) ** 2) * width * width
    half = np.sqrt(chord.clip(0)) / (2 * tall)
    return row, (x + u) / 2 - half, (x + u) / 2 + half


def _depth(regions: Sequence[Region], size: tuple[int, int]) -> np.ndarray:
    """Count how many runs cover each pixel, int32 [H, W]: above 0 in the union of the regions."""
    width, height = size
    depth = np.zeros((height, width + 1), dtype=np.int32)  # +1 at the start of a run, -1 after its end
    for region in regions:
        rows, starts, stops = (_ellipse_runs if region.ellipse else _polygon_runs)(region.corners, height)
        left = np.ceil(starts).clip(0, width).astype(int)
        right = (np.floor(stops) + 1).clip(0, width).astype(int)
        run = left < right
        np.add.at(depth, (rows[run], left[run]), 1)
        np.add.at(depth, (rows[run], right[run]), -1)
    covered: np.ndarray = depth[:, :width].cumsum(axis=1)
    return covered


def fill_regions(regions: Sequence[Region], size: tuple[int, int]) -> np.ndarray:
    """Rasterise the union of the regions without the negative ones to bool [H, W].

    A pixel belongs to a region if its centre is inside the region or on its outline, as in scikit-image's
    `draw.polygon`: outlines run through the border pixels of a nucleus. Self-intersecting polygons are
    filled by the even-odd rule; regions are clipped to the image.

    Args:
        regions: the regions.
        size: width and height of the image in pixels.

    Raises:
        ValueError: the edges of a polygon cross image rows more than ten million times.
    """
    mask: np.ndarray = _depth([region for region in regions if not region.negative], size) > 0  # [H, W]
    if negative := [region for region in regions if region.negative]:
        mask &= _depth(negative, size) == 0
    return mask


@lru_cache(maxsize=_CACHED)
def _packed(path: Path, size: tuple[int, int], modified: int) -> np.ndarray:
    """Rasterise the file and pack the mask to bits; `modified` is part of the cache key."""
    regions = read_regions(path)
    try:
        return np.packbits(fill_regions(regions, size))
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def polygon_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read the mask of an ImageScope file as bool [H, W]; up to 1024 masks are cached in memory.

    Every epoch needs the mask, and parsing and rasterising take longer than reading the image.

    Args:
        path: the `.xml` file.
        size: width and height of the image in pixels.

    Raises:
        ValueError: the file cannot be read or used, see `read_regions` and `fill_regions`.
    """
    try:
        modified = path.stat().st_mtime_ns
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    width, height = size
    bits = np.unpackbits(_packed(path, size, modified), count=width * height)
    return bits.reshape(height, width).astype(bool)


__all__ = ["Region", "fill_regions", "polygon_mask", "read_regions"]
