"""Draws the curves of stages: the few that matter first, then the others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from markupsafe import Markup

from posttrain.evaluation.report.curves import Series, chart, histogram
from posttrain.evaluation.report.results import StageResult

FIRST = (r"reward", r"heldout/[^/]+", r"alarm/.*", r"loss", r"kl")
"""Metrics that say how a stage went, in the order in which they are shown."""
LAST = ("grad_norm", "learning_rate", "images_per_second")
NO_CURVE = ("step", "time", "forward_equivalents")


def curves(stages: Sequence[StageResult]) -> tuple[list[Markup], list[Markup]]:
    """The charts of the metrics that matter most, and those of all others. Each chart has all stages."""
    # of all rows, since some metrics are recorded only in some steps
    recorded = dict.fromkeys(name for stage in stages for row in stage.metrics for name in row)
    names = [name for name in recorded if name not in NO_CURVE]
    first = [name for form in FIRST for name in names if re.fullmatch(form, name)]
    others = [name for name in names if name not in (*first, *LAST)]
    others += [name for name in LAST if name in names]
    return list(_charts(first, stages)), list(_charts(others, stages))


def _charts(names: Sequence[str], stages: Sequence[StageResult]) -> Iterator[Markup]:
    """A chart of each metric with numbers, and a histogram of each that is binned."""
    for name in names:
        # all stages, so that each has its colour, even if others lack the metric
        series: dict[str, Series] = {
            s.name: [(row["step"], row[name]) for row in s.metrics if isinstance(row.get(name), int | float)]
            for s in stages
        }
        if svg := chart(name, series):
            yield svg
        for i, stage in enumerate(stages):
            binned = [row[name] for row in stage.metrics if isinstance(row.get(name), dict)]
            if binned:
                yield histogram(f"{name}, {stage.name}, last batch recorded", **binned[-1], color=i)
