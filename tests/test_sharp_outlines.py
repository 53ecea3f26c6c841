"""A component's pixels, its class and its score in the Shapes detector, pixel by pixel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from posttrain.shapes.detect import classified, components


@settings(deadline=None, max_examples=60)
@given(arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 6))))
def test_components_are_those_of_a_flood_by_hand(mask):
    height, width = mask.shape
    label = np.where(mask, np.arange(mask.size).reshape(mask.shape), -1)
    for _ in range(mask.size):  # the least number spreads
        for y in range(height):
            for x in range(width):
                for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                    if 0 <= near[0] < height and 0 <= near[1] < width and mask[y, x] and mask[near]:
                        label[y, x] = min(label[y, x], label[near])
    expected = {
        frozenset(zip(*map(np.ndarray.tolist, np.nonzero(label == i)), strict=True))
        for i in set(label[mask].tolist())
    }
    found = [list(zip(y.tolist(), x.tolist(), strict=True)) for y, x in components(mask)]
    assert sum(map(len, found)) == mask.sum(), "each pixel once"
    assert set(map(frozenset, found)) == expected


def drawn(rows):
    return np.nonzero(np.array([[c == "#" for c in row] for row in rows]))


def test_a_full_rectangle_is_a_square_less_so_the_longer_it_is():
    assert classified(*np.nonzero(np.ones((10, 10)))) == ("square", 1.0)
    assert classified(*np.nonzero(np.ones((8, 10)))) == ("square", 1.0)
    for shape in ((7, 10), (10, 7)):
        assert classified(*np.nonzero(np.ones(shape))) == ("square", pytest.approx((0.7 / 0.8 - 0.62) / 0.26))
    assert classified(*np.nonzero(np.ones((3, 10))))[1] == 0.0


def test_the_score_rises_with_the_overlap():
    mask = np.ones((10, 10))
    mask[3:6, 3:9] = 0  # 18 of 100 are missing
    assert classified(*np.nonzero(mask)) == ("square", pytest.approx((0.82 - 0.62) / 0.26))
    y, x = np.nonzero(mask)
    assert classified(y + 7, x + 30)[1] == pytest.approx((0.82 - 0.62) / 0.26), "wherever it is"


def test_the_outlines_of_circle_and_triangle_are_closed_forms():
    for side in (4, 7, 10, 16):
        middles = [(i + 0.5) / side for i in range(side)]
        circle = [["#" if (u - 0.5) ** 2 + (v - 0.5) ** 2 <= 0.25 else " " for u in middles] for v in middles]
        triangle = [["#" if abs(u - 0.5) <= v / 2 else " " for u in middles] for v in middles]
        if side > 4:
            assert classified(*drawn(circle)) == ("circle", 1.0)
        assert classified(*drawn(triangle))[0] == "triangle"
        assert (
            classified(*drawn(triangle[::-1]))[0] != "triangle" or classified(*drawn(triangle[::-1]))[1] == 0
        )


def test_small_outlines_pixel_by_pixel():
    assert classified(*drawn([" ## ", "####", "####", " ## "])) == ("circle", 1.0)
    assert classified(*drawn(["  #  ", "  #  ", " ### ", "#####"])) == ("triangle", pytest.approx(1.0))


@pytest.mark.parametrize(
    "rows",
    [
        [".#......", "#......."],
        ["#.#", "...", "#.."],
        [".#.", "...", "#.."],
        [".#.", "...", "..#"],
        ["#..", "...", "..#"],
    ],
)
def test_the_first_pixels_are_no_neighbours_of_the_borders(rows):
    mask = np.array([[c == "#" for c in row] for row in rows])
    assert [len(y) for y, _ in components(mask)] == [1] * mask.sum()


@pytest.mark.parametrize(
    ("kind", "side"), [*(("circle", n) for n in range(9, 24)), *(("triangle", n) for n in range(9, 24, 2))]
)
def test_the_overlap_is_counted_pixel_by_pixel(kind, side):
    height = side - 1 if kind == "triangle" else side
    mask, area = np.zeros((height, side), bool), 0
    for j in range(height):
        for i in range(side):
            u, v = (i + 0.5) / side, (j + 0.5) / height
            inside = abs(u - 0.5) <= v / 2 if kind == "triangle" else (u - 0.5) ** 2 + (v - 0.5) ** 2 <= 0.25
            hole = 0 < i < side - 1 and 0 < j < height - 1 and (i + 2 * j) % 4 == 0
            mask[j, i], area = inside and not hole, area + inside
    got, score = classified(*np.nonzero(mask))
    assert got == kind
    assert 0 < score < 1
    assert score == pytest.approx((mask.sum() / area - 0.62) / 0.26)


def test_a_pixel_on_the_edge_of_a_triangle_is_inside():
    assert classified(*drawn([" ## ", "####"])) == ("triangle", pytest.approx((0.5 / 0.8 - 0.62) / 0.26))
