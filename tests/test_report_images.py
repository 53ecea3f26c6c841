"""The images of a report: which ones, in which order, and how one looks at them without a script."""

import json
import os

import pytest
from html_page import checked, rows_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_runs import PROMPTS, STAGES, evaluated_run

from posttrain.evaluation.report.gallery import Column, Versus, changed_prompts, gallery
from posttrain.evaluation.report.page import write_report
from posttrain.evaluation.report.results import load_results


@pytest.fixture
def run(tmp_path):
    return evaluated_run(tmp_path)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.booleans(), st.integers(1, 40))
def test_what_changed_most_comes_first(tmp_path_factory, after, higher, most):
    file = tmp_path_factory.getbasetemp() / "dot.png"
    if not file.exists():
        Image.new("RGB", (8, 8)).save(file)
    samples = [(f"p{i}", 0) for i in range(len(after))]
    columns = [
        Column("a", {s: {"s": 0.5} for s in samples}, dict.fromkeys(samples, file)),
        Column("b", {s: {"s": v} for s, v in zip(samples, after, strict=True)}, dict.fromkeys(samples, file)),
    ]
    found = gallery(columns, Versus(0, 1, "s", higher), most)
    gains = {s[0]: (v - 0.5) * (1 if higher else -1) for s, v in zip(samples, after, strict=True)}
    groups = {title: [gains[one.title] for one in shown] for title, shown, _ in found.groups}
    up, down = groups.get("Gained most", []), groups.get("Lost most", [])
    assert up == sorted(up, reverse=True)
    assert down == sorted(down)
    assert all(gain > 0 for gain in up)
    assert all(gain < 0 for gain in down)
    shown = [gain for gains in groups.values() for gain in gains]
    assert len(shown) == min(most, len(after))
    assert sorted(map(abs, shown)) == sorted(map(abs, gains.values()))[-len(shown) :]
    assert [title for title, _, is_open in found.groups if not is_open] == [
        t for t in groups if "Other" in t and (up or down)
    ]


def test_prompts_are_listed_by_the_mean_of_their_images():
    before = {
        ("p", 0): {"s": 0.0},
        ("p", 1): {"s": 1.0},
        ("q", 0): {"s": 1.0},
        ("r", 0): {"s": 0.5},
        ("t", 0): {"s": 1},
    }
    after = {("p", 0): {"s": 1.0}, ("p", 1): {"s": 1.0}, ("q", 0): {"s": 0.25}, ("r", 0): {"s": 0.5}}
    columns = [Column("a", before, {}), Column("b", after, {})]
    found = changed_prompts(columns, Versus(0, 1, "s"))
    assert found.title == "The prompts of all 3 whose s gained and lost most"
    assert [(r.name, *(c.value for c in r.cells)) for r in found.rows] == [
        ("p", "0.500", "1.000", "+0.500"),
        ("q", "1.000", "0.250", "-0.750"),
    ]
    assert changed_prompts([columns[0], columns[0]], Versus(0, 1, "s")) is None


def test_nothing_gains_or_loses_where_scores_are_not_to_be_compared(run):
    assert "gained and lost most" in write_report(run).read_text("utf-8")
    file = run / "soar" / "evaluation" / "eval.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scorers": {"shapes": {"score": "strict"}}}))
    text = write_report(run).read_text("utf-8")
    assert "soar was evaluated by other rewards than base: do not compare their scores." in text
    assert "gained and lost most" not in text
    assert [e.text for e in checked(text).one(id="g").all("h4")] == ["Other prompts"]


def test_an_image_that_is_damaged_or_gone_is_told_and_the_rest_is_shown(run):
    (run / "soar" / "evaluation" / "grid" / "001.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    page = checked(write_report(run).read_text("utf-8"))
    assert len(page.all("img")) == 5
    assert "is damaged" in page.one("p", class_="none").text


def test_an_image_that_is_gone_leaves_the_others_with_their_own_prompts(run):
    grid = run / "soar" / "evaluation" / "grid"
    (grid / "000.png").unlink()
    assert load_results(run).stages[2].images == {(PROMPTS[3], 0): grid / "001.png"}


def test_a_file_name_that_is_no_text_does_not_take_the_report(run):
    account = json.loads((run / "soar" / "stage.json").read_text())
    account["skipped"] = [os.fsdecode(b"caf\xe9.jpg") + ": truncated"]
    (run / "soar" / "stage.json").write_text(json.dumps(account))
    assert r"caf\udce9.jpg: truncated" in write_report(run).read_text("utf-8")


def grids_of(folder, *steps):
    (folder / "samples").mkdir(parents=True)
    for step in steps:
        Image.new("RGB", (40, 20), (step % 256, 0, 0)).save(folder / "samples" / f"step-{step:08d}.png")


def test_a_stage_without_an_evaluation_shows_the_images_of_its_training(run):
    for name in STAGES:
        (run / name / "evaluation").rename(run / f"gone-{name}")
    grids_of(run / "sft", 0, 8)
    grids_of(run / "soar", *range(0, 1000, 50))
    page = checked(write_report(run).read_text("utf-8"))
    assert not page.all(id="results")
    assert "The images were drawn in training." in page.one("header").text
    images = page.one(id="images")
    assert "open" in images.one("details").attrs, "nothing else is there to see"
    assert [f.one("b").text for f in page.one(id="t0").all("figure")] == ["step 0", "step 8"]
    assert [f.one("b").text for f in page.one(id="t1").all("figure")] == [
        f"step {n}" for n in (0, 250, 500, 700, 950)
    ]
    assert "5 of 20 grids are shown." in page.one(id="t1").text
    (chosen,) = [i for i in page.one(id="t1").all("input") if "checked" in i.attrs]
    assert chosen.attrs["class"] == "pick4", "the last is seen first"
    assert list(rows_of(page.one(id="cost").one("table")))[:3] == list(STAGES)


def test_beside_an_evaluation_the_images_of_training_are_folded(run):
    grids_of(run / "sft", 0, 8)
    page = checked(write_report(run).read_text("utf-8"))
    assert page.one(id="t0").inside("details")
    assert not page.one(id="g").inside("details")


def test_one_flips_between_stages_and_enlarges_without_a_script(run):
    page = checked(write_report(run).read_text("utf-8"))
    found = page.one(id="g")
    assert [label.text for label in found.all("label")] == ["all, side by side", *STAGES]
    assert [i.attrs["type"] for i in found.all("input")] == ["radio"] * 4
    assert len({i.attrs["name"] for i in found.all("input")}) == 1, "arrow keys go from one to the next"
    style = page.one("style").text
    for i in range(3):
        assert f".gallery > .pick{i}:checked ~ .groups figure:not(.v{i}) {{ display: none; }}" in style
    for figure in found.all("figure"):
        assert figure.one("a", class_="zoom").attrs["href"] == f"#{figure.attrs['id']}", (
            "it becomes the target"
        )
        others = [a.attrs["href"][1:] for a in figure.all("a")][1:]
        near = [f.attrs["id"] for f in figure.parent.all("figure")]
        assert others == [*near, figure.parent.parent.attrs["id"]], "to each stage, and back to the prompt"
    for need in ("figure:target", "prefers-color-scheme: dark", "prefers-reduced-motion", "@media print", ":focus-visible", "max-width: 719px"):  # fmt: skip
        assert need in style
