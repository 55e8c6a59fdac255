from __future__ import annotations

import os
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdkernels.segmentation.data import polygons as module
from fdkernels.segmentation.data.polygons import Region, fill_regions, polygon_mask, read_regions
from tiny_data import imagescope

SIZE = (9, 7)  # width, height


def fill_polygons(polygons, size):
    return fill_regions([Region(np.array(polygon, float)) for polygon in polygons], size)


def _pixels(polygon, size=SIZE):
    """Return rows and columns of the pixels that the polygon covers."""
    return np.argwhere(fill_polygons([polygon], size)).tolist()


def _write(path, text):
    path.write_text(text, "utf-8")
    return path


def test_a_rectangle_covers_its_border_pixels_too():
    assert _pixels([[2, 1], [4, 1], [4, 2], [2, 2]]) == [[1, 2], [1, 3], [1, 4], [2, 2], [2, 3], [2, 4]]


def test_x_is_the_column_and_y_is_the_row():
    assert _pixels([[5, 0], [6, 0], [6, 3], [5, 3]]) == [[r, c] for r in range(4) for c in (5, 6)]


def test_between_pixel_centres_only_those_inside_count():
    assert _pixels([[1.5, 0.5], [3.5, 0.5], [3.5, 2.4], [1.5, 2.4]]) == [[1, 2], [1, 3], [2, 2], [2, 3]]
    assert _pixels([[1.1, 1.1], [1.9, 1.1], [1.9, 1.9]]) == []


def test_a_triangle_by_hand():
    assert _pixels([[0, 0], [4, 0], [0, 4]]) == [[r, c] for r in range(5) for c in range(5 - r)]


def test_the_bay_of_a_concave_outline_is_background():
    u_shape = [[0, 0], [1, 0], [1, 3], [4, 3], [4, 0], [5, 0], [5, 5], [0, 5]]
    covered = _pixels(u_shape)
    assert [0, 2] not in covered
    assert [1, 3] not in covered
    assert [4, 2] in covered
    assert len(covered) == 6 * 6 - 2 * 3


def test_an_outline_around_a_point_twice_is_filled_by_the_even_odd_rule():
    square = [[0, 0], [6, 0], [6, 6], [0, 6]]
    inner = [[2, 2], [4, 2], [4, 4], [2, 4]]
    mask = fill_polygons([np.array([*square, square[0], *inner, inner[0]], float)], (7, 7))
    assert not mask[3, 3]
    assert mask[1, 1]


def test_polygons_are_clipped_to_the_image():
    assert _pixels([[-3, -2], [1, -2], [1, 1], [-3, 1]]) == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert _pixels([[7.5, 5.5], [1002, 5.5], [1002, 900], [7.5, 900]]) == [[6, 8]]
    assert _pixels([[-9, -9], [-2, -9], [-2, -2]]) == []
    assert _pixels([[-9, 2], [-5, 2], [-5, 4], [-9, 4]]) == []
    assert _pixels([[20, 2], [25, 2], [25, 4], [20, 4]]) == []
    assert len(_pixels([[-1e6, -1e6], [1e6, -1e6], [1e6, 1e6], [-1e6, 1e6]])) == SIZE[0] * SIZE[1]


def test_overlapping_polygons_are_united():
    one, two = [[0, 0], [3, 0], [3, 3], [0, 3]], [[2, 2], [5, 2], [5, 5], [2, 5]]
    mask = fill_polygons([np.array(one, float), np.array(two, float)], SIZE)
    assert mask.sum() == 16 + 16 - 4
    assert mask[2, 2]


def _covers(polygon, column, row):
    """Return whether the point is inside the polygon or on its outline, in exact arithmetic."""
    corners = [(Fraction(x), Fraction(y)) for x, y in polygon]
    inside = False
    for (x, y), (u, v) in zip(corners, corners[1:] + corners[:1], strict=True):
        within = min(x, u) <= column <= max(x, u) and min(y, v) <= row <= max(y, v)
        if within and (u - x) * (row - y) == (v - y) * (column - x):
            return True
        if (y <= row) != (v <= row) and x + (row - y) * (u - x) / (v - y) > column:
            inside = not inside
    return inside


