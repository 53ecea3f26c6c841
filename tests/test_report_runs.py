"""The report of several runs: one base model for all, or one for each."""

import json

import pytest
from html_page import checked, rows_of
from report_runs import STAGES, dump, evaluated, evaluated_run, trained

from posttrain.errors import PosttrainError
from posttrain.evaluation.report.page import write_report
from posttrain.evaluation.report.results import Results, StageResult, load_results
from posttrain.evaluation.report.runs import joined, load_runs
from posttrain.evaluation.report.verdict import gain_of, verdict


@pytest.fixture
def run(tmp_path):
    return evaluated_run(tmp_path)


def second(folder, other_noise=False):
    """A second run whose ``sft`` is better than chance, with other noise if asked."""
    stages = [
        {"name": "base", "parent": None, "algorithm": None},
        {"name": "sft", "parent": "base", "algorithm": "sft"},
    ]
    dump(folder / "run.json", {"name": "chain", "stages": stages})
    (folder / "recipe.yaml").write_text("name: second\n")
    up = 0.0625 if other_noise else 0.0
    evaluated(folder / "base", [[0.25 + up, 0.5], [0.25, 0.25], [0.5, 0.25], [0.25, 0.5]])
    evaluated(folder / "sft", [[0.5, 0.75], [0.5, 0.5], [0.75, 0.5], [0.5, 0.75]])
    if other_noise:
        for name in ("base", "sft"):
            file = folder / name / "evaluation" / "eval.json"
            dump(file, {**json.loads(file.read_text()), "sampler": {"seed": 1}})
    trained(folder / "sft", 99_000)
    return folder


@pytest.fixture
def two(run, tmp_path):
    folder = tmp_path / "runs"
    (folder / "one").mkdir(parents=True)
    for name in ("run.json", "recipe.yaml", "environment.json", *STAGES):
        (run / name).rename(folder / "one" / name)
    return folder / "one", second(folder / "two")


def test_runs_of_one_base_model_are_compared_with_it(two):
    results = joined(load_runs(two))
    assert [s.name for s in results.stages] == ["base", "one/sft", "one/soar", "two/sft"]
    assert results.base_of(results.stages[3]) is results.stages[0]
    assert verdict(results).startswith("one/soar scores best on shapes: 0.819, +0.475 against the base model")
    page = checked(write_report(*two).read_text("utf-8"))
    assert page.one("h1").text == "one · two"
    shown = rows_of(page.one(id="results").all("table")[0])
    assert list(shown) == ["base", "one/sft", "one/soar", "two/sft"]
    assert shown["two/sft"]["shapes"].one("small", class_="better").text.startswith("+0.250")
    assert [h.text for h in page.one(id="settings").all("h3")] == ["one", "two"]
    assert [p.text.split()[1] for p in page.all("pre")] == ["chain", "second"]
    assert list(rows_of(page.one(id="cost").one("table")))[-1] == "in all"


def test_runs_measured_with_other_noise_keep_their_own_base(two, tmp_path):
    other = second(tmp_path / "three", other_noise=True)
    results = joined(load_runs([*two, other]))
    assert [s.name for s in results.stages] == [
        "one/base",
        "one/sft",
        "one/soar",
        "two/sft",
        "three/base",
        "three/sft",
    ]
    last = results.stages[-1]
    assert results.base_of(last).name == "three/base"
    assert gain_of(results, last, "shapes").change == pytest.approx(0.25 - 0.0625 / 8)
    page = checked(write_report(*two, other, output=tmp_path / "page.html").read_text("utf-8"))
    assert (tmp_path / "page.html").is_file()
    assert any("other sampling settings" in p.text for p in page.all("p", class_="warn"))
    assert page.one(id="g").one("h3").text == "Same prompt", "not the same noise"
    assert "Not all models were evaluated alike, so none is best on shapes." in page.one("header").text
    assert not page.one(id="results").all("span", class_="value best")


def test_an_alarm_says_of_which_run_it_is(two, tmp_path):
    for folder in two:
        file = folder / "sft" / "stage.json"
        dump(file, {**json.loads(file.read_text()), "alarms": ["sft, step 3: spread_collapse: it fell"]})
    page = checked(write_report(*two, output=tmp_path / "page.html").read_text("utf-8"))
    assert [line.text for line in page.one(id="alarms").all("li")] == [
        "one/sft, step 3: spread_collapse: it fell",
        "two/sft, step 3: spread_collapse: it fell",
    ]


def test_one_run_keeps_its_name_and_its_stages(two):
    (only,) = load_runs(two[:1])
    assert only == load_results(two[0])
    assert joined([only]) is only
    assert [run.name for run in load_runs(two)] == ["one", "two"]


def base(name="base", **card):
    return StageResult(name, None, None, card=card)


def test_of_equal_base_models_the_first_that_was_evaluated_is_kept():
    runs = [
        Results("empty", [], "", {}),
        Results("bare", [base(), StageResult("x", "sft", "base")], "r", {"seed": 1}),
        Results("a", [base(prompts=1, shown={"grid": 1}, sampler={"batch_size": 1})], "", {}),
        Results("b", [base(prompts=1, shown={"grid": 2}, sampler={"batch_size": 2}), StageResult("y", "sft", "base")], "", {}),
    ]  # fmt: skip
    found = joined(runs)
    assert (found.name, found.recipe, found.environment) == ("empty · bare · a · b", "", {})
    assert [s.name for s in found.stages] == ["base", "bare/x", "b/y"]
    assert found.stages[0].card["shown"] == {"grid": 1}
    assert all(found.base_of(stage) is found.stages[0] for stage in found.stages)
    other = Results("c", [base(prompts=2)], "", {})
    assert [s.name for s in joined([*runs, other]).stages] == ["bare/x", "a/base", "b/y", "c/base"]
    apart = joined([*runs, other])
    assert [apart.base_of(s).name for s in apart.stages] == ["a/base", "a/base", "a/base", "c/base"]
    assert joined(runs[:1] * 2).stages == []
    bare = joined([runs[1], runs[1]])
    assert [s.name for s in bare.stages] == ["base", "bare/x", "bare/x"], "none was evaluated"


def test_a_stage_that_was_not_evaluated_alike_has_no_gain(two):
    results = load_results(two[0])
    results.stages[2].card["prompts"] = {"sha256": "other"}
    assert gain_of(results, results.stages[2], "shapes") is None
    assert gain_of(results, results.stages[1], "shapes") is not None
    assert gain_of(results, results.stages[0], "shapes") is None


def test_runs_without_an_evaluation_are_joined_too(two):
    for folder in two:
        for name in ("base", "sft", "soar"):
            if (folder / name / "evaluation").exists():
                (folder / name / "evaluation").rename(folder / name / "gone")
    page = checked(write_report(*two).read_text("utf-8"))
    assert "Nothing has been evaluated" in page.one("header").text
    assert list(rows_of(page.one(id="cost").one("table"))) == [
        "base",
        "one/sft",
        "one/soar",
        "two/sft",
        "in all",
    ]


def test_the_folders_of_a_report_are_checked(two, tmp_path):
    with pytest.raises(PosttrainError, match="a report needs a run"):
        write_report()
    with pytest.raises(PosttrainError, match="one folder was given twice"):
        write_report(two[0], two[0])
    with pytest.raises(PosttrainError, match=r"holds no run \(no run.json\)"):
        write_report(two[0], tmp_path)
    assert write_report(*two) == two[0].parent / "report.html"
