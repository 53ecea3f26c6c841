"""How does a run show its results: a table in the terminal, and one page that opens offline?"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from PIL import Image
from rich.table import Table
from rich.text import Text

from posttrain.evaluation.report.curves import Series, chart, histogram
from posttrain.evaluation.report.results import Results, StageResult, difference, load_results, verdict
from posttrain.support.files import write
from posttrain.support.wording import duration, short

LEAST_SHOWN = 96
"""Pixels; tiny images are stored as they are and enlarged by the page."""
MOST_STORED = 512
SMALL = ("grad_norm", "learning_rate", "images_per_second")
NO_CURVE = ("step", "time", "forward_equivalents")
COSTS = (("forward-eq.", 2), ("images/s", 4), ("peak mem.", 5), ("steps", 7), ("trained", 8))
"""Heading and rank of what a stage cost, in the order of :func:`_cost`."""
Column = tuple[Text, list[Text], int]
"""Heading, a cell for each stage, and rank: the higher, the sooner a narrow terminal goes without."""


def write_report(run: Path) -> Path:
    """Write ``run/report.html``: self-contained, no script, no network. Returns its path."""
    results = load_results(run)
    loader = PackageLoader("posttrain.evaluation.report", "")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True)
    page = environment.get_template("report.html.j2").render(
        results=results,
        verdict=verdict(results),
        rows=[_row(results, stage) for stage in results.stages],
        tags=_tags(results),
        curves=list(_curves(results)),
        grid=_grid(results),
        alarms=[line for s in results.stages for line in s.account.get("alarms", [])],
        skipped=[(s.name, line) for s in results.stages for line in s.account.get("skipped", [])],
    )
    target = run / "report.html"
    write(target, page)
    return target


def table(run: Path, width: int = 120) -> Table:
    """The results as a table for a terminal of ``width`` columns.

    A narrow one leaves whole columns out, the least important first, then the intervals: no number is
    ever cut.
    """
    results = load_results(run)
    columns = _fitting(_columns(results, intervals=True), width)
    if _width(columns) > width:
        columns = _fitting(_columns(results, intervals=False), width)
    title = Text(verdict(results), "bold")
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, (header, _, _) in enumerate(columns):
        shown.add_column(header, justify="right" if i else "left", no_wrap=True)
    for cells in zip(*(cells for _, cells, _ in columns), strict=True):
        shown.add_row(*cells)
    return shown


def card_table(name: str, card: dict[str, Any]) -> Table:
    """One evaluation's scores, in all and by kind of task."""
    shown = Table(title=name, title_justify="left", title_style="bold", box=None, pad_edge=False)
    shown.add_column("prompts", no_wrap=True)
    for score in card["scores"]:
        shown.add_column(f"{score}\n[dim]mean \\[95 %][/dim]", justify="right", overflow="fold")
    for label, scores in {"all": card["scores"], **card["tags"]}.items():
        cells = (
            f"{s['mean']:.3f} [dim]\\[{s['low']:.3f},\u00a0{s['high']:.3f}][/dim]" for s in scores.values()
        )
        shown.add_row(label, *cells)
    if card["tag_means"]:
        shown.add_row("mean of kinds", *(f"{mean:.3f}" for mean in card["tag_means"].values()))
    return shown


def _columns(results: Results, *, intervals: bool) -> list[Column]:
    """Every column of the terminal's table, in order of place."""
    stages, best, names = results.stages, _best(results), results.score_names
    columns: list[Column] = [(Text("stage"), [Text(stage.name) for stage in stages], 0)]
    for i, name in enumerate(names):
        header = Text(f"{name}\n").append("mean [95 %]" if intervals else "mean", "dim")
        cells = [_score(stage, name, best.get(name) == stage.name, intervals) for stage in stages]
        # the first score is what the run is about; details of a score can wait
        columns.append((header, cells, 0 if i == 0 else 6 if "/" in name else 1))
        if i == 0:
            columns.append((Text("against\nbase"), [_gain(stages[0], s, name) for s in stages], 3))
    costs = [[Text(figure) for figure in _cost(stage)] for stage in stages]
    for i, (header, rank) in enumerate(COSTS):
        columns.append((Text(header), [cost[i] for cost in costs], rank))
    return columns


def _fitting(columns: list[Column], width: int) -> list[Column]:
    """``columns`` without those of the highest ranks, so that the rest fits; those of rank 0 stay."""
    kept = list(columns)
    while _width(kept) > width and (worst := max(rank for _, _, rank in kept)):
        del kept[max(i for i, (_, _, rank) in enumerate(kept) if rank == worst)]
    return kept


