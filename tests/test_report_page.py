import html
import io
import json
import re

import numpy as np
import pytest
from html_page import checked, rows_of
from PIL import Image
from report_runs import EVIL, STAGES, dump, evaluated_run, trained
from rich.console import Console

from posttrain.evaluation.report.page import write_report
from posttrain.evaluation.report.pictures import stored_side
from posttrain.evaluation.report.results import load_results
from posttrain.evaluation.report.table import table
from posttrain.evaluation.report.verdict import verdict
from posttrain.support.wording import short


@pytest.fixture
def run(tmp_path):
    return evaluated_run(tmp_path)


def page(run):
    """The text of the run's report, and the page, checked."""
    text = write_report(run).read_text("utf-8")
    return text, checked(text)


def results_of(run):
    """Name of a stage -> heading -> cell of the table of results."""
    return rows_of(page(run)[1].one(id="results").all("table")[0])


def printed(run, width):
    text = io.StringIO()
    Console(file=text, width=width).print(table(run, width))
    return text.getvalue()


def test_the_page_needs_nothing_beside_itself(run):
    assert write_report(run) == run / "report.html"
    _, found = page(run)
    assert len(found.all("img")) == 6
    assert len(found.all("script")) == 1


def test_prompts_and_recipe_are_text_not_markup(run):
    text, found = page(run)
    assert html.escape(EVIL, quote=False) in text.replace("&#34;", '"')
    assert EVIL in {a.attrs["aria-label"] for a in found.all("article")}
    assert found.one("pre").text == "name: chain # <b>bold</b>"


@pytest.mark.parametrize("evil", ['"><img onload=x>', "' onclick='x", "</script><script>x</script>", "</style>", "{{ 7*7 }}", "a&amp;b\u202e"])  # fmt: skip
def test_names_of_stages_runs_and_metrics_are_text_everywhere(run, evil):
    folder = evil.replace("/", "")
    description = json.loads((run / "run.json").read_text())
    description["name"] = description["stages"][1]["name"] = folder
    dump(run / "run.json", description)
    (run / "sft").rename(run / folder)
    trained(run / folder, **{evil: 1.0, f"heldout/{folder}": 2.0})
    card = json.loads((run / folder / "evaluation" / "eval.json").read_text())
    card["scores"][evil] = {**card["scores"]["shapes"], "higher_is_better": True}
    card["tags"][evil] = card["tags"]["kind"]
    dump(run / folder / "evaluation" / "eval.json", card)
    _, found = page(run)
    assert found.one("h1").text == " ".join(folder.split())
    assert evil in {e.text for e in found.all("dt" if "/" not in evil else "th")}
    assert any(e.attrs.get("aria-label", "").startswith(f"{evil}: ") for e in found.all("svg"))


def test_the_numbers_are_those_given(run):
    found = results_of(run)
    assert list(found) == list(STAGES)
    for name in STAGES:
        given = json.loads((run / name / "evaluation" / "eval.json").read_text())["scores"]["shapes"]
        shown = [float(n) for n in re.findall(r"\d\.\d+", found[name]["shapes"].text)][:3]
        assert shown == pytest.approx([given["mean"], given["low"], given["high"]], abs=0.0005)
    assert found["soar"]["cost of training"].text == "0.0586 CPU-h 1.25M forward-eq."
    text, whole = page(run)
    soar = rows_of(whole.one(id="cost").one("table"))["soar"]
    assert soar["training ran at"].text == "45.1 images/s 300 steps 1.3 GB peak memory 2.13M parameters"
    assert "torch 9.8.7" in text


def test_the_gain_over_base_is_shown_with_what_chance_explains(run):
    found = {name: row["shapes"].text for name, row in results_of(run).items()}
    assert "+0.475" in found["soar"]
    assert found["soar"].endswith("better")
    assert "not significant" in found["sft"]
    assert "+" not in found["base"]


