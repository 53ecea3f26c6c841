"""What a report is made of: costs, meanings of scores, tables, gains."""

import json
import math

import pytest
from html_page import checked
from report_runs import dump, evaluated_run

from posttrain.evaluation.report.cost import Cost, cost_table, device_of, hours_text, origin, training_cost
from posttrain.evaluation.report.html import html
from posttrain.evaluation.report.meaning import bounds, meaning
from posttrain.evaluation.report.page import write_report
from posttrain.evaluation.report.results import StageResult
from posttrain.evaluation.report.scores import score_cell
from posttrain.evaluation.report.table import card_table, table
from posttrain.evaluation.report.verdict import Gain
from posttrain.evaluation.report.view import Cell, Page, Row, Table, number
from posttrain.scoring.catalogue import every_reward

GPU = {"device": "cuda NVIDIA H100", "threads": 16}


@pytest.fixture
def run(tmp_path):
    return evaluated_run(tmp_path)


def costly(name, spent, environment, processes=1, **card):
    account = {"seconds": spent, "forward_equivalents": 1000, "parallel": {"processes": processes}}
    return StageResult(name, "sft", "base", account, card, environment=environment)


def cost_texts_of(*stages):
    found, note = cost_table(stages)
    return {row.name: [cell.value for cell in row.cells] for row in found.rows}, list(found.columns), note


def test_the_hours_of_gpus_are_those_of_all_processes():
    base = StageResult(
        "base", None, None, card={"seconds": 1800.0, "forward_equivalents": 5}, environment=GPU
    )
    a = costly("a", 7200.0, GPU, processes=8, seconds=3600.0, forward_equivalents=500)
    found, columns, note = cost_texts_of(base, a)
    assert columns[:3] == ["training", "evaluation", "together"]
    assert found["base"][:3] == ["–", "0.5 GPU-h", "0.5 GPU-h"]
    assert found["a"][:3] == ["16 GPU-h", "1 GPU-h", "17 GPU-h"]
    assert found["in all"][:3] == ["16 GPU-h", "1.5 GPU-h", "17.5 GPU-h"]
    assert note.startswith("One GPU-h is one GPU for an hour.")
    sums = cost_table([base, a])[0].rows[-1].cells
    assert [list(cell.notes) for cell in sums[:3]] == [
        ["1k forward-eq."],
        ["505 forward-eq."],
        ["1.5k forward-eq."],
    ]


def test_the_hours_of_a_cpu_are_those_of_its_cores():
    found, _, note = cost_texts_of(costly("a", 3600.0, {"device": "cpu", "threads": 4}, 2, seconds=900.0))
    assert found["a"][:3] == ["8 CPU-h", "1 CPU-h", "9 CPU-h"]
    assert "One CPU-h is one CPU core for an hour." in note


def test_a_stage_says_itself_where_it_ran():
    stage = costly("a", 3600.0, {"device": "cpu", "threads": 4})
    assert device_of(stage) == ("CPU", 4)
    stage.account |= {"device": "cuda", "threads": 9}
    assert device_of(stage) == ("GPU", 1)
    found, *_ = cost_texts_of(stage, costly("b", 3600.0, {"device": "cpu", "threads": 4}))
    assert (found["in all, GPU"][0], found["in all, CPU"][0]) == ("1 GPU-h", "4 CPU-h")


def test_without_an_evaluation_the_cost_is_that_of_training():
    found, columns, _ = cost_texts_of(costly("a", 3600.0, GPU))
    assert (columns, found["a"][0]) == (["training", "training ran at"], "1 GPU-h")
    assert cost_table([])[0] is None
    empty, *_ = cost_texts_of(StageResult("a", None, None))
    assert set(empty["a"] + empty["in all"]) <= {"–", ""}


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        (None, "–"), (0, "0 h"), (0.0009, "< 0.001 h"), (0.001, "0.001 h"), (0.00241, "0.00241 h"), (84.26, "84.3 h"),
        (99.96, "100 h"), (100.4, "100 h"), (999.6, "1,000 h"), (12345.6, "12,346 h"),
    ],
)  # fmt: skip
def test_hours_have_few_digits(hours, text):
    assert hours_text(hours, "h") == text


