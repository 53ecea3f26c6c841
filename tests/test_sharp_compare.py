"""Evaluations are compared on what all have, and every cell of table and page is worked out by hand."""

import base64
import io
import json

import pytest
from rich.console import Console

from posttrain.errors import PosttrainError
from posttrain.evaluation.compare import Comparison, Evaluated, compare_table, worded, write_page
from posttrain.evaluation.intervals import paired_difference

CARD = {
    "scores": {"s": {"higher_is_better": True}, "low": {"higher_is_better": False}},
    "grid_prompts": ["q", "p"],
}


def records(*rows):
    """Rows (prompt, index, score, further fields)."""
    return {
        (p, i): {"prompt": p, "index": i, "scores": {"s": v, "low": -v, "s/part": 0}, **more}
        for p, i, v, more in rows
    }


def evaluated(name, folder, *values, **more):
    keys = [("p", 0), ("p", 1), ("q", 0), ("q", 1)]
    rows = [(*key, value, more) for key, value in zip(keys, values, strict=True)]
    return Evaluated(name, folder, json.loads(json.dumps(CARD)), records(*rows))


@pytest.fixture
def pair(tmp_path):
    a, b = (
        evaluated("a", tmp_path / "a", 1.0, 1.0, 3.0, 3.0),
        evaluated("b", tmp_path / "b", 2.0, 2.0, 7.0, 7.0),
    )
    return Comparison([a, b], list(a.records), ["beware"])


def test_means_and_paired_differences_are_over_the_shared_samples(pair):
    a, b = pair.evaluations
    assert (pair.mean(a, "s"), pair.mean(b, "s"), pair.mean(b, "low")) == (2.0, 4.5, -4.5)
    assert pair.difference(b, "s") == (2.5, 1.0, 4.0), "prompts are drawn, not images"
    assert pair.difference(b, "low") == (-2.5, -4.0, -1.0)
    fewer = Comparison(pair.evaluations, [("q", 1), ("p", 0)], [])
    assert fewer.values(a, "s") == [3.0, 1.0]
    assert fewer.difference(b, "s") == paired_difference([3, 1], [7, 2], groups=["q", "p"])


def test_scores_are_those_of_all_in_the_firsts_order(pair):
    a, b = pair.evaluations
    a.card["scores"] = {"z": {}, "s": {}, "low": {}}
    b.card["scores"] = {"low": {}, "s": {}, "more": {}}
    assert pair.scores == ["s", "low"]


def test_a_score_where_lower_is_better_says_so(pair):
    assert (pair.heading("s"), pair.heading("low")) == ("s", "low (lower is better)")


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        ((0.05, 0.01, 0.09), "+0.050 [+0.010, +0.090]"), ((-0.5, -0.75, -0.25), "-0.500 [-0.750, -0.250]"),
        ((0.5, 0.0, 1.0), "+0.500 [+0.000, +1.000] not significant"),
        ((-0.5, -1.0, 0.0), "-0.500 [-1.000, +0.000] not significant"),
        ((0.5, -1.0, 2.0), "+0.500 [-1.000, +2.000] not significant"),
    ],
)  # fmt: skip
def test_a_difference_in_words(difference, text):
    assert worded(difference) == text


def test_an_image_is_the_kept_one_or_the_grids(tmp_path):
    one = evaluated("a", tmp_path, 1.0, 1.0, 1.0, 1.0)
    assert one.image(("q", 0)) == tmp_path / "grid" / "000.png"
    assert one.image(("p", 0)) == tmp_path / "grid" / "001.png"
    assert one.image(("p", 1)) is None
    one.card["grid_prompts"] = ["q"]
    assert one.image(("p", 0)) is None
    del one.card["grid_prompts"]
    assert one.image(("q", 0)) is None
    assert (
        evaluated("a", tmp_path, 1, 1, 1, 1, image="images/7.jpg").image(("p", 1))
        == tmp_path / "images" / "7.jpg"
    )