# Eighths are exact in binary, so points on an outline suffer no rounding.
COORDINATES = st.integers(-24, 96).map(lambda eighths: eighths / 8) | st.integers(-3, 12).map(float)


@given(st.lists(st.tuples(COORDINATES, COORDINATES), min_size=3, max_size=9))
def test_every_pixel_agrees_with_exact_arithmetic(polygon):
    mask = fill_polygons([np.array(polygon)], SIZE)
    width, height = SIZE
    for row in range(height):
        for column in range(width):
            exact = _covers(polygon, column, row)
            on_a_rounded_crossing = mask[row, column] != exact and _nearly_on(polygon, column, row)
            assert mask[row, column] == exact or on_a_rounded_crossing


def _nearly_on(polygon, column, row):
    """Return whether an edge crosses the row so close to the column that float64 cannot separate them."""
    corners = [(Fraction(x), Fraction(y)) for x, y in polygon]
    for (x, y), (u, v) in zip(corners, corners[1:] + corners[:1], strict=True):
        if (y <= row) != (v <= row) and abs(x + (row - y) * (u - x) / (v - y) - column) < 1e-12:
            return True
    return False


@given(st.lists(st.tuples(COORDINATES, COORDINATES), min_size=3, max_size=9), st.integers(0, 8))
def test_neither_the_first_vertex_nor_the_direction_matters(polygon, first):
    first %= len(polygon)
    turned = polygon[first:] + polygon[:first]
    assert _pixels(polygon) == _pixels(turned) == _pixels(turned[::-1])


def test_masks_equal_those_of_scikit_image():
    draw = pytest.importorskip("skimage.draw", reason="the extra demo is not installed")
    generator = np.random.default_rng(0)
    for _ in range(50):
        polygon = generator.uniform(-5, 45, (int(generator.integers(3, 20)), 2))
        expected = np.zeros((36, 40), bool)
        rows, columns = draw.polygon(polygon[:, 1], polygon[:, 0], expected.shape)
        expected[rows, columns] = True
        assert np.array_equal(fill_polygons([polygon], (40, 36)), expected)


def test_integers_and_decimals_are_read_and_short_regions_skipped(tmp_path):
    triangle, line = np.array([[1, 2], [3.25, 2], [3, -4.5]]), np.array([[0, 0], [1, 1]])
    text = imagescope([line, triangle, line[:1], line[:0]]).replace('"1.0000"', '"1"')
    (region,) = read_regions(_write(tmp_path / "a.xml", text))
    assert region.corners.dtype == np.float64
    assert np.array_equal(region.corners, triangle - 1)


def test_all_annotations_of_a_file_count(tmp_path):
    part = imagescope([np.array([[0, 0], [1, 0], [1, 1]])])
    inner = part.removeprefix("<Annotations>").removesuffix("</Annotations>")
    file = _write(tmp_path / "a.xml", f"<Annotations>{inner}{inner}</Annotations>")
    assert len(read_regions(file)) == 2


ENTITIES = '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;&x;">]><Annotations>&y;</Annotations>'
OUTSIDE = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><Annotations>&x;</Annotations>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ENTITIES, "cannot be read, it defines entities"),
        (OUTSIDE, "cannot be read, it defines entities"),
        ("<Annotations><Annotation>", "cannot be read: no element found"),
        ("", "cannot be read: no element found"),
        ("<html></html>", "must have ImageScope's root element Annotations, got html"),
        (imagescope([np.array([[0, 0], [1, 0], [np.nan, 1]])]), "region 1 does not"),
        (imagescope([np.array([[0, 0], [1, 0], [np.inf, 1]])]), "region 1 does not"),
        (imagescope([np.zeros((3, 2)), np.array([[0, 0], [1, 0], [2e6, 1]])]), "region 2 does not"),
        (imagescope([np.zeros((3, 2))]).replace(' Y="0.0000"', ""), "region 1 does not"),
        (imagescope([np.zeros((3, 2))]).replace("0.0000", "left"), "region 1 does not"),
        ("<?xml version='1.0' encoding='klingon'?><Annotations/>", "cannot be read"),
    ],
    ids=["bomb", "external", "cut", "empty", "html", "nan", "inf", "far", "no Y", "words", "encoding"],
)
def test_an_invalid_annotation_file_is_rejected_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as raised:
        read_regions(_write(tmp_path / "a.xml", text))
    assert str(tmp_path / "a.xml") in str(raised.value)


