import html
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from posttrain.evaluation.intervals import bootstrap_interval
from posttrain.evaluation.report.page import write_report
from posttrain.evaluation.report.results import load_results
from posttrain.evaluation.report.table import table
from posttrain.evaluation.report.verdict import verdict
from posttrain.support.wording import short

EVIL = '<script>alert("x")</script> & two'
PROMPTS = ["one red circle", "two blue squares", EVIL, "a star"]
STAGES = ("base", "sft", "soar")


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def summary(values, prompts, **more):
    low, high = bootstrap_interval(values, groups=prompts)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "count": len(values), **more}


def evaluated(folder, scores, higher=True):
    """``scores``: one list of two images' scores for each prompt."""
    rows = [
        {"prompt": p, "index": i, "tag": "kind", "scores": {"shapes": v}}
        for p, pair in zip(PROMPTS, scores, strict=True)
        for i, v in enumerate(pair)
    ]
    values, prompts = [r["scores"]["shapes"] for r in rows], [r["prompt"] for r in rows]
    dump(
        folder / "evaluation" / "eval.json",
        {
            "images": len(rows),
            "scores": {"shapes": summary(values, prompts, higher_is_better=higher, range=[0, 1])},
            "tags": {"kind": {"shapes": summary(values, prompts)}},
            "grid_prompts": PROMPTS[2:],
        },
    )
    (folder / "evaluation" / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "evaluation" / "grid").mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (i * 80, 90, 10)).save(folder / "evaluation" / "grid" / f"{i:03d}.png")


