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

from posttrain.curves import Series, chart
from posttrain.results import Results, StageResult, difference, load_results, short, verdict

LEAST_SHOWN = 96
"""Pixels; tiny images are stored as they are and enlarged by the page."""
MOST_STORED = 512
SMALL = ("grad_norm", "learning_rate", "images_per_second")


def write_report(run: Path) -> Path:
    """Write ``run/report.html``: self-contained, no script, no network. Returns its path."""
    results = load_results(run)
    environment = Environment(loader=PackageLoader("posttrain", "."), autoescape=True, trim_blocks=True)
    page = environment.get_template("report.html.j2").render(
        results=results,
        verdict=verdict(results),
        rows=[_row(results, stage) for stage in results.stages],
        tags=_tags(results),
        curves=list(_curves(results)),
        grid=_grid(results),
        skipped=[(s.name, line) for s in results.stages for line in s.account.get("skipped", [])],
    )
    target = run / "report.html"
    target.write_text(page)
    return target


def table(run: Path, width: int = 120) -> Table:
    """The results as a table for a terminal of ``width`` columns; a narrow one leaves details out."""
    results = load_results(run)
    names = [name for name in results.score_names if width >= 105 or "/" not in name]
    shown = Table(title=verdict(results), title_justify="left", title_style="bold", box=None, pad_edge=False)
    shown.add_column("stage", no_wrap=True)
    for name in names:
        shown.add_column(f"{name}\n[dim]mean \\[95 %][/dim]", justify="right", no_wrap=True)
    for name in ("forward-eq.", "images/s", "peak mem."):
        shown.add_column(name, justify="right", no_wrap=True)
    best = _best(results)
    for stage in results.stages:
        cells = [_interval(stage, name, best.get(name) == stage.name) for name in names]
        shown.add_row(stage.name, *cells, *_cost(stage))
    return shown


def summary_table(name: str, summary: dict[str, Any]) -> Table:
    """One evaluation's scores, in all and by kind of task."""
    shown = Table(title=name, title_justify="left", title_style="bold", box=None, pad_edge=False)
    shown.add_column("prompts", no_wrap=True)
    for score in summary["scores"]:
        shown.add_column(f"{score}\n[dim]mean \\[95 %][/dim]", justify="right", no_wrap=True)
    for label, scores in {"all": summary["scores"], **summary["tags"]}.items():
        cells = (f"{s['mean']:.3f} [dim]\\[{s['low']:.3f}, {s['high']:.3f}][/dim]" for s in scores.values())
        shown.add_row(label, *cells)
    return shown


def _interval(stage: StageResult, name: str, best: bool) -> str:
    if (score := stage.scores.get(name)) is None:
        return "–"
    mean = f"[bold green]{score['mean']:.3f}[/bold green]" if best else f"{score['mean']:.3f}"
    return f"{mean} [dim]\\[{score['low']:.2f}, {score['high']:.2f}][/dim]"


def _cost(stage: StageResult) -> list[str]:
    account = stage.account
    rate = account.get("images_per_second")
    return [
        short(account.get("forward_equivalents")),
        "–" if rate is None else f"{rate:.1f}",
        short(account.get("peak_memory_bytes"), "B"),
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
    account = stage.account
    steps, trained = account.get("steps"), account.get("trainable_parameters")
    return {
        "stage": stage,
        "scores": scores,
        "cost": [*_cost(stage), short(steps), short(trained), short(account.get("seconds"), "s")],
    }


def _tags(results: Results) -> list[dict[str, Any]]:
    """For the first score: a row for each kind of task, a cell for each stage."""
    if not results.score_names:
        return []
    score = results.score_names[0]
    names = dict.fromkeys(tag for stage in results.stages for tag in stage.summary.get("tags", {}))
    rows = []
    for tag in names:
        cells = [stage.summary.get("tags", {}).get(tag, {}).get(score) for stage in results.stages]
        means = [cell["mean"] for cell in cells if cell]
        rows.append({"tag": tag, "cells": cells, "best": max(means) if means else None})
    return rows


def _curves(results: Results) -> Iterable[Any]:
    trained = [stage for stage in results.stages if stage.metrics]

    def series(name: str) -> dict[str, Series]:
        return {s.name: [(row["step"], row[name]) for row in s.metrics if name in row] for s in trained}

    own = [
        n for s in trained for n in s.metrics[-1] if n not in (*SMALL, "step", "time", "forward_equivalents")
    ]
    for name in dict.fromkeys(["loss", *own, *SMALL]):
        if svg := chart(name, series(name)):
            yield svg


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
