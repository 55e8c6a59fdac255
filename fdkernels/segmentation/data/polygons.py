"""Outlines of objects in the XML of Aperio ImageScope, and the mask they enclose.

    Annotations/Annotation/Regions/Region/Vertices/Vertex[@X, @Y]

X is the column and Y the row, in pixels, as integers or decimals; an outline is closed by itself.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from defusedxml import ElementTree

_MOST_BYTES = 2**26  # the largest file of MoNuSeg has 5 MB
_CACHED = 1024  # masks of a process; packed to bits, one of 1000x1000 takes 125 kB


def read_polygons(path: Path) -> list[np.ndarray]:
    """The outlines in the file, each float64 [vertices, 2] of X and Y, in the order of the file.

    Regions with fewer than three vertices enclose nothing and are left out.

    Raises:
        ValueError: the file is missing, no XML, too large, defines entities, holds no
            `Annotations`, or a vertex without finite X and Y.
    """
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise ValueError(f"{path} must have at most {_MOST_BYTES} bytes, got {size}")
        root = ElementTree.parse(path).getroot()
    except (OSError, SyntaxError, LookupError) as error:  # LookupError: an unknown encoding
        raise ValueError(f"{path} cannot be read: {error}") from error
    except ElementTree.DefusedXmlException as error:
        raise ValueError(f"{path} cannot be read, it defines entities: {error}") from error
    if root.tag != "Annotations":
        raise ValueError(f"{path} must hold ImageScope's element Annotations, got {root.tag}")
    polygons = []
    for number, region in enumerate(root.iterfind("Annotation/Regions/Region"), 1):
        try:
            corners = [
                (float(vertex.attrib["X"]), float(vertex.attrib["Y"]))
                for vertex in region.iterfind("Vertices/Vertex")
            ]
            finite = all(math.isfinite(x) and math.isfinite(y) for x, y in corners)
        except (KeyError, ValueError):
            finite = False
        if not finite:
            raise ValueError(
                f"{path} must give X and Y of every vertex as numbers, got none in region {number}"
            )
        if len(corners) >= 3:
            polygons.append(np.array(corners))  # [vertices, 2]
    return polygons


def fill_polygons(polygons: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The union of the polygons as bool [H, W], True where the pixel's centre lies inside.

    The centre of the pixel in row r and column c is X = c, Y = r, as in scikit-image and in the
    conversions of MoNuSeg that are in use. What lies outside the image is cut off; an outline
    that crosses itself is filled by the even-odd rule.

    Args:
        polygons: each [vertices, 2] of X and Y.
        size: width and height of the image.
    """
    from matplotlib.path import Path as Outline

    width, height = size
    mask = np.zeros((height, width), dtype=bool)  # [H, W]
    for polygon in polygons:
        # Only pixels of the polygon's box are asked, and none outside the image.
        left, top = np.maximum(np.ceil(polygon.min(axis=0)), 0)
        right, bottom = np.minimum(np.floor(polygon.max(axis=0)), (width - 1, height - 1))
        if right < left or bottom < top:
            continue
        rows, columns = np.mgrid[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
        centres = np.column_stack((columns.ravel(), rows.ravel()))  # [pixels, 2]
        inside = Outline(polygon).contains_points(centres).reshape(rows.shape)
        mask[int(top) : int(bottom) + 1, int(left) : int(right) + 1] |= inside
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
