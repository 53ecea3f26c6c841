"""Shows the result of a run in a notebook: a table of the scores, and the grid of images, small."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from posttrain.errors import DamagedError
from posttrain.evaluation.report.pictures import TINY_PIXELS, data_url

PROMPTS = 8
"""The grid shows the images of so many prompts."""
TEMPLATE = """\
<div class="posttrain-result">
<p><b>{{ folder }}</b></p>
{% if scores %}
<table>
<thead><tr><th>stage</th>{% for score in scores %}<th>{{ score }}<br><small>mean [95 %]</small></th>
{% endfor %}</tr></thead>
<tbody>
{% for stage, cells in rows %}
<tr><th>{{ stage }}</th>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
{% else %}
<p>{{ stages|join(", ") or "no stage so far" }}</p>
{% endif %}
{% if prompts %}
<table>
<thead><tr><th></th>{% for prompt in prompts %}<th><small>{{ prompt }}</small></th>{% endfor %}</tr></thead>
<tbody>
{% for stage, images in grid %}
<tr><th>{{ stage }}</th>{% for prompt, image in images %}
<td>{% if image %}<img src="{{ image }}" alt="{{ prompt }}" width="{{ width }}">{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
{% endif %}
</div>
"""


def html(
    folder: Path,
    stages: Sequence[str],
    table: Sequence[Mapping[str, Any]],
    images: Mapping[str, Mapping[str, Path]],
) -> str:
    """A run's result as HTML that needs no other file. Every name and prompt is escaped.

    ``table`` is that of :meth:`posttrain.stages.result.RunResult.table`; ``images`` are stage -> prompt ->
    the file of its first image.
    """
    scores = list(dict.fromkeys(row["score"] for row in table if "/" not in row["score"]))
    cells = {(row["stage"], row["score"]): _cell(row) for row in table}
    prompts = [*dict.fromkeys(prompt for of_stage in images.values() for prompt in of_stage)][:PROMPTS]
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    return environment.from_string(TEMPLATE).render(
        folder=str(folder),
        stages=stages,
        scores=scores,
        rows=[(stage, [cells.get((stage, score), "–") for score in scores]) for stage in stages],
        prompts=prompts,
        grid=[(s, [(p, _image(files.get(p))) for p in prompts]) for s, files in images.items() if files],
        width=TINY_PIXELS,
    )


def _cell(row: Mapping[str, Any]) -> str:
    """The mean, its interval, and the paired difference from the base model, where it is known."""
    known = math.isfinite(row["high"])
    text = f"{row['mean']:.3f}" + (f" [{row['low']:.3f}, {row['high']:.3f}]" if known else "")
    if "gain_mean" not in row:
        return text
    significant = row["gain_low"] > 0 or row["gain_high"] < 0
    return f"{text}, {row['gain_mean']:+.3f}{'' if significant else ' n.s.'}"


def _image(file: Path | None) -> str | None:
    """The image as a data URL; None if it is not there or damaged."""
    if file is None:
        return None
    try:
        return data_url(file, 2 * TINY_PIXELS)[0]
    except DamagedError:
        return None