def trained(folder, forward_equivalents=55_200, **metrics):
    account = {"steps": 300, "samples": 9600, "seconds": 211.0, "images_per_second": 45.1}
    account |= {"forward_equivalents": forward_equivalents, "peak_memory_bytes": 1_300_000_000}
    dump(
        folder / "stage.json",
        account | {"trainable_parameters": 2_134_567, "skipped": ["cat.jpg: truncated"]},
    )
    rows = [{"step": s, "time": s * 1.0, "loss": 1 / s, **metrics} for s in range(1, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    """base, sft (no better than chance) and soar (better on every prompt)."""
    stages = [
        {"name": n, "parent": p, "algorithm": n if p else None}
        for n, p in zip(STAGES, (None, "base", "sft"), strict=True)
    ]
    dump(tmp_path / "run.json", {"name": "chain", "stages": stages})
    dump(
        tmp_path / "environment.json",
        {"versions": {"torch": "9.8.7"}, "device": "cpu", "seed": 3, "started": "now"},
    )
    (tmp_path / "recipe.yaml").write_text("name: chain  # <b>bold</b>\n")
    evaluated(tmp_path / "base", [[0.25, 0.5], [0.25, 0.25], [0.5, 0.25], [0.25, 0.5]])
    evaluated(tmp_path / "sft", [[0.5, 0.5], [0.25, 0.125], [0.5, 0.25], [0.25, 0.5]])
    evaluated(tmp_path / "soar", [[0.75, 0.9], [0.75, 0.75], [0.9, 0.75], [0.75, 1.0]])
    trained(tmp_path / "sft")
    trained(tmp_path / "soar", 1_250_000, grad_norm=0.5)
    return tmp_path


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.addresses, self.tables, self.handlers = [], [], [], [], []
        self.cell = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value)
            if name.startswith("on"):
                self.handlers.append(name)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = self.tables[-1][-1]
        elif tag in ("small", "br") and self.cell:
            self.cell[-1] += " "

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.cell:
            self.cell[-1] += data


def page(run):
    text = write_report(run).read_text()
    return text, Page(text)


def printed(run, width):
    text = io.StringIO()
    Console(file=text, width=width).print(table(run, width))
    return text.getvalue()


def test_the_page_needs_nothing_beside_itself(run):
    text, found = page(run)
    assert write_report(run) == run / "report.html"
    assert found.addresses
    assert all(a.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for a in found.addresses)
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    assert not re.search(r"url\(|@import", text)


def test_prompts_and_recipe_are_text_not_markup(run):
    text, found = page(run)
    assert "script" not in found.tags
    assert not found.handlers
    assert html.escape(EVIL, quote=False) in text.replace("&#34;", '"')
    assert "&lt;b&gt;bold" in text


def test_names_of_stages_and_metrics_are_text_in_the_curves_too(run):
    description = json.loads((run / "run.json").read_text())
    evil = '"><img onload=x>'
    description["name"] = description["stages"][1]["name"] = evil
    dump(run / "run.json", description)
    (run / "sft").rename(run / evil)
    trained(run / evil, **{"<script>": 1.0})
    _, found = page(run)
    assert not found.handlers
    assert "script" not in found.tags


def test_the_numbers_are_those_given(run):
    _, found = page(run)
    head, *rows = found.tables[0]
    cells = {row[0].split()[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(cells) == list(STAGES)
    for name in STAGES:
        given = json.loads((run / name / "evaluation" / "eval.json").read_text())["scores"]["shapes"]
        shown = [float(n) for n in re.findall(r"\d\.\d+", cells[name]["shapes"])][:3]
        assert shown == pytest.approx([given["mean"], given["low"], given["high"]], abs=0.0005)
    soar = cells["soar"]
    assert (soar["forward-eq."], soar["images/s"], soar["peak memory"]) == ("1.25M", "45.1", "1.3 GB")
    assert (soar["steps"], soar["trained"], soar["time"]) == ("300", "2.13M", "4 min")
    assert cells["sft"]["forward-eq."] == "55.2k"
    assert "torch 9.8.7" in page(run)[0]


def test_the_gain_over_base_is_shown_with_what_chance_explains(run):
    rows = {row[0].split()[0]: row[1] for row in page(run)[1].tables[0]}
    assert "+0.475" in rows["soar"]
    assert "not significant" not in rows["soar"]
    assert "not significant" in rows["sft"]
    assert "+" not in rows["base"]


def test_the_best_is_marked_and_alone(run):
    assert (
        re.findall(r'class="best">([\d.]+)<', page(run)[0]) == ["0.819"] * 2
    )  # the results, and the one tag


def test_where_lower_is_better_the_lowest_is_best(run):
    for name in STAGES:
        path = run / name / "evaluation" / "eval.json"
        found = json.loads(path.read_text())
        found["scores"]["shapes"]["higher_is_better"] = False
        dump(path, found)
    lowest = min(load_results(run).stages, key=lambda s: s.scores["shapes"]["mean"]).scores["shapes"]["mean"]
    assert re.findall(r'class="best">([\d.]+)<', page(run)[0]) == [f"{lowest:.3f}"] * 2
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


def test_each_prompt_has_an_image_of_each_stage(run):
    _, found = page(run)
    grid = found.tables[-1]
    assert grid[0][1:] == list(STAGES)
    assert [row[0] for row in grid[1:]] == PROMPTS[2:]
    assert found.tags.count("img") == 6


def test_large_images_are_stored_small_and_not_enlarged_by_pixels(run):
    rng = np.random.default_rng(0)
    for name in STAGES:
        Image.fromarray(rng.integers(0, 256, (1024, 1024, 3), np.uint8)).save(
            run / name / "evaluation/grid/000.png"
        )
    text, _ = page(run)
    assert text.count('class="tiny"') == 3
    assert len(text) < 3 * 600_000


@pytest.mark.parametrize("gone", ["soar/evaluation", "soar/stage.json", "base/evaluation", "soar/metrics.jsonl", "environment.json", "recipe.yaml", "soar/evaluation/grid", "soar/evaluation/records.jsonl", "soar", "base"])  # fmt: skip
def test_what_is_missing_is_shown_as_missing(run, gone):
    (run / gone).rename(run / "aside")
    _, found = page(run)
    assert [row[0].split()[0] for row in found.tables[0][1:]] == list(STAGES)
    assert "soar" in printed(run, 80)
    if gone in ("soar", "soar/evaluation"):
        assert found.tables[0][3][1] == "–"
    if gone in ("soar", "soar/stage.json"):
        assert found.tables[0][3][2:] == ["–"] * 6


@pytest.mark.parametrize("environment", [{}, {"device": "cpu"}, {"versions": {}}])
def test_an_environment_that_says_little_is_no_error(run, environment):
    dump(run / "environment.json", environment)
    text, _ = page(run)
    assert ("· seed" in text) is bool(environment)


@pytest.mark.parametrize("line", ["", '{"step": 1, "time": 0.1, "loss": 2.0}\n', '{"step": 1, "time": 0.1, "loss": "nan"}\n'])  # fmt: skip
def test_a_curve_of_no_or_one_point_is_no_error(run, line):
    for name in ("sft", "soar"):
        (run / name / "metrics.jsonl").write_text(line)
    text, _ = page(run)
    assert ("<svg" in text) == ("2.0" in line)
    assert "nan" not in re.sub(r"<details>.*", "", text, flags=re.S)


def test_a_metric_that_is_logged_now_and_then_has_a_curve(run):
    path = run / "soar" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = lines[3].replace("}", ', "rarely": 2.0}')
    path.write_text("\n".join(lines) + "\n")
    assert 'aria-label="rarely"' in page(run)[0]


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
