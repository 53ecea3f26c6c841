"""Makes a Markdown table of finished learning runs, and a picture of their reward.

for s in 0 1 2; do posttrain run shapes-dpo --set seed=$s --output runs/shapes-dpo-$s; done
python benchmarks/learning.py picture.svg runs/shapes-dpo-*

It also takes the records of chains, which `python -m benchmarks.evidence run` makes:

python benchmarks/learning.py docs/learning.svg benchmarks/evidence/records/{nft,awm}-?.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

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


def main(picture: str, *paths: str) -> None:
    """Print the table and write the picture of the run folders and records at ``paths``."""
    series = {}
    print("| run | before | trained | difference, 95 % | forward-equivalents | images | minutes |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for path in map(Path, paths):
        for name, before, after, gain, cost, rewards in [of_record(path)] if path.is_file() else of_run(path):
            change = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*gain)
            print(
                f"| {name} | {before:.3f} | {after:.3f} | {change} | {short(cost['forward_equivalents'])} "
                f"| {short(cost['samples'])} | {cost['seconds'] / 60:.0f} |"
            )
            series[name] = rewards
    svg = str(chart("reward of the rollouts, by optimizer step", series, 720, 300))
    Path(picture).write_text(
        svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ').replace(">", f">{STYLE}", 1),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