def colored(element):
    return {c for e in element.all() for c in e.attrs.get("class", "").split() if c in ("better", "worse")}


def test_only_what_is_significant_has_a_colour(run):
    found = {name: row["shapes"] for name, row in results_of(run).items()}
    assert [colored(found[name]) for name in STAGES] == [set(), set(), {"better"}]
    assert [bool(found[name].all("span", class_="best")) for name in STAGES] == [False, False, True]
    (run / "soar/evaluation/records.jsonl").write_text((run / "sft/evaluation/records.jsonl").read_text())
    found = results_of(run)["soar"]["shapes"]
    assert found.all("span", class_="best"), "the best mean stays the best"
    assert colored(found) == set(), "but it is not more than chance explains"
    assert not colored(page(run)[1].one(id="results"))


def test_a_significant_loss_is_no_gain(run):
    for name in STAGES:
        path = run / name / "evaluation" / "eval.json"
        card = json.loads(path.read_text())
        card["scores"]["shapes"]["higher_is_better"] = False
        dump(path, card)
    found = results_of(run)["soar"]["shapes (lower is better)"]
    assert colored(found) == {"worse"}
    assert found.text.endswith("worse")
    groups = [h.text for h in page(run)[1].one(id="g").all("h4")]
    assert groups == ["Lost most"], "of both prompts with images the score rose"


def test_where_lower_is_better_the_lowest_is_best(run):
    for name in STAGES:
        path = run / name / "evaluation" / "eval.json"
        found = json.loads(path.read_text())
        found["scores"]["shapes"]["higher_is_better"] = False
        dump(path, found)
    lowest = min(load_results(run).stages, key=lambda s: s.scores["shapes"]["mean"]).name
    best = [
        name
        for name, row in results_of(run).items()
        if row["shapes (lower is better)"].all("span", class_="best")
    ]
    assert best == [lowest]
    assert "soar scores best" not in verdict(load_results(run))


def test_the_sentence_says_whether_the_best_is_more_than_chance(run):
    clear = verdict(load_results(run))
    assert clear.startswith("soar scores best on shapes: 0.819, +0.475 against the base model")
    assert "not significant" not in clear
    soar, sft = (run / name / "evaluation/records.jsonl" for name in ("soar", "sft"))
    soar.write_text(sft.read_text())
    assert "not significant" in verdict(load_results(run))


def test_pairs_are_matched_by_prompt_and_index_not_by_line(run):
    before = verdict(load_results(run))
    path = run / "soar/evaluation/records.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert re.findall(r"[+-]\d\.\d+", verdict(load_results(run)))[0] == re.findall(r"[+-]\d\.\d+", before)[0]


def test_each_prompt_has_an_image_of_each_stage_with_its_score(run):
    _, found = page(run)
    articles = found.one(id="g").all("article")
    assert [a.attrs["aria-label"] for a in articles] == ["a star", EVIL], "what gained most comes first"
    for article in articles:
        assert [f.one("figcaption").one("b").text for f in article.all("figure")] == list(STAGES)
    star = next(a for a in articles if a.attrs["aria-label"] == "a star")
    assert [f.one("figcaption").one("span").text for f in star.all("figure")] == ["0.250", "0.250", "0.750"]
    assert star.one("span", class_="change").text == "+0.500"
    assert [i.attrs["alt"] for i in star.all("img")] == [f"{name}: a star" for name in STAGES]


def test_large_images_are_stored_small_and_not_enlarged_by_pixels(run):
    rng = np.random.default_rng(0)
    for name in STAGES:
        Image.fromarray(rng.integers(0, 256, (1024, 1024, 3), np.uint8)).save(
            run / name / "evaluation/grid/000.png"
        )
    text, found = page(run)
    assert len(found.all("figure", class_="tiny")) == 3
    assert len(text) < 3 * 400_000