def test_images_of_a_prompt_are_drawn_together(tmp_path):
    keys = [(p, i) for p in "pqr" for i in range(3)]
    one, two = (
        [(*key, v, {}) for key, v in zip(keys, vs, strict=True)]
        for vs in ([0.0] * 9, [1.0, 1, 1, 2, 2, 2, 6, 6, 6])
    )
    pair = Comparison(
        [Evaluated(n, tmp_path, CARD, records(*rows)) for n, rows in (("a", one), ("b", two))], keys, []
    )
    assert pair.difference(pair.evaluations[1], "s") == (3.0, 1.0, 6.0)


def test_the_direction_is_the_first_evaluations(pair):
    pair.evaluations[1].card["scores"]["s"]["higher_is_better"] = False
    assert pair.heading("s") == "s"


def test_the_table_has_a_row_for_each_score_and_model(pair):
    pair.evaluations[0].records["p", 0]["scores"]["low"] = -50.0
    table = compare_table(pair)
    assert table.title == "4 shared samples, against a"
    assert (table.title_justify, table.title_style, table.box, table.pad_edge) == ("left", "dim", None, False)
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    assert [c.header for c in table.columns] == ["score", "model", "mean", "difference [95 %]"]
    assert columns[:3] == [
        ["s", "", "low (lower is better)", ""],
        ["a", "b"] * 2,
        ["2.000", "4.500", "-14.250", "-4.500"],
    ]
    low = worded(pair.difference(pair.evaluations[1], "low"))
    assert low.endswith("not significant")
    assert columns[3] == ["", "+2.500 [+1.000, +4.000]", "", low]
    styles = [bool(cell.spans) for cell in table.columns[3].cells]
    assert styles == [False, False, False, True], "what is not significant is dim"
    assert [(c.justify, c.overflow, c.no_wrap) for c in table.columns] == [
        ("left", "fold", False), ("left", "fold", False), ("right", "ellipsis", True), ("left", "ellipsis", True)
    ]  # fmt: skip
    text = io.StringIO()
    Console(file=text, width=90).print(table)
    assert "+2.500 [+1.000, +4.000]" in text.getvalue()


def test_the_page_shows_those_with_most_images_first(pair, tmp_path):
    a, b = pair.evaluations
    for one in (a, b):
        one.card["grid_prompts"] = ["q"]
        (one.folder / "grid").mkdir(parents=True)
    (a.folder / "grid" / "000.png").write_bytes(b"first")
    a.records["p", 1]["image"] = "7.jpg"
    (a.folder / "7.jpg").write_bytes(b"kept")
    write_page(pair, tmp_path / "deep" / "er" / "c.html", 2)
    page = (tmp_path / "deep" / "er" / "c.html").read_text()
    png, jpeg = (
        f"data:image/{kind};base64,{base64.b64encode(d).decode()}"
        for kind, d in (("png", b"first"), ("jpeg", b"kept"))
    )
    assert page.index(png) < page.index(jpeg), "two evaluations have an image of q, one of p"
    assert page.count("<img") == 2, "what is not on disk is a dash"
    assert "s 3.000, low -3.000<" in page, "details are left out"
    assert "<td>s</td><td>2.000</td><td>4.500<small>+2.500 [+1.000, +4.000]</small></td>" in page
    assert '<p class="warn">beware</p>' in page
    assert ">4 samples of" in page
    assert "<h1>a · b</h1>" in page
    assert "image 1<" in page
    write_page(pair, tmp_path / "deep" / "er" / "c.html", 9)
    assert (tmp_path / "deep" / "er" / "c.html").read_text().count("<tr><td>") == 2 + 2, (
        "only rows with an image"
    )
    write_page(pair, tmp_path / "deep" / "er" / "c.html", 1)
    assert jpeg not in (tmp_path / "deep" / "er" / "c.html").read_text()


def test_names_on_the_page_are_escaped(pair, tmp_path):
    pair.remarks[0] = "<script>"
    write_page(pair, tmp_path / "c.html", 0)
    assert "&lt;script&gt;" in (tmp_path / "c.html").read_text()
    assert "<table class" not in (tmp_path / "c.html").read_text()


def test_a_page_that_cannot_be_written_is_told(pair, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PosttrainError, match=r"cannot write '.*c\.html': "):
        write_page(pair, tmp_path / "file" / "c.html", 1)
