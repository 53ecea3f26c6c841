"""Writes the report of a run: one HTML page that opens without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from PIL import Image

from posttrain.evaluation.report.curves import Series, chart, histogram
from posttrain.evaluation.report.results import Results, StageResult, cost_texts, load_results
from posttrain.evaluation.report.verdict import best_stage, difference, verdict
from posttrain.support.files import write
from posttrain.support.wording import duration

TINY_PIXELS = 96
"""Images up to this width are stored unchanged, and the page enlarges them."""
STORED_PIXELS = 512
"""Larger images are made smaller, so that no side has more pixels."""
LAST_CURVES = ("grad_norm", "learning_rate", "images_per_second")
NO_CURVE = ("step", "time", "forward_equivalents")


def write_report(run: Path) -> Path:
    """Write ``run/report.html``, which needs no script, network or other file. Returns its path."""
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


def _row(results: Results, stage: StageResult) -> dict[str, Any]:
    """The cells of a stage in the table of results."""
    base, scores = results.stages[0], []
    for name in results.score_names:
        score = stage.scores.get(name)
        gain = difference(base, stage, name) if score and stage is not base else None
        scores.append({"score": score, "best": best_stage(results, name) is stage, "gain": gain})
    cost = [*cost_texts(stage), duration(stage.account.get("seconds"))]
    return {"stage": stage, "scores": scores, "cost": cost}


def _tags(results: Results) -> list[dict[str, Any]]:
    """The first score by tag: a row for each tag, with a cell for each stage."""
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
    """A chart of each metric with numbers, and a histogram of each that is binned."""
    trained = [stage for stage in results.stages if stage.metrics]

    def series(name: str) -> dict[str, Series]:
        return {
            s.name: [(row["step"], row[name]) for row in s.metrics if isinstance(row.get(name), int | float)]
            for s in trained
        }

    # of all rows, since some metrics are recorded only in some steps
    recorded = dict.fromkeys(name for stage in trained for row in stage.metrics for name in row)
    main = [name for name in recorded if name not in (*LAST_CURVES, *NO_CURVE)]
    for name in dict.fromkeys(["reward", "loss", *main, *LAST_CURVES]):
        if svg := chart(name, series(name)):
            yield svg
        for stage in trained:
            binned = [row[name] for row in stage.metrics if isinstance(row.get(name), dict)]
            if binned:
                yield histogram(f"{name}, {stage.name}, last batch recorded", **binned[-1])


def _grid(results: Results) -> dict[str, Any]:
    """The images of the stages' grids, side by side for each prompt."""
    stages = [stage for stage in results.stages if stage.images]
    prompts = dict.fromkeys(prompt for stage in stages for prompt in stage.images)
    rows = [(prompt, [_data_url(stage.images.get(prompt)) for stage in stages]) for prompt in prompts]
    return {"stages": [stage.name for stage in stages], "rows": rows}


def _data_url(path: Path | None) -> str | None:
    """An image file as a data URL; large images become JPEG."""
    if path is None:
        return None
    with Image.open(path) as image:
        if image.width <= TINY_PIXELS:
            return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        image.thumbnail((STORED_PIXELS, STORED_PIXELS))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