def test_many_images_are_stored_smaller_so_that_the_page_stays_small():
    sizes = [stored_side(n) ** 2 * n for n in (61, 100, 200, 400)]
    assert stored_side(1) == stored_side(60) == 512
    assert max(sizes) < 1.02 * 512**2 * 60
    assert stored_side(10_000) == 192


@pytest.mark.parametrize("gone", ["soar/evaluation", "soar/stage.json", "base/evaluation", "soar/metrics.jsonl", "environment.json", "recipe.yaml", "soar/evaluation/grid", "soar/evaluation/records.jsonl", "soar", "base"])  # fmt: skip
def test_what_is_missing_is_shown_as_missing(run, gone):
    (run / gone).rename(run / "aside")
    found = results_of(run)
    assert list(found) == list(STAGES)
    assert "soar" in printed(run, 80)
    if gone in ("soar", "soar/evaluation"):
        assert found["soar"]["shapes"].text == "–"
    if gone in ("soar", "soar/stage.json"):
        assert found["soar"]["cost of training"].text == "–"
        assert ("not finished" if gone == "soar/stage.json" else "not begun") in page(run)[0]


@pytest.mark.parametrize("environment", [{}, {"device": "cpu"}, {"versions": {}}])
def test_an_environment_that_says_little_is_no_error(run, environment):
    dump(run / "environment.json", environment)
    text, _ = page(run)
    assert ("Ran with device cpu" in text) is ("device" in environment)


@pytest.mark.parametrize("line", ["", '{"step": 1, "time": 0.1, "loss": 2.0}\n', '{"step": 1, "time": 0.1, "loss": "nan"}\n'])  # fmt: skip
def test_a_curve_of_no_or_one_point_is_no_error(run, line):
    for name in ("sft", "soar"):
        (run / name / "metrics.jsonl").write_text(line)
    text, _ = page(run)
    assert ('id="curves"' in text) == ("2.0" in line)


def test_a_metric_that_is_logged_now_and_then_has_a_curve(run):
    path = run / "soar" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = lines[3].replace("}", ', "rarely": 2.0}')
    path.write_text("\n".join(lines) + "\n")
    assert 'aria-label="rarely: soar from 2 at step 4 to 2 at step 4"' in page(run)[0]


@pytest.mark.parametrize("width", [40, 50, 80, 100, 140])
def test_no_number_is_cut_whatever_the_width(run, width):
    text = printed(run, width)
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    assert "0.819" in text


def test_a_narrow_terminal_keeps_the_scores_and_a_wide_one_has_all(run):
    assert all(
        word in printed(run, 140) for word in ("against", "forward-eq.", "images/s", "peak mem.", "trained")
    )
    assert "forward-eq." in printed(run, 60)
    assert "trained" not in printed(run, 60)


def test_names_in_brackets_are_printed_as_they_are(run):
    description = json.loads((run / "run.json").read_text())
    description["stages"][2]["name"] = "[bold]soar"
    dump(run / "run.json", description)
    assert "[bold]soar" in printed(run, 100)


def test_figures_carry_si_prefixes():
    assert [short(v) for v in (0, 300, 55_200, 2_134_567, None)] == ["0", "300", "55.2k", "2.13M", "–"]
    assert short(1_300_000_000, "B") == "1.3 GB"


def test_a_narrow_terminal_gives_up_columns_before_intervals(run):
    full = printed(run, 140)
    assert max(len(line.rstrip()) for line in full.splitlines()[1:]) > 60
    given = json.loads((run / "soar/evaluation/eval.json").read_text())["scores"]["shapes"]
    assert f"0.819 [{given['low']:.2f}, {given['high']:.2f}]" in printed(run, 60)


def test_the_terminal_says_which_gains_chance_explains(run):
    lines = {line.split()[0]: line for line in printed(run, 140).splitlines() if line.split()[0] in STAGES}
    assert "n.s." in lines["sft"]
    assert "+0.475" in lines["soar"]
    assert "n.s." not in lines["soar"]