def test_a_file_that_is_too_large_or_missing_is_rejected(tmp_path, monkeypatch):
    file = _write(tmp_path / "a.xml", imagescope([]))
    monkeypatch.setattr(module, "_MOST_BYTES", 20)
    with pytest.raises(ValueError, match=r"a.xml must have at most 20 bytes, got"):
        read_regions(file)
    for read in (read_regions, lambda path: polygon_mask(path, SIZE)):
        with pytest.raises(ValueError, match=r"gone.xml cannot be read"):
            read(tmp_path / "gone.xml")


def test_a_polygon_with_too_many_crossings_is_rejected(tmp_path, monkeypatch):
    zigzag = np.array([[column, 6 * (column % 2) + 1] for column in range(9)], float)
    file = _write(tmp_path / "a.xml", imagescope([zigzag]))
    monkeypatch.setattr(module, "_MOST_CROSSINGS", 30)
    with pytest.raises(
        ValueError, match=r"a.xml cannot be used: a polygon must cross .* at most 30 times, got 48"
    ):
        polygon_mask(file, SIZE)


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(module, "read_regions", lambda path: read.append(path) or read_regions(path))
    file = _write(tmp_path / "a.xml", imagescope([np.array([[0, 0], [3, 0], [3, 3]])]))
    first, second = polygon_mask(file, SIZE), polygon_mask(file, SIZE)
    assert np.array_equal(first, second)
    assert first.shape == (7, 9)
    assert read == [file]
    first[:] = True  # a caller's changes must not reach the cache
    assert np.array_equal(polygon_mask(file, SIZE), second)
    polygon_mask(file, (5, 5))
    assert len(read) == 2
    _write(file, imagescope([np.array([[1, 1], [2, 1], [2, 2]])]))
    os.utime(file, ns=(0, 0))  # the clock may be too coarse for a new modification time
    assert polygon_mask(file, SIZE).sum() == 3
    assert len(read) == 3


def _region(corners, kind="0", negative="0", layer=None):
    vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in corners)
    named = {"Type": kind, "NegativeROA": negative}
    attributes = " ".join(f'{name}="{value}"' for name, value in named.items() if value is not None)
    return f"<Region {attributes}><Vertices>{vertices}</Vertices></Region>"


def _layers(*layers):
    inside = "".join(f"<Annotation><Regions>{regions}</Regions></Annotation>" for regions in layers)
    return f"<Annotations>{inside}</Annotations>"


def _covered(path, text, size=SIZE):
    """Return rows and columns of the foreground of an annotation."""
    path.write_text(text, "utf-8")
    polygon_mask_of = np.argwhere(polygon_mask(path, size))
    path.unlink()
    return polygon_mask_of.tolist()


def test_x_and_y_of_1_are_the_first_pixel_as_in_the_challenge(tmp_path):
    # The corners of 3 by 2 pixels around the centres of columns 2 to 4 and rows 1 to 2, counted from 1.
    text = _layers(_region([(1.6, 0.6), (4.4, 0.6), (4.4, 2.4), (1.6, 2.4)]))
    assert _covered(tmp_path / "a.xml", text) == [[0, 1], [0, 2], [0, 3], [1, 1], [1, 2], [1, 3]]


def test_pixels_whose_centre_is_on_the_outline_count(tmp_path):
    text = _layers(_region([(10, 10), (49, 10), (49, 49), (10, 49)]))
    mask = np.argwhere(polygon_mask(_write(tmp_path / "a.xml", text), (100, 100)))
    assert len(mask) == 40 * 40
    assert mask.min(axis=0).tolist() == [9, 9]
    assert mask.max(axis=0).tolist() == [48, 48]


OUTER = [(1, 1), (6, 1), (6, 5), (1, 5)]  # 6 by 5 pixels
HOLE = [(3, 2), (4, 2), (4, 4), (3, 4)]  # 2 by 3 of them
RING = [[r, c] for r in range(5) for c in range(6) if not (1 <= r <= 3 and 2 <= c <= 3)]