def test_what_was_not_recorded_is_left_out_of_the_cost():
    known, unknown = Cost("GPU", 1.0, 10), Cost("GPU")
    assert known + unknown == unknown + known == known
    assert unknown + unknown == unknown
    assert (known.cell().value, list(known.cell().notes)) == ("1 GPU-h", ["10 forward-eq."])
    assert list(Cost("GPU", 1.0).cell().notes) == []
    assert Cost("GPU", None, 7).cell().value == "–"
    bare = StageResult("a", "sft", "base", {"seconds": 3600.0, "forward_equivalents": float("nan")})
    assert device_of(bare) == ("CPU", 1)
    assert training_cost(bare) == Cost("CPU", 1.0, None), "one process on one core, as far as is known"
    bare.account["device"] = "not cpu"
    assert device_of(bare) == ("GPU", 1)


def test_the_last_row_of_the_costs_is_their_sum():
    found, _ = cost_table([costly("a", 1.0, GPU, seconds=1.0), StageResult("b", "sft", "a", environment=GPU)])
    assert (found.title, found.corner, [row.total for row in found.rows]) == (
        "Cost",
        "stage",
        [False, False, True],
    )
    assert [row.key for row in found.rows] == [0, 1, None]
    assert {len(row.cells) for row in found.rows} == {len(found.columns)} == {4}
    alone, _ = cost_table([costly("a", 1.0, GPU)])
    assert {len(row.cells) for row in alone.rows} == {len(alone.columns)} == {2}


def test_how_fast_a_stage_trained_is_told_as_far_as_it_is_known():
    def told(**account):
        cell = cost_table([StageResult("a", "sft", "base", account)])[0].rows[0].cells[-1]
        return cell.value, list(cell.notes)

    assert told() == ("–", [])
    assert told(images_per_second=2.25) == ("2.2 images/s", [])
    whole = told(images_per_second=2.0, steps=30, peak_memory_bytes=5e9, trainable_parameters=7e6)
    assert whole == ("2.0 images/s", ["30 steps", "5 GB peak memory", "7M parameters"])


def test_a_stage_says_where_it_came_from_and_how_far_it_is():
    assert origin(StageResult("base", None, None)) == ""
    assert origin(StageResult("a", "sft", "base", {"steps": 3})) == "sft from base"
    assert origin(StageResult("a", "sft", "base")) == "sft from base, not begun"
    rows = [{"step": 5}, {"step": 7}]
    assert origin(StageResult("a", "sft", "base", metrics=rows)) == "sft from base, at step 7, not finished"


def test_each_reward_says_what_it_measures():
    for name, kind in every_reward().items():
        text = meaning({"type": name, "function": "mine:score", "name": "far"}, higher=True)
        assert text.endswith("; higher is better.")
        assert len(text) > len("Without bounds; higher is better.") + 10, name
        assert "`" not in text
        low, high = kind.range
        assert bounds(low, high) in text


def test_the_meaning_of_a_score_is_a_sentence():
    assert meaning({"type": "shapes", "score": "graded", "weights": {}}, higher=True) == (
        "GenEval's verdict on the shapes, counts, colours and positions that the prompt asks for. "
        "From 0 to 1; higher is better."
    )
    assert "Published tables have lenient, GenEval's own verdict" in meaning({"type": "geneval"}, higher=True)
    assert meaning({"type": "remote", "name": "far"}, higher=False).endswith(
        "Without bounds; lower is better."
    )
    assert meaning({"type": "callable", "function": "my:own"}, higher=True).startswith(
        "What the function my:own returns."
    )
    assert (
        meaning({"type": "of another install"}, higher=False)
        == meaning({}, higher=False)
        == "Lower is better."
    )
    inf = float("inf")
    assert (bounds(0, inf), bounds(-inf, 1), bounds(-inf, inf)) == (
        "At least 0",
        "At most 1",
        "Without bounds",
    )


def test_the_meaning_stands_on_the_page(run):
    card = json.loads((run / "base" / "evaluation" / "eval.json").read_text())
    dump(run / "base" / "evaluation" / "eval.json", {**card, "scorers": {"shapes": {"type": "shapes"}}})
    dl = checked(write_report(run).read_text("utf-8")).one("dl")
    assert dl.one("dt").text == "shapes"
    assert "From 0 to 1; higher is better." in dl.one("dd").text


