"""Names and captions are shown as they are on any terminal, in any locale."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import ROOT
from rich.console import Console
from rich.table import Table
from rich.text import Text
from runs import recipe, stage

from posttrain.distributed.world import ALONE
from posttrain.evaluation.report.table import card_table
from posttrain.stages.run import Run
from posttrain.support.display import shown
from posttrain.support.progress import stage_progress
from posttrain.support.terminal import Terminal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain é 中 – \u00a0", "plain é 中 – \u00a0"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b[2J\x07\r\x9b", r"\x1b[2J\x07\r\x9b"),
        ("\u202egpj\u2066\u200b\ufeff\u2028", r"\u202egpj\u2066\u200b\ufeff\u2028"),
        ("\udcc3", r"\udcc3"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        (r"\x1b", r"\x1b"),
    ],
)
def test_what_a_terminal_would_obey_or_hide_is_written_out(text, expected):
    assert shown(text) == expected


HOSTILE = "[red]x[/blue] :fire: \x1b[2J\r"


def printed(*values, **options):
    file = io.StringIO()
    Terminal(file=file, width=200, **options).print(*values)
    return file.getvalue()


def test_markup_emoji_and_codes_are_text_in_all_that_is_printed():
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    for value in (HOSTILE, Text(HOSTILE), table):
        text = printed(value)
        assert text.count(r"[red]x[/blue] :fire: \x1b[2J") == (3 if value is table else 1)
        assert "\x1b" not in text


def test_a_note_is_the_line_itself_on_any_console():
    for console in (Terminal, Console):
        file = io.StringIO()
        made = recipe(stage("sft"))
        Run(made, made.model, Path("run"), torch.device("cpu"), console(file=file), ALONE).note(HOSTILE[:20])
        assert file.getvalue() == shown(HOSTILE[:20]) + "\n"


def test_styles_and_progress_still_reach_a_terminal():
    options = {"force_terminal": True, "color_system": "standard"}
    assert printed(Text("x", "red"), **options) == "\x1b[31mx\x1b[0m\n"
    file = io.StringIO()
    with stage_progress("[red]\x1b[2J", 2, 0, Terminal(file=file, width=100, **options)) as bar:
        bar.update(2)
    assert r"[red]\x1b[2J" in file.getvalue()
    assert "\x1b[?25l" in file.getvalue(), "the cursor is hidden while the bar moves"


def test_the_table_of_a_card_reads_no_markup_on_any_console():
    score = {"mean": 0.5, "low": 0.25, "high": 0.75}
    card = {"scores": {"[b]s": score}, "tags": {"[/x]": {"[b]s": score}}, "tag_means": {"[b]s": 0.5}}
    file = io.StringIO()
    Console(file=file, width=90).print(card_table("[red]name", card))
    for words in ("[red]name", "[b]s", "mean [95 %]", "[/x]", "0.500 [0.250,\u00a00.750]"):
        assert words in file.getvalue()


def test_a_tag_may_be_called_all():
    def score(mean):
        return {"s": {"mean": mean, "low": 0.0, "high": 1.0}}

    card = {"scores": score(0.25), "tags": {"all": score(0.75)}, "tag_means": {"s": 0.75}}
    file = io.StringIO()
    Console(file=file, width=90).print(card_table("x", card))
    assert [line.split()[1] for line in file.getvalue().splitlines() if line.startswith("all")] == [
        "0.250",
        "0.750",
    ]


def test_any_locale_and_any_terminal_will_do(tmp_path):
    """Without a restart Python could not make the name from the command line's bytes."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "posttrain", "recipes", "copy", "quickstart", "é–中.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **locale}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rb"wrote \xe9\u2013\u4e2d.yaml" in done.stdout
    assert "name: quickstart" in (tmp_path / "é–中.yaml").read_text("utf-8")


def test_every_text_file_is_read_and_written_with_its_encoding():
    """Ruff's PLW1514 knows only the paths whose type it can infer."""
    missing = []
    for package in ("posttrain", "algorithms", "rewards"):
        for file in (ROOT / package).rglob("*.py"):
            missing += [f"{file}:{line}" for line in _without_encoding(file)]
    assert missing == []


def _without_encoding(file: Path):
    """The lines of calls that open a file as text and do not say how it is encoded."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        values = [a.value for a in node.args if isinstance(a, ast.Constant)]
        if any(isinstance(v, str) and ("b" in v or "utf-8" in v) for v in values):
            continue
        if name in ("read_text", "write_text") or (name == "open" and values):
            yield node.lineno


def test_a_bar_that_moves_keeps_the_figures_of_before():
    file = io.StringIO()
    with stage_progress("sft", 3, 0, Terminal(file=file, width=100, force_terminal=True)) as bar:
        bar.update(1, loss=0.5, images_per_second=2.0)
        bar.update(2)
        assert bar.figures == "loss 0.5000  2.0 images/s"
        bar.update(3, reward=0.25)
        assert bar.figures == "reward 0.250"
    assert "2/3" in file.getvalue() or "3/3" in file.getvalue()
