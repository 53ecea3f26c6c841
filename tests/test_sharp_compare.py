"""Evaluations are compared on what all have, and every cell of table and page is worked out by hand."""

import base64
import io
import json
import math

import pytest
from html_page import checked, rows_of
from PIL import Image
from rich.console import Console

from posttrain.errors import PosttrainError
from posttrain.evaluation.compare import Comparison, Evaluated, compare_table, worded
from posttrain.evaluation.compare_page import write_page
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
        ((0.5, -math.inf, math.inf), "+0.500 [of one sample] not significant"),
        ((2e-5, -math.inf, math.inf), "+0.000020 [of one sample] not significant"),
        ((2e-4, 1e-4, 3e-4), "+0.00020 [+0.00010, +0.00030]"), ((2e-4, 2e-4, 2e-4), "+0.00020 [+0.00020, +0.00020]"),
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
    assert str(table.title) == "4 shared samples, against a"
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


def drawn(file, color):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), color).save(file)
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def test_the_page_has_the_scores_and_those_images_that_there_are(pair, tmp_path):
    a, b = pair.evaluations
    for one in (a, b):
        one.card["grid_prompts"] = ["q"]
    first = drawn(a.folder / "grid" / "000.png", "red")
    a.records["p", 1]["image"] = "7.png"
    kept = drawn(a.folder / "7.png", "blue")
    target = tmp_path / "deep" / "er" / "c.html"
    write_page(pair, target, 2)
    page = checked(target.read_text("utf-8"))
    assert page.one("h1").text == "a · b"
    assert page.one("p", class_="lead").text == "4 samples of the same prompts and noise, against a."
    assert page.one("p", class_="warn").text == "Beware: beware"
    assert sorted(i.attrs["src"] for i in page.all("img")) == sorted([first, kept])
    assert len(page.all("p", class_="none")) == 2, "b has kept no image"
    shown = rows_of(page.one(id="results").all("table")[0])
    assert list(shown["a"]) == ["s", "low (lower is better)"], "s/part is a detail, which b's card lacks"
    assert [shown[name]["s"].one("span", class_="value").text for name in "ab"] == ["2.000", "4.500"]
    assert shown["b"]["s"].one("small", class_="better").text == "+2.500 (+1.000 to +4.000) better"
    assert shown["b"]["low (lower is better)"].text == "-4.500 -2.500 (-4.000 to -1.000) better"
    assert [bool(shown[name]["s"].all("span", class_="best")) for name in "ab"] == [False, True]
    assert [f.text for f in page.one(id="g").all("figcaption")][:2] == [
        "a s 3.000 low -3.000",
        "b s 7.000 low -7.000",
    ]
    assert [e.text for e in page.all("span", class_="change")] == ["+4.000", "+1.000"], "most gained first"
    write_page(pair, target, 1)
    assert len(checked(target.read_text("utf-8")).one(id="g").all("article")) == 1
    assert kept not in target.read_text("utf-8"), "q changed most"


def test_the_page_of_other_noise_does_not_say_that_it_is_the_same(pair, tmp_path):
    a, b = pair.evaluations
    drawn(a.folder / "grid" / "000.png", "red")
    a.card["sampler"], b.card["sampler"] = {"seed": 0}, {"seed": 1}
    write_page(pair, tmp_path / "c.html", 1)
    page = checked((tmp_path / "c.html").read_text("utf-8"))
    assert page.one("p", class_="lead").text == "4 samples of the same prompts, against a."
    assert page.one(id="g").one("h3").text == "Same prompt"


def test_names_on_the_page_are_escaped(pair, tmp_path):
    pair.remarks[0] = "<script>"
    write_page(pair, tmp_path / "c.html", 0)
    page = checked((tmp_path / "c.html").read_text("utf-8"))
    assert page.one("p", class_="warn").text == "Beware: <script>"
    assert not page.all("img")


def test_a_page_that_cannot_be_written_is_told(pair, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PosttrainError, match=r"cannot write '.*c\.html': "):
        write_page(pair, tmp_path / "file" / "c.html", 1)
