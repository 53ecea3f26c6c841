"""Makes the Markdown tables of the evidence from its records."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.statistics import Difference, difference
from posttrain.errors import PosttrainError
from posttrain.support.wording import short

Records = Mapping[str, Sequence[Mapping[str, Any]]]
"""An arm's records in the order of their seeds; the base has one."""


def read(folder: Path) -> Records:
    """The records of ``folder``, by arm. Raises PosttrainError if they start from two base models."""
    found: dict[str, list[Any]] = defaultdict(list)
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text("utf-8"))
        found[record["arm"]].append(record)
    if len(bases := {record["base"] for records in found.values() for record in records}) > 1:
        raise PosttrainError(f"{folder}: records of {len(bases)} base models; remove those of the older one")
    return {arm: sorted(records, key=lambda r: r["seed"]) for arm, records in found.items()}


def between(records: Records, arm: str, against: str, score: str, steps: int) -> Difference | None:
    """``arm`` minus ``against`` on the seeds that both have; None if there are fewer than two."""
    theirs = {r["seed"]: r for r in records.get(against, ())}
    pairs = [(theirs["base" if against == "base" else r["seed"]], r) for r in _paired(records, arm, theirs)]
    if len(pairs) < 2:
        return None
    a, b = ([record["evaluations"][str(steps)] for record in side] for side in zip(*pairs, strict=True))
    if any(e["prompts"] != a[0]["prompts"] for e in (*a, *b)):
        raise PosttrainError(f"{arm} and {against} were evaluated on other prompts")
    return difference([e["scores"][score] for e in a], [e["scores"][score] for e in b], a[0]["prompts"])


def _paired(records: Records, arm: str, theirs: dict[Any, Any]) -> list[Mapping[str, Any]]:
    """The records of ``arm`` whose seed the other one has. The base has no training seed: all have it."""
    if theirs and next(iter(theirs.values()))["arm"] == "base":
        theirs["base"] = next(iter(theirs.values()))
        return list(records.get(arm, ()))
    return [r for r in records.get(arm, ()) if r["seed"] in theirs]


def arms_table(records: Records, steps: int) -> Iterator[str]:
    """A row for each arm: its scores over all seeds, and the graded score's difference from its rival."""
    yield "| arm | seeds | graded | lenient | strict | against | graded, difference [95 %] | forwards |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name in ("base", *ARMS):
        if not (of := records.get(name)):
            continue
        scores = [record["evaluations"][str(steps)]["scores"] for record in of]
        means = [
            fmean(fmean(s[key]) for s in scores) for key in ("shapes", "shapes/lenient", "shapes/strict")
        ]
        against = "" if name == "base" else ARMS[name].against
        change = between(records, name, against, "shapes", steps) if against else None
        cost = short(fmean(r["cost"]["forward_equivalents"] for r in of)) if name != "base" else ""
        told = "" if change is None else f"{change}{'' if change.significant else ' n.s.'}"
        shown = " | ".join(f"{mean:.3f}" for mean in means)
        yield f"| `{name}` | {len(of)} | {shown} | {against and f'`{against}`'} | {told} | {cost} |"


def kinds_table(records: Records, steps: int) -> Iterator[str]:
    """The graded score of each arm by kind of task."""
    kinds = sorted({tag for r in records["base"] for tag in r["evaluations"][str(steps)]["tags"]})
    yield f"| arm | {' | '.join(kinds)} |"
    yield f"| --- |{' --- |' * len(kinds)}"
    for name in ("base", *ARMS):
        if not (of := records.get(name)):
            continue
        cells = []
        for kind in kinds:
            values = [
                score
                for record in of
                for score, tag in zip(
                    record["evaluations"][str(steps)]["scores"]["shapes"],
                    record["evaluations"][str(steps)]["tags"],
                    strict=True,
                )
                if tag == kind
            ]
            cells.append(f"{fmean(values):.3f}")
        yield f"| `{name}` | {' | '.join(cells)} |"


def bias_table(records: Records, rollout: int) -> Iterator[str]:
    """The squared error of the predicted image at the data's states and at the model's, in bands of sigma."""
    bands = [(0.75, 1.0), (0.5, 0.75), (0.25, 0.5), (0.0, 0.25)]
    yield f"| arm | {' | '.join(f'sigma {low:g} to {high:g}' for low, high in bands)} |"
    yield f"| --- |{' --- |' * len(bands)}"
    for name in ("base", *ARMS):
        if not (of := records.get(name)):
            continue
        rows = [row for record in of for row in record["exposure_bias"][str(rollout)]]
        cells = []
        for low, high in bands:
            of_band = [row for row in rows if low <= row["sigma"] < high]
            if not of_band:  # a rollout of several steps ends below the highest sigmas
                cells.append("")
                continue
            data, model = (fmean(row[key] for row in of_band) for key in ("data", "model"))
            cells.append(f"{data:.4f} to {model:.4f}")
        yield f"| `{name}` | {' | '.join(cells)} |"