def _width(columns: list[Column]) -> int:
    texts = ([header, *cells] for header, cells, _ in columns)
    return sum(max(line.cell_len for t in column for line in t.split()) for column in texts) + 2 * (
        len(columns) - 1
    )


def _score(stage: StageResult, name: str, best: bool, interval: bool) -> Text:
    if (score := stage.scores.get(name)) is None:
        return Text("–")
    text = Text(f"{score['mean']:.3f}", "bold green" if best else "")
    return text.append(f" [{score['low']:.2f}, {score['high']:.2f}]", "not bold dim") if interval else text


def _gain(base: StageResult, stage: StageResult, name: str) -> Text:
    """The paired difference from the base model, dim where chance explains it."""
    if stage is base or (gain := difference(base, stage, name)) is None:
        return Text("–")
    change, low, high = gain
    return Text(f"{change:+.3f} n.s.", "dim") if low <= 0 <= high else Text(f"{change:+.3f}")


def _cost(stage: StageResult) -> list[str]:
    account = stage.account
    rate = account.get("images_per_second")
    return [
        short(account.get("forward_equivalents")),
        "–" if rate is None else f"{rate:.1f}",
        short(account.get("peak_memory_bytes"), "B"),
        short(account.get("steps")),
        short(account.get("trainable_parameters")),
    ]


def _best(results: Results) -> dict[str, str]:
    """Score -> the stage that has the best mean."""
    found = {}
    for name in results.score_names:
        measured = [s for s in results.stages if name in s.scores]
        sign = 1 if measured[0].scores[name].get("higher_is_better", True) else -1
        found[name] = max(measured, key=lambda s, n=name, g=sign: g * s.scores[n]["mean"]).name
    return found


def _row(results: Results, stage: StageResult) -> dict[str, Any]:
    best, base = _best(results), results.stages[0]
    scores = []
    for name in results.score_names:
        score = stage.scores.get(name)
        gain = difference(base, stage, name) if score and stage is not base else None
        scores.append({"score": score, "best": best.get(name) == stage.name, "gain": gain})
    cost = [*_cost(stage), duration(stage.account.get("seconds"))]
    return {"stage": stage, "scores": scores, "cost": cost}


def _tags(results: Results) -> list[dict[str, Any]]:
    """For the first score: a row for each kind of task, a cell for each stage."""
    if not results.score_names:
        return []
    score = results.score_names[0]
    measured = next(stage.scores[score] for stage in results.stages if score in stage.scores)
    pick = max if measured.get("higher_is_better", True) else min
    names = dict.fromkeys(tag for stage in results.stages for tag in stage.card.get("tags", {}))
    rows = []
    for tag in names:
        cells = [stage.card.get("tags", {}).get(tag, {}).get(score) for stage in results.stages]
        means = [cell["mean"] for cell in cells if cell]
        rows.append({"tag": tag, "cells": cells, "best": pick(means) if means else None})
    return rows


def _curves(results: Results) -> Iterable[Any]:
    trained = [stage for stage in results.stages if stage.metrics]

    def series(name: str) -> dict[str, Series]:
        return {
            s.name: [(row["step"], row[name]) for row in s.metrics if isinstance(row.get(name), int | float)]
            for s in trained
        }

    # any row, not the last: some metrics are logged only now and then
    own = dict.fromkeys(name for stage in trained for row in stage.metrics for name in row)
    first = [name for name in own if name not in (*SMALL, *NO_CURVE)]
    for name in dict.fromkeys(["reward", "loss", *first, *SMALL]):
        if svg := chart(name, series(name)):
            yield svg
        for stage in trained:
            binned = [row[name] for row in stage.metrics if isinstance(row.get(name), dict)]
            if binned:
                yield histogram(f"{name}, {stage.name}, last batch recorded", **binned[-1])


def _grid(results: Results) -> dict[str, Any]:
    stages = [stage for stage in results.stages if stage.images]
    prompts = dict.fromkeys(prompt for stage in stages for prompt in stage.images)
    rows = [(prompt, [_data(stage.images.get(prompt)) for stage in stages]) for prompt in prompts]
    return {"stages": [stage.name for stage in stages], "rows": rows}


def _data(path: Path | None) -> str | None:
    """An image file as a data address, JPEG where it is large."""
    if path is None:
        return None
    with Image.open(path) as image:
        if image.width <= LEAST_SHOWN:
            return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        image.thumbnail((MOST_STORED, MOST_STORED))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