def test_a_wide_table_is_cut_into_several_and_loses_nothing():
    headings = [f"c{i}" for i in range(9)]
    whole = Table("t", "stage", headings, [Row("a", [Cell(h) for h in headings], "note", 3, True)])
    parts = list(whole.parts)
    assert [len(part.columns) for part in parts] == [3, 3, 3]
    assert [h for part in parts for h in part.columns] == headings
    assert [c.value for part in parts for c in part.rows[0].cells] == headings
    assert all(
        (p.rows[0].name, p.rows[0].note, p.rows[0].key, p.rows[0].total) == ("a", "note", 3, True)
        for p in parts
    )
    assert list(Table("t", "stage", [], []).parts) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.500"), (0.0004, "0.0004"), (0, "0.000"), (float("nan"), "–"), (float("inf"), "–"), (None, "–"), (-12.3456, "-12.346")],
)  # fmt: skip
def test_a_score_has_three_digits_and_is_a_dash_where_it_is_none(value, text):
    assert number(value) == text


def test_the_terminal_has_a_colour_where_a_difference_is_significant_alone(run):
    grid = table(run, 140)
    column = next(c for c in grid.columns if str(c.header).startswith("against"))
    assert [[str(s) for s in (cell.style, *(span.style for span in cell.spans))] for cell in column.cells] == [[""], ["dim"], ["green"]]  # fmt: skip
    scores = next(c for c in grid.columns if str(c.header).startswith("shapes"))
    assert not any("green" in str(span.style) or "green" in str(cell.style) for cell in scores.cells for span in cell.spans)  # fmt: skip


def test_a_page_with_nothing_is_whole():
    page = checked(html(Page("empty", "Nothing.")))
    assert not page.one("nav").all("a")


def test_the_alarms_of_a_stage_that_one_stopped_are_told(run):
    (run / "soar" / "stage.json").unlink()
    with (run / "soar" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "time": 30.0, "alarm/reward_hacking": 1.0}\n')
    page = checked(write_report(run).read_text("utf-8"))
    assert [line.text for line in page.one(id="alarms").all("li")] == ["soar, step 30: reward_hacking"]


def test_a_gain_of_one_sample_has_no_colour_and_no_interval():
    one, two = Gain(1.0, -math.inf, math.inf, True), Gain(0.5, 0.25, 0.75, True)
    cell = score_cell({"mean": 1.0}, one, [None, one, two], best=True)
    assert (cell.change, cell.kind, cell.drawing) == ("+1.000 (of one sample) not significant", "same", None)
    cell = score_cell({"mean": 1.0}, two, [None, one, two], best=True)
    assert (cell.change, cell.kind) == ("+0.500 (+0.250 to +0.750) better", "better")
    assert 'cx="73.3"' in cell.drawing, "two thirds of the way from 0 to 0.75"


def test_a_mean_of_one_sample_has_no_interval():
    one, two = ({"mean": 0.5, "low": 0.5, "high": 0.5, "count": count} for count in (1, 2))
    cells = [score_cell(score, None, [], best=False) for score in (one, two)]
    assert [(cell.value, cell.notes) for cell in cells] == [("0.500", []), ("0.500", ["0.500 – 0.500"])]
    grid = card_table("x", {"scores": {"s": two}, "tags": {"t": {"s": one}}, "tag_means": {}})
    assert [str(cell) for cell in grid.columns[1].cells] == ["0.500 [0.500,\u00a00.500]", "0.500"]


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [(0.859, 0.863, "[0.859, 0.863]"), (0.381, 0.461, "[0.38, 0.46]"), (0.75, 0.97, "[0.75, 0.97]")],
)
def test_the_terminal_shows_a_narrow_interval_whole(run, low, high, shown):
    file = run / "soar" / "evaluation" / "eval.json"
    card = json.loads(file.read_text())
    dump(file, {**card, "scores": {"shapes": {**card["scores"]["shapes"], "low": low, "high": high}}})
    column = next(c for c in table(run, 140).columns if str(c.header).startswith("shapes"))
    assert str([*column.cells][2]) == f"0.819 {shown}"