@pytest.mark.parametrize("order", ["after", "before", "in a layer of its own", "in an earlier layer"])
def test_negative_areas_are_subtracted_wherever_they_stand(tmp_path, order):
    outer, hole = _region(OUTER), _region(HOLE, negative="1")
    layers = {
        "after": [outer + hole],
        "before": [hole + outer],
        "in a layer of its own": [outer, hole],
        "in an earlier layer": [hole, outer],
    }[order]
    assert _covered(tmp_path / "a.xml", _layers(*layers)) == RING


def test_negative_areas_alone_are_background(tmp_path):
    assert _covered(tmp_path / "a.xml", _layers(_region(HOLE, negative="1"))) == []


@pytest.mark.parametrize("kind", ["0", "1", None, ""])
def test_a_rectangle_of_four_vertices_is_its_polygon(tmp_path, kind):
    inside = [[r, c] for r in range(5) for c in range(6)]
    assert _covered(tmp_path / "a.xml", _layers(_region(OUTER, kind, negative=None))) == inside


def test_a_rectangle_of_two_vertices_is_drawn_between_them(tmp_path):
    inside = [[r, c] for r in range(1, 4) for c in range(2, 4)]
    for corners in ([(3, 2), (4, 4)], [(4, 4), (3, 2)], [(3, 4), (4, 2)]):
        assert _covered(tmp_path / "a.xml", _layers(_region(corners, "1"))) == inside


def test_an_ellipse_is_drawn_in_the_box_of_its_vertices(tmp_path):
    # Half axes 5 and 2 around column 5, row 2: |x| <= 5 * sqrt(1 - (y / 2)^2) is 4.33 beside the middle row.
    rows = {0: [5], 1: range(1, 10), 2: range(11), 3: range(1, 10), 4: [5]}
    expected = [[row, column] for row, columns in rows.items() for column in columns]
    two, four = [(1, 1), (11, 5)], [(1, 1), (11, 1), (11, 5), (1, 5)]
    for corners in (two, two[::-1], four):
        assert _covered(tmp_path / "a.xml", _layers(_region(corners, "2")), (20, 9)) == expected


def test_points_on_a_circle_belong_to_it(tmp_path):
    # x^2 + y^2 <= 25 has 81 whole solutions, 12 of them on the circle.
    assert len(_covered(tmp_path / "a.xml", _layers(_region([(1, 1), (11, 11)], "2")), (20, 20))) == 81


def test_an_ellipse_is_clipped_and_can_be_negative(tmp_path):
    ellipse = [(-5, -5), (3, 3)]  # the quarter of a circle of radius 4 around -2, -2
    assert _covered(tmp_path / "a.xml", _layers(_region(ellipse, "2"))) == [[0, 0], [0, 1], [1, 0]]
    both = _layers(_region(OUTER) + _region(ellipse, "2", "1"))
    assert len(_covered(tmp_path / "a.xml", both)) == 30 - 3
    assert _covered(tmp_path / "a.xml", _layers(_region([(30, 1), (40, 5)], "2"))) == []
    assert _covered(tmp_path / "a.xml", _layers(_region([(1, 2), (9, 2)], "2"))) == []


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (_region([(1, 1), (5, 5)], "3"), r"got Type 3 \(an arrow\) .* redraw region 1"),
        (_region([(1, 1), (5, 5)], "4"), r"got Type 4 \(a ruler\) .* redraw region 1"),
        (_region(OUTER, "5"), "got Type 5 .* redraw region 1"),
        (_region(OUTER, "Polygon"), "got Type Polygon .* redraw region 1"),
        (_region(OUTER, negative="2"), "with NegativeROA 2; .* redraw region 1"),
        (_region(OUTER, negative="true"), "with NegativeROA true; .* redraw region 1"),
        (_region(OUTER[:3], "2"), "an ellipse by two or four vertices, .* got 3 in region 1"),
        (_region(OUTER[:1], "2"), "an ellipse by two or four vertices, .* got 1 in region 1"),
    ],
    ids=["arrow", "ruler", "unknown", "named", "negative 2", "negative true", "three", "one"],
)
def test_a_region_that_is_no_area_is_rejected_by_name(tmp_path, region, message):
    with pytest.raises(ValueError, match=message) as raised:
        read_regions(_write(tmp_path / "a.xml", _layers(region)))
    assert str(tmp_path / "a.xml") in str(raised.value)
