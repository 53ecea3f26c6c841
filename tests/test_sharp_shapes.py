"""The Shapes detector on tiny images drawn in the test, with areas and overlaps worked out by hand."""

import numpy as np
import pytest

from posttrain.shapes import detect as module
from posttrain.shapes.detect import _explained, _reduced, detect

RED, GREEN, BLUE, YELLOW = (
    np.array(c) / 255 for c in ((214, 48, 49), (46, 160, 67), (38, 92, 214), (245, 196, 26))
)
GREY = np.array([0.9, 0.9, 0.9])


def canvas(side=64, width=None, grey=GREY):
    return np.broadcast_to(grey, (side, width or side, 3)).astype(np.float32).copy()


def seen(pixels):
    return detect(np.moveaxis(pixels, 2, 0))


def filled(pixels, x0, y0, x1, y1, color=RED):
    pixels[y0:y1, x0:x1] = color
    return pixels


def test_the_constants():
    assert (module.LEAST_AREA, module.TOLERANCE, module.FAINT, module.SEEN) == (16, 0.36, 0.2, 0.4)
    assert (module.MALFORMED, module.CLEAR, module.THRESHOLD) == (0.62, 0.88, 0.3)
    assert module.NAMES == ["red", "green", "blue", "yellow"]
    np.testing.assert_allclose(module.PALETTE, [RED, GREEN, BLUE, YELLOW], rtol=1e-6)


def test_squares_of_all_colours_are_found_with_their_boxes():
    pixels = canvas()
    for color, (x, y) in zip((RED, GREEN, BLUE, YELLOW), ((8, 8), (30, 8), (8, 36), (40, 40)), strict=True):
        filled(pixels, x, y, x + 12, y + 10, color)
    found = seen(pixels)
    assert list(found) == ["square"]
    assert [(d["color"], d["box"]) for d in found["square"]] == [
        ("red", [8, 8, 20, 18]), ("blue", [8, 36, 20, 46]), ("green", [30, 8, 42, 18]), ("yellow", [40, 40, 52, 50]),
    ]  # fmt: skip
    assert {d["score"] for d in found["square"]} == {1.0}
    assert all(type(v) is float for d in found["square"] for v in (*d["box"], d["score"]))


def test_the_best_come_first():
    pixels = filled(filled(canvas(), 8, 8, 28, 22), 8, 40, 28, 60, YELLOW)
    found = seen(pixels)["square"]
    assert [d["color"] for d in found] == ["yellow", "red"]
    assert found[1]["score"] == pytest.approx((14 / 20 / 0.8 - 0.62) / 0.26)


@pytest.mark.parametrize(("side", "least"), [(64, 16), (32, 4), (96, 36)])
def test_specks_smaller_than_16_pixels_of_64_x_64_are_noise(side, least):
    edge = int(least**0.5)
    pixels = filled(canvas(side), 8, 8, 8 + edge, 8 + edge)
    assert sum(map(len, seen(pixels).values())) == 1
    pixels[8, 8] = GREY
    assert not seen(pixels)


