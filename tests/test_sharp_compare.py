"""Evaluations are compared on what all have, and every cell of table and page is worked out by hand."""

import base64
import io
import json

import pytest
from rich.console import Console

from posttrain.compare import EXPECTED, Comparison, Evaluated, compare_table, load, worded, write_page
from posttrain.errors import PosttrainError
from posttrain.statistics import paired_difference

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


def write(folder, rows, card):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.json").write_text(json.dumps(card))
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    return folder


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


def test_folders_are_read_and_what_was_not_measured_alike_is_told(tmp_path):
    one, two = (
        records(("p", 0, 1.0, {}), ("q", 0, 2.0, {})),
        records(("q", 0, 5.0, {}), ("p", 0, 4.0, {}), ("r", 0, 0, {})),
    )
    card = CARD | {
        "sampler": {"steps": 4, "batch_size": 2},
        "shown": {"grid": 1},
        "model": {"weights": "raw", "sha256": "a"},
    }
    card["model"]["settings"] = {"type": "sd3", "revision": "main"}
    write(tmp_path / "one" / "evaluation", one, card)
    other = json.loads(json.dumps(card))
    other["sampler"] = {"steps": 5, "batch_size": 9}
    other["model"] = {"weights": "ema", "sha256": "b", "settings": {"type": "flux", "revision": "x"}}
    other["shown"]["grid"] = 9
    write(tmp_path / "two", two, other)
    found = load([tmp_path / "one", tmp_path / "two", tmp_path / "two"][:2])
    assert [e.name for e in found.evaluations] == ["one", "two"]
    assert [e.folder for e in found.evaluations] == [tmp_path / "one" / "evaluation", tmp_path / "two"]
    assert found.evaluations[1].records == two
    assert found.keys == [("p", 0), ("q", 0)]
    assert found.remarks == [
        "compared on the 2 samples that all have (2 in one, 3 in two)",
        "one and two were not measured alike: sampler.steps (one: 4, two: 5)",
    ]
    assert load([tmp_path / "two", tmp_path / "one"]).remarks[0].endswith("(3 in two, 2 in one)")
    write(tmp_path / "two", one, card)
    assert load([tmp_path / "one", tmp_path / "two"]).remarks == []


def test_differences_in_two_places_stand_in_one_remark(tmp_path):
    rows = records(("p", 0, 1.0, {}))
    for name, steps in (("a", 1), ("b", 2), ("c", 2)):
        write(tmp_path / name, rows, CARD | {"steps": steps, "seed": steps})
    remarks = load([tmp_path / n for n in "abc"]).remarks
    assert remarks == [
        f"a and {n} were not measured alike: steps (a: 1, {n}: 2); seed (a: 1, {n}: 2)" for n in "bc"
    ]


def test_what_may_differ_is_listed():
    assert EXPECTED == (
        "model.weights",
        "model.sha256",
        "model.settings.type",
        "model.settings.revision",
        "shown",
        "sampler.batch_size",
    )


def test_what_cannot_be_compared_is_refused(tmp_path):
    rows = records(("p", 0, 1.0, {}))
    first = write(tmp_path / "run" / "evaluation", rows, CARD)
    with pytest.raises(PosttrainError, match=r"^compare needs two evaluations or more$"):
        load([first])
    with pytest.raises(PosttrainError, match=r"^'.*none' holds no finished evaluation \(no eval\.json\)$"):
        load([first, tmp_path / "none"])
    with pytest.raises(
        PosttrainError, match=r"^the evaluations share no sample: other prompts, or other image numbers$"
    ):
        load([first, write(tmp_path / "b", records(("p", 1, 1.0, {})), CARD)])
    with pytest.raises(PosttrainError, match=r"^the evaluations share no score$"):
        load([first, write(tmp_path / "c", rows, {"scores": {"t": {}}})])
    with pytest.raises(PosttrainError, match=r"^compare was given one folder twice$"):
        load([first, tmp_path / "run"])


def test_names_are_as_long_as_needed_to_differ(tmp_path):
    rows = records(("p", 0, 1.0, {}))
    folders = [write(tmp_path / name / "sft" / "evaluation", rows, CARD) for name in ("x", "y")]
    assert [e.name for e in load(folders).evaluations] == ["x/sft", "y/sft"]
