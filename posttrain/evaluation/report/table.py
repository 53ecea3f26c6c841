"""Makes the tables of scores that the terminal shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from posttrain.evaluation.likeness import unlike
from posttrain.evaluation.report.results import Results, StageResult, cost_texts, load_results
from posttrain.evaluation.report.verdict import Gain, best_stage, gain_of, verdict
from posttrain.evaluation.report.view import interval_texts, number

COSTS = (("forward-eq.", 2), ("images/s", 4), ("peak mem.", 5), ("steps", 7), ("trained", 8))
"""Heading and rank of each column of :func:`cost_texts`."""


class Column(NamedTuple):
    """A column of the table: its heading, and a cell for each stage."""

    heading: Text
    cells: list[Text]
    rank: int
    """A narrow terminal drops the column with the highest rank first, and never one of rank 0."""


def table(run: Path, width: int = 120) -> Table:
    """The results of a run as a table for a terminal of ``width`` characters.

    If it is too wide, whole columns are dropped, the least important first, and then the intervals. No number
    is ever cut.
    """
    results = load_results(run)
    columns = _fitting(_columns(results, intervals=True), width)
    if _width(columns) > width:
        columns = _fitting(_columns(results, intervals=False), width)
    title = Text(verdict(results), "bold")
    for line in (*unlike(results.cards), *results.damage):
        title.append(f"\n{line}", "not bold yellow")
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        grid.add_column(column.heading, justify="right" if i else "left", no_wrap=True)
    for cells in zip(*(column.cells for column in columns), strict=True):
        grid.add_row(*cells)
    return grid


def card_table(name: str, card: dict[str, Any]) -> Table:
    """The scores of one evaluation's result card, over all samples and by tag."""
    grid = Table(title=Text(name), title_justify="left", title_style="bold", box=None, pad_edge=False)
    grid.add_column("prompts", no_wrap=True)
    for score in card["scores"]:
        heading = Text(f"{score}\n").append("mean [95 %]", "dim")
        grid.add_column(heading, justify="right", overflow="fold")
    for label, scores in (("all", card["scores"]), *card["tags"].items()):  # a tag may be called "all"
        grid.add_row(Text(label), *(_mean(s, interval_texts(s), gap="\u00a0") for s in scores.values()))
    if card["tag_means"]:
        grid.add_row("mean of tags", *map(number, card["tag_means"].values()))
    return grid


def _columns(results: Results, *, intervals: bool) -> list[Column]:
    """Every column of the table, from left to right."""
    stages = results.stages
    columns = [Column(Text("stage"), [Text(stage.name) for stage in stages], 0)]
    for i, name in enumerate(results.score_names):
        heading = Text(f"{name}\n").append("mean [95 %]" if intervals else "mean", "dim")
        best = best_stage(results, name)
        cells = [_score(stage, name, stage is best, intervals) for stage in stages]
        # the first score is the most important one; details of a score, with a slash, are the least
        columns.append(Column(heading, cells, 0 if i == 0 else 6 if "/" in name else 1))
        if i == 0:
            columns.append(
                Column(Text("against\nbase"), [_gain(gain_of(results, s, name)) for s in stages], 3)
            )
    costs = [[Text(text) for text in cost_texts(stage)] for stage in stages]
    for i, (heading, rank) in enumerate(COSTS):
        columns.append(Column(Text(heading), [cost[i] for cost in costs], rank))
    return columns


def _fitting(columns: list[Column], width: int) -> list[Column]:
    """Drop the columns with the highest ranks, from the right, until the others fit into ``width``."""
    kept = list(columns)
    while _width(kept) > width and (worst := max(column.rank for column in kept)):
        del kept[max(i for i, column in enumerate(kept) if column.rank == worst)]
    return kept


def _width(columns: list[Column]) -> int:
    """The width of the table in characters, with the gaps of two between its columns."""
    widths = (max(line.cell_len for text in (c.heading, *c.cells) for line in text.split()) for c in columns)
    return sum(widths) + 2 * (len(columns) - 1)


def _score(stage: StageResult, name: str, best: bool, interval: bool) -> Text:
    if (score := stage.scores.get(name)) is None:
        return Text("–")
    ends = interval_texts(score, short=True) if interval else None
    return _mean(score, ends, style="bold" if best else "")


def _mean(score: Mapping[str, Any], ends: tuple[str, str] | None, *, style: str = "", gap: str = " ") -> Text:
    """The mean of ``score`` in ``style``, and the ``ends`` of its interval with ``gap`` between them."""
    text = Text(number(score["mean"]), style)
    return text.append(f" [{ends[0]},{gap}{ends[1]}]", "not bold dim") if ends else text


def _gain(gain: Gain | None) -> Text:
    """The paired difference from the base model: only one that is significant has a colour."""
    if gain is None:
        return Text("–")
    if gain.kind == "same":
        return Text(f"{number(gain.change, '+')} n.s.", "dim")
    return Text(number(gain.change, "+"), "green" if gain.kind == "better" else "red")
