"""Curves and their axes, as SVG."""

import json
import math

import pytest
from html_page import checked, parsed
from hypothesis import given
from hypothesis import strategies as st
from report_runs import evaluated_run

from posttrain.evaluation.report.axes import Axes, labels, ticks
from posttrain.evaluation.report.charts import curves
from posttrain.evaluation.report.curves import chart, histogram, line_style, smoothed, thinned
from posttrain.evaluation.report.page import write_report
from posttrain.evaluation.report.results import StageResult


@pytest.fixture
def run(tmp_path):
    return evaluated_run(tmp_path)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_and_span_the_range(low, width):
    marks = ticks(low, low + width)
    assert 2 <= len(marks) <= 8
    assert marks[0] <= low + 1e-6 * width
    assert marks[-1] > low + width / 2


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 1e308), st.booleans())
def test_ticks_and_their_labels_differ_however_close_the_values_are(low, width, whole):
    marks = ticks(low, min(low + width, 1.7e308), whole=whole)
    assert 2 <= len(marks) <= 8
    assert marks == sorted(set(marks))
    assert len(set(labels(marks))) == len(marks)
    assert all(math.isfinite(float(label)) for label in labels(marks))


@pytest.mark.parametrize(
    ("marks", "texts"),
    [
        ([0, 0.25, 0.5], ["0", "0.25", "0.50"]), ([0, 50, 100], ["0", "50", "100"]), ([1e-4, 2e-4], ["1e-4", "2e-4"]),
        ([1.5e6, 2e6], ["1.5e6", "2.0e6"]), ([-2, 0, 2], ["-2", "0", "2"]), ([0], ["0"]),
    ],
)  # fmt: skip
def test_labels_have_no_more_digits_than_tell_them_apart(marks, texts):
    assert labels(marks) == texts


def test_steps_are_whole_numbers():
    assert ticks(1, 3, whole=True) == [1, 2, 3]
    assert ticks(5, 5, whole=True) == [4, 6, 8, 10]
    assert ticks(1, 2, whole=True) == [1, 2]


def test_a_curve_of_one_point_and_of_none():
    assert "circle" in chart("loss", {"a": [(1, 2.0)]})
    assert chart("loss", {"a": [(1, float("nan"))]}) == ""
    assert smoothed([(1, 2.0), (2, 4.0)]) == [(1, 3.0), (2, 3.0)]


def test_curves_that_matter_come_first_and_the_others_are_folded(run):
    rows = ({"step": s, "time": 0.0, "grad_norm": 1.0, "loss": 1.0, "reward": 2.0, "reward/shapes": 1.0,
             "heldout/shapes": 0.5, "bins": {"low": 0.0, "high": 1.0, "counts": [1, 2]}, "kl": 0.1} for s in (1, 2))  # fmt: skip
    (run / "soar" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = checked(write_report(run).read_text("utf-8")).one(id="curves")
    names = {folded: [s.one("text", class_="title").text for s in section.all("svg", role="img") if s.inside("details") is folded] for folded in (False, True)}  # fmt: skip
    assert names[False] == ["reward", "heldout/shapes", "loss", "kl"]
    assert names[True] == ["reward/shapes", "bins, soar, last batch recorded", "grad_norm"]
    assert section.one("summary").text == "3 more curves"


def test_a_stage_keeps_its_line_in_every_chart():
    stages = [
        StageResult(f"s{i}", "sft", "base", metrics=[{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}])
        for i in range(9)
    ]
    stages[0].metrics = []
    ((svg,), _) = curves(stages)
    legend = parsed(svg).one("svg").all("line", stroke_width="3") or [
        e for e in parsed(svg).all("line") if e.attrs.get("stroke-width") == "3"
    ]
    drawn = [(e.attrs["stroke"], e.attrs.get("stroke-dasharray")) for e in legend]
    assert len(set(drawn)) == len(drawn) == 8
    assert line_style(7) == 'stroke="#d9622b" stroke-dasharray="7 3"'
    assert len({line_style(i) for i in range(18)}) == 18


def test_a_long_legend_stays_inside_the_drawing():
    names = [f"a-run-with-a-long-name/stage-{i}" for i in range(7)] + ["x" * 200]
    svg = parsed(chart("loss", {name: [(1, 1.0), (2, 3.0)] for name in names})).one("svg")
    _, _, width, height = map(float, svg.attrs["viewbox"].split())
    for text in svg.all("text", class_="tick"):
        if text.attrs.get("text-anchor") is None:
            shown = "".join(c for c in text.content if isinstance(c, str))
            assert float(text.attrs["x"]) + 6 * len(shown) <= width
            assert float(text.attrs["y"]) < height
    assert [t.text for t in svg.all("title")] == names, "the whole name is there"


def test_a_very_long_curve_is_drawn_with_few_points_that_keep_its_spikes():
    points = [(i, 0.0) for i in range(30_000)]
    points[12_345] = (12_345, 9.0)
    assert len(thinned(points)) <= 240
    assert (12_345, 9.0) in thinned(points)
    assert thinned(points) == sorted(thinned(points))
    means = smoothed(points)
    assert len(means) <= 242
    assert (means[0][0], means[-1][0]) == (0, 29_999)
    assert thinned(points[:200]) == points[:200]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=64), min_size=1, max_size=40))
def test_any_numbers_are_drawn_within_the_chart(values):
    text = str(chart("x", {"a": list(enumerate(values))}))
    assert "nan" not in text
    assert "inf" not in text
    for line in parsed(text).all("polyline"):
        for point in line.attrs["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 420
            assert 0 <= y <= 220


def test_a_histogram_has_a_bar_for_each_bin_and_labels_that_differ():
    svg = parsed(histogram("h", 0.12345, 0.12349, [0, 2, 1])).one("svg")
    assert len(svg.all("rect")) == 3
    low, high, most = (t.text for t in svg.all("text", class_="tick"))
    assert (low != high, most) == (True, "2")


def test_the_labels_of_an_axis_have_room():
    axes = Axes.around([(0, 1.2345678e-7), (1, 1.2345699e-7)], 420, 220, 38)
    assert axes.left > 6 * max(len(t) for t in ("1.23457e-7",))
