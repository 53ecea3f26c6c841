"""A component's pixels, its class, its fit and the objects in it, pixel by pixel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from posttrain.shapes import outlines as module
from posttrain.shapes.outlines import _cut, _overlap, classified, components, pieces


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


def test_the_constants():
    assert (module.TILTS, module.STRETCH, module.BETTER, module.SHAPE) == ((-0.2, 0.0, 0.2), 0.8, 0.05, 0.75)


def test_a_full_rectangle_is_a_square_less_so_the_longer_it_is():
    assert classified(*np.nonzero(np.ones((10, 10)))) == ("square", 1.0)
    assert classified(*np.nonzero(np.ones((8, 10)))) == ("square", pytest.approx(1.0))
    for shape in ((7, 10), (10, 7)):
        assert classified(*np.nonzero(np.ones(shape))) == ("square", pytest.approx(0.7 / 0.8))
    assert classified(*np.nonzero(np.ones((3, 10))))[1] < 0.4


def inside(kind, area, dy, dx):
    """Whether a point at this offset from the middle of an outline of that area is inside."""
    if kind == "circle":
        return dy * dy + dx * dx <= area / np.pi
    if kind == "square":
        return max(abs(dy), abs(dx)) <= area**0.5 / 2
    side = (4 * area / 3**0.5) ** 0.5
    height = side * 3**0.5 / 2
    return -2 / 3 * height <= dy <= height / 3 and abs(dx) <= (dy + 2 / 3 * height) / height * side / 2


def fits_by_hand(mask):
    """The fit of each kind, pixel by pixel."""
    at = [(float(y), float(x)) for y, x in zip(*np.nonzero(mask), strict=True)]
    n = len(at)
    my, mx = (sum(p[i] for p in at) / n for i in (0, 1))
    vy, vx = (sum((p[i] - m) ** 2 for p in at) / n + 1 / 12 for i, m in ((0, my), (1, mx)))
    ratio = (vx / vy) ** 0.5
    fits = {}
    for kind in ("circle", "square", "triangle"):
        for tilt in (-0.2, 0.0, 0.2):
            both = 0
            for y, x in at:
                v, u = (y - my) * ratio**0.5, (x - mx) / ratio**0.5
                v, u = np.cos(tilt) * v - np.sin(tilt) * u, np.sin(tilt) * v + np.cos(tilt) * u
                both += inside(kind, n, v, u)
            fit = both / (2 * n - both) * min(1, min(ratio, 1 / ratio) / 0.8)
            fits[kind] = max(fit, fits.get(kind, 0))
    return fits


@settings(deadline=None, max_examples=60)
@given(
    arrays(
        bool,
        st.tuples(st.integers(5, 12), st.integers(5, 12)),
        elements=st.sampled_from([True, True, True, False]),
    )
)
def test_the_best_fit_is_the_one_worked_out_pixel_by_pixel(mask):
    if not mask.any():
        return
    kind, fit = classified(*np.nonzero(mask))
    fits = fits_by_hand(mask)
    assert fit == pytest.approx(max(fits.values()))
    assert fits[kind] == pytest.approx(fit)


@pytest.mark.parametrize("tilt", [-0.3, -0.2, 0.0, 0.2, 0.3])
@pytest.mark.parametrize("kind", ["circle", "square", "triangle"])
def test_an_outline_is_itself_upright_and_tilted_a_little(kind, tilt):
    v, u = np.mgrid[-12:13, -12:13].astype(float)
    v, u = np.cos(tilt) * v - np.sin(tilt) * u, np.sin(tilt) * v + np.cos(tilt) * u
    mask = np.vectorize(lambda y, x: inside(kind, 200, y, x))(v, u)
    y, x = np.nonzero(mask)
    got, fit = classified(y, x)
    assert got == kind
    assert fit > 0.85
    assert classified(y + 7, x + 30) == (got, pytest.approx(fit)), "wherever it is"


def objects(rows, least=4):
    """The kind, colour and number of pixels of each object in rows of letters, one letter a colour."""
    letters = np.array([list(row.ljust(24, ".")) for row in rows])
    y, x = np.nonzero(letters != ".")
    color = np.array([ord(c) for c in letters[y, x]])
    found = pieces(y, x, color, least)
    return sorted((p.kind, "".join(sorted(set(letters[p.y, p.x]))), len(p.y)) for p in found)


SQUARE = ["rrrrrrrr"] * 8


def test_a_shape_of_two_colours_is_one_object():
    assert objects(["rrrrrbbb"] * 8) == [("square", "br", 64)]


def test_shapes_of_two_colours_that_touch_are_two_objects():
    assert objects([row + "b" * 8 for row in SQUARE]) == [("square", "b", 64), ("square", "r", 64)]
    assert objects([row + "bb" for row in SQUARE]) == [("square", "br", 80)], "a strip is a part of it"


def test_shapes_of_one_colour_that_touch_are_cut_at_the_narrow_place():
    rows = [row + "." * 8 for row in SQUARE[:5]] + ["r" * 16] * 3 + ["." * 8 + row for row in SQUARE[:5]]
    assert objects(rows) == [("square", "r", 64), ("square", "r", 64)]
    three = rows[:-3] + [row + "b" * 8 for row in rows[-3:]] + ["." * 16 + "b" * 8] * 5
    assert objects(three) == [("square", "b", 64), ("square", "r", 64), ("square", "r", 64)]


def test_what_does_not_fall_into_shapes_stays_whole():
    assert objects(["r" * 24] * 4) == [("square", "r", 96)], "a bar"
    u = ["rrr...rrr"] * 9 + ["rrrrrrrrr"] * 3
    assert len(objects(u)) == 1


def test_specks_of_another_colour_are_no_objects():
    rows = [row + "b" * 8 for row in SQUARE]
    rows[0] = rows[0][:-2] + "gg"
    assert objects(rows, least=4) == [("square", "b", 62), ("square", "r", 64)]
    assert ("square", "g", 2) not in objects(rows, least=3)


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


def lettered(rows, least):
    letters = np.array([list(row) for row in rows])
    y, x = np.nonzero(letters != ".")
    return [len(p.y) for p in pieces(y, x, np.array([ord(c) for c in letters[y, x]]), least)]


BRIDGE = ["rrr...rrr", "rrrrrrrrr", "rrr...rrr"]  # 21 pixels: 11 and 10


@pytest.mark.parametrize(
    ("rows", "least", "fits", "sizes"),
    [
        (["rrrrbbb"], 1, {7: 0.5, 4: 0.6, 3: 0.4}, [7]),
        (["rrrrbbb"], 1, {7: 0.5, 4: 0.6, 3: 0.6}, [7]),  # better, not by a quarter
        (["rrrrbbb"], 1, {7: 0.5, 4: 0.75, 3: 0.75}, [7]),  # by exactly a quarter
        (["rrrrbbb"], 1, {7: 0.5, 4: 0.8, 3: 0.75}, [3, 4]),
        (["rrrrbbb"], 1, {7: 0.25, 4: 0.9, 3: 0.3}, [3, 4]),  # parts by colour may fit badly
        (["rrrrbbb"], 3, {7: 0.25, 4: 0.6, 3: 0.9}, [3, 4]),
        (["rrrrbbb"], 4, {7: 0.25, 4: 0.9, 3: 0.9}, [4]),
        (["rrrrbbb"], 4, {7: 0.25, 4: 0.5, 3: 0.9}, [7]),  # what is no object fits nothing
        (BRIDGE, 1, {21: 0.25, 11: 0.9, 10: 0.75}, [21]),  # parts that are cut off have to be shapes
        (BRIDGE, 1, {21: 0.25, 11: 0.9, 10: 0.76}, [10, 11]),
        (["rg" * 6], 1, {12: 0.5, 1: 1.0}, [1] * 12),
        (["rg" * 6 + "r"], 1, {13: 0.5, 1: 1.0}, [13]),
    ],
)
def test_parts_are_objects_where_they_fit_better_by_enough(monkeypatch, rows, least, fits, sizes):
    monkeypatch.setattr(module, "BETTER", 0.25)
    monkeypatch.setattr(module, "classified", lambda y, x: ("square", fits[len(y)]))
    assert sorted(lettered(rows, least)) == sizes


def test_the_pieces_keep_their_rows_and_columns_apart():
    rows = ["." * (7 - i) + "r" * (2 * i + 2) + "." * (7 - i) for i in range(8) for _ in (0, 1)][:14]
    assert [kind for kind, _, _ in objects(rows)] == ["triangle"]


def cut_by_hand(y, x, least):
    core = set(zip(y.tolist(), x.tolist(), strict=True))
    while core:
        core = {(v, u) for v, u in core if {(v + 1, u), (v - 1, u), (v, u + 1), (v, u - 1)} <= core}
        mask = np.zeros((y.max() + 2, x.max() + 2), bool)
        for p in core:
            mask[p] = True
        cores = [list(zip(*c, strict=True)) for c in components(mask) if 4 * len(c[0]) >= least]
        if len(cores) > 1:
            away = [
                [min((v - b) ** 2 + (u - a) ** 2 for b, a in c) for c in cores]
                for v, u in zip(y, x, strict=True)
            ]
            part = [row.index(min(row)) for row in away]
            return [[i for i, p in enumerate(part) if p == k] for k in range(len(cores))]
    return []


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 20),
    st.lists(st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(3, 7)] * 2), min_size=2, max_size=4),
)
def test_an_object_is_cut_where_it_is_narrowest_as_by_hand(least, blocks):
    mask = np.zeros((20, 20), bool)
    for y, x, h, w in blocks:
        mask[y : y + h, x : x + w] = True
    y, x = max(components(mask), key=lambda part: len(part[0]))
    order = np.lexsort((x, y))
    y, x = y[order], x[order]
    assert [part.tolist() for part in _cut(y, x, least)] == cut_by_hand(y, x, least)


def test_a_pixel_on_the_edge_of_a_square_is_inside():
    cross = np.array([0.0, 0.0, 1.0, -1.0]), np.array([1.0, -1.0, 0.0, 0.0])
    assert _overlap("square", *cross) == 1.0  # four pixels, and half a side of 1


def test_a_core_needs_a_quarter_of_the_least_area():
    y, x = np.nonzero(np.array([[c == "r" for c in row] for row in BRIDGE]))
    assert len(_cut(y, x, 8)) == 2
    assert _cut(y, x, 8.01) == []  # the cores have two pixels