@pytest.mark.parametrize(("side", "times"), [(127, 1), (128, 2), (200, 3)])
def test_a_large_image_is_averaged_over_squares(side, times):
    pixels = filled(canvas(side, side + 1), 60, 60, 84, 84, BLUE)
    assert seen(pixels)["square"] == [{"box": [60, 60, 84, 84], "score": 1.0, "color": "blue"}]
    small, by = _reduced(pixels)
    assert (small.shape, by) == ((side // times, (side + 1) // times, 3), times)
    noisy = pixels + np.random.default_rng(0).normal(0, 0.01, pixels.shape)
    np.testing.assert_allclose(
        _reduced(noisy)[0][2, 3], noisy[2 * times : 3 * times, 3 * times : 4 * times].mean((0, 1))
    )


def test_the_area_is_counted_for_images_that_are_not_square():
    assert seen(filled(canvas(64, 32), 8, 8, 11, 11))  # 9 of at least 8
    assert not seen(filled(canvas(64, 48), 8, 8, 11, 11))  # 9 of at least 12


@pytest.mark.parametrize(("part", "found"), [(0.37, False), (0.43, True), (1.0, True)])
def test_what_has_less_than_two_fifths_of_a_colour_is_nothing(part, found):
    assert bool(seen(filled(canvas(), 20, 20, 40, 40, GREY + part * (RED - GREY)))) is found


def test_the_background_is_each_rows_own():
    pixels = canvas()
    pixels[:32] = (0.75, 0.85, 0.95)
    pixels[32:] = (0.95, 0.9, 0.8)
    filled(filled(pixels, 10, 10, 22, 22), 40, 44, 52, 56, BLUE)
    assert [d["color"] for d in seen(pixels)["square"]] == ["red", "blue"]


def test_a_faint_object_ends_where_it_has_half_of_its_own_colour():
    pixels = filled(canvas(), 18, 18, 42, 42, GREY + 0.25 * (RED - GREY))
    assert seen(filled(pixels.copy(), 20, 20, 40, 40, GREY + 0.6 * (RED - GREY)))["square"][0]["box"] == [
        20,
        20,
        40,
        40,
    ]
    assert seen(filled(pixels.copy(), 20, 20, 40, 40, GREY + 0.45 * (RED - GREY)))["square"][0]["box"] == [
        18,
        18,
        42,
        42,
    ]
    # a tenth of it decides how strong it is: 81 of 729 pixels do, 64 do not
    pixels = filled(canvas(), 10, 10, 37, 37, GREY + 0.35 * (RED - GREY))
    assert seen(filled(pixels.copy(), 19, 19, 28, 28))["square"][0]["box"] == [19, 19, 28, 28]
    assert not seen(filled(pixels.copy(), 19, 19, 27, 27))


def test_what_keeps_half_of_its_strongest_colour_may_fall_apart():
    pixels = filled(canvas(), 10, 20, 50, 30, GREY + 0.3 * (RED - GREY))
    filled(filled(pixels, 10, 20, 20, 30), 40, 20, 50, 30)
    assert [d["box"] for d in seen(pixels)["square"]] == [[10, 20, 20, 30], [40, 20, 50, 30]]


def test_the_background_is_the_upper_quartile_of_three_pixels_at_each_end():
    pixels = canvas(1, 9, np.zeros(3))
    pixels[0, :, 0] = [0.1, 0.5, 0.2, 0, 0, 0, 0.3, 0.6, 0.4]  # the middle is not asked: the rows' ends are
    coverage, _ = _explained(pixels)
    background = np.array([0.475, 0.0, 0.0])  # three quarters of the way from the first to the last of six
    toward = RED - background
    assert coverage[0, 7] == pytest.approx((0.6 - 0.475) * toward[0] / np.square(toward).sum(), abs=1e-5)


def test_a_shape_at_one_end_of_its_rows_does_not_darken_their_background():
    assert seen(filled(canvas(), 0, 20, 14, 34))["square"][0]["box"] == [0, 20, 14, 34]


def test_an_object_has_the_colour_of_most_of_it():
    pixels = filled(canvas(), 20, 20, 34, 34, BLUE)
    assert seen(filled(pixels, 20, 20, 25, 34))["square"] == [
        {"box": [20, 20, 34, 34], "score": 1.0, "color": "blue"}
    ]
    assert seen(filled(pixels, 20, 20, 28, 34))["square"][0]["color"] == "red"


def test_objects_that_touch_are_found_one_by_one():
    pixels = filled(filled(canvas(), 10, 10, 24, 24), 24, 10, 38, 24, BLUE)
    assert [(d["color"], d["box"]) for d in seen(pixels)["square"]] == [
        ("red", [10, 10, 24, 24]), ("blue", [24, 10, 38, 24]),
    ]  # fmt: skip


def on_the_way(color, part, off):
    """A pixel ``part`` of the way from the background to ``color`` and ``off`` beside it."""
    toward = color - GREY
    side = np.cross(toward, [1.0, 2.0, 3.0])
    return GREY + part * toward + off * side / np.linalg.norm(side)


@pytest.mark.parametrize("part", [0.3, 0.8])
@pytest.mark.parametrize(("index", "color"), enumerate((RED, GREEN, BLUE, YELLOW)))
def test_a_pixel_is_a_part_of_the_nearest_colour_if_it_is_near(part, index, color):
    pixels = canvas(3, 9)
    pixels[1, 4] = on_the_way(color, part, 0.02)
    coverage, found = _explained(pixels)
    assert coverage.shape == found.shape == (3, 9)
    assert found[1, 4] == index
    assert coverage[1, 4] == pytest.approx(part, abs=1e-5)


def distance_to(color, pixel):
    """From ``pixel`` to the line from the background to ``color``."""
    toward, away = color - GREY, pixel - GREY
    return np.linalg.norm(away - np.clip(away @ toward / (toward @ toward), 0, 1) * toward)


@pytest.mark.parametrize(("off", "found"), [(0.35, True), (0.37, False)])
def test_a_pixel_too_far_from_every_colour_is_none(off, found):
    pixels, toward = canvas(1, 9), RED - GREY
    side = np.ones(3) - toward.sum() * toward / (toward @ toward)
    side /= np.linalg.norm(side) * (-1 if side @ (GREEN - GREY) > 0 else 1)
    pixels[0, 4] = GREY + toward + off * side
    distances = [distance_to(color, pixels[0, 4]) for color in (RED, GREEN, BLUE, YELLOW)]
    assert np.argmin(distances) == 0
    assert distances[0] == pytest.approx(off, abs=1e-6)
    assert _explained(pixels)[1][0, 4] == (0 if found else -1)


def test_a_part_lies_between_0_and_1():
    pixels = canvas(1, 9)
    pixels[0, 3], pixels[0, 5] = GREY + 1.05 * (RED - GREY), GREY - 0.05 * (RED - GREY)
    coverage, color = _explained(pixels)
    assert coverage[0, 3] == 1.0
    assert (coverage >= 0).all()
    assert (color[0, 3:6] >= 0).all()


def test_a_background_that_is_a_colour_itself_divides_by_nothing():
    with np.errstate(all="raise"):
        coverage, _ = _explained(canvas(2, 8, RED.astype(np.float32)))
    assert np.isfinite(coverage).all()


def test_a_triangle_is_found_as_one_and_what_is_no_shape_is_not():
    pixels = canvas()
    for i in range(18):
        filled(pixels, 29 - i // 2, 20 + i, 31 + i // 2, 21 + i, GREEN)
    assert [(kind, d[0]["color"]) for kind, d in seen(pixels).items()] == [("triangle", "green")]
    assert not seen(filled(canvas(), 10, 10, 50, 14)), "a bar"


def test_limits_themselves_do_not_count(monkeypatch):
    half = filled(canvas(grey=np.zeros(3)), 20, 20, 40, 40, module.PALETTE[0] / 2)
    assert seen(half)
    monkeypatch.setattr(module, "SEEN", 0.5)
    assert not seen(half), "exactly as strong as it has to be"
    bright = canvas(1, 9, np.ones(3))
    bright[0, 4, 2] = 1.25  # away from every colour, so 0.25 from all ways to one
    monkeypatch.setattr(module, "TOLERANCE", 0.25)
    assert _explained(bright)[1][0, 4] == -1
    pixels = filled(canvas(), 8, 8, 28, 22)
    monkeypatch.setattr(module, "THRESHOLD", seen(pixels)["square"][0]["score"])
    assert not seen(pixels)
