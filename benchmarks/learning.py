"""Makes Markdown tables of finished learning runs, and a picture of their reward.

for s in 0 1 2; do posttrain run shapes-dpo --set seed=$s --output runs/shapes-dpo-$s; done
python -m benchmarks.learning picture.svg runs/shapes-dpo-*

It also takes the records of chains, which `python -m benchmarks.evidence run` makes:

python -m benchmarks.learning docs/learning.svg benchmarks/evidence/records/{nft,awm}-?.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.evidence.statistics import difference as of_seeds
from posttrain.evaluation.intervals import paired_difference
from posttrain.evaluation.report.curves import chart
from posttrain.evaluation.report.results import load_results
from posttrain.evaluation.report.verdict import difference
from posttrain.support.records import read_object
from posttrain.support.wording import short

STYLE = (
    "<style>svg{font-family:sans-serif;background:#fff}.title{font-size:14px;font-weight:600}"
    ".tick{font-size:11px;fill:#66707e}.grid{stroke:#e3e7ec}</style>"
)


CHANGE = "{:+.3f} [{:+.3f}, {:+.3f}]"


class Trained(NamedTuple):
    """What a stage of RL gained, what it cost, and its reward by step."""

    name: str
    before: float
    after: float
    gain: tuple[float, float, float]
    cost: Mapping[str, Any]
    rewards: Sequence[tuple[float, float]]


def of_run(folder: Path) -> Iterator[Trained]:
    """Each stage of a run, against the base."""
    base, *stages = load_results(folder).stages
    for stage in stages:
        score = next(iter(stage.scores))
        before, after = (s.scores[score]["mean"] for s in (base, stage))
        gain = difference(base, stage, score)
        assert gain is not None, "both were evaluated"
        rewards = [(row["step"], row["reward"]) for row in stage.metrics if "reward" in row]
        yield Trained(folder.name, before, after, gain, stage.account, rewards)


def of_record(file: Path) -> Trained:
    """A chain's stage of RL, against the weights that it started from."""
    record = read_object(file, "evaluations", "prompts", "cost", "rewards")
    evaluations = record["evaluations"]
    first, last = (evaluations[key]["shapes"] for key in (min(evaluations), max(evaluations)))
    gain = paired_difference(first, last, groups=record["prompts"])
    rewards = list(enumerate(record["rewards"], 1))
    return Trained(file.stem, fmean(first), fmean(last), gain, record["cost"], rewards)


def on_the_way(files: Sequence[Path]) -> Iterator[str]:
    """The lines of a table: the gain of each chain at its readings, each after a part of its steps.

    A seed's interval is for other prompts; that of all seeds together is for other seeds and other prompts.
    """
    records = [read_object(file, "arm", "evaluations", "prompts", "readings") for file in files]
    parts = sorted({part for record in records for part in _parts(record)} - {Fraction(0)})
    yield f"| run | {' | '.join('at the end' if part == 1 else f'after {part}' for part in parts)} |"
    yield "| --- |" + " --- |" * len(parts)
    for arm in dict.fromkeys(record["arm"] for record in records):
        seeds = [record for record in records if record["arm"] == arm]
        for of in ([seed] for seed in seeds):
            yield f"| {arm}-{of[0]['seed']} | {' | '.join(_gained(of, part) for part in parts)} |"
        if len(seeds) > 1:
            yield f"| {arm}, all | {' | '.join(_gained(seeds, part) for part in parts)} |"


def _parts(record: Mapping[str, Any]) -> list[Fraction]:
    """The part of a chain's steps that each of its readings comes after."""
    readings = record["readings"]
    return [Fraction(reading["step"], readings[-1]["step"]) for reading in readings]


def _gained(seeds: Sequence[Mapping[str, Any]], part: Fraction) -> str:
    """The gain of one arm's ``seeds`` after a ``part`` of its steps; empty if one was not measured then."""
    before, then = [], []
    for record in seeds:
        at = {part: str(i) for i, part in enumerate(_parts(record))}
        if part not in at:
            return ""
        before.append(record["evaluations"]["0"]["shapes"])
        then.append(record["evaluations"][at[part]]["shapes"])
    prompts = seeds[0]["prompts"]
    if len(seeds) > 1:
        return str(of_seeds(before, then, prompts))
    return CHANGE.format(*paired_difference(before[0], then[0], groups=prompts))


def main(picture: str, *paths: str) -> None:
    """Print the tables and write the picture of the run folders and records at ``paths``."""
    series = {}
    print("| run | before | trained | difference, 95 % | forward-equivalents | images | minutes |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for path in map(Path, paths):
        for name, before, after, gain, cost, rewards in [of_record(path)] if path.is_file() else of_run(path):
            minutes = cost["seconds"] / 60
            print(
                f"| {name} | {before:.3f} | {after:.3f} | {CHANGE.format(*gain)} "
                f"| {short(cost['forward_equivalents'])} | {short(cost['samples'])} | {minutes:.0f} |"
            )
            series[name] = rewards
    if files := [path for path in map(Path, paths) if path.is_file()]:
        print("", *on_the_way(files), sep="\n")
    svg = str(chart("reward of the rollouts, by optimizer step", series, 720, 300))
    Path(picture).write_text(
        svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ').replace(">", f">{STYLE}", 1),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
