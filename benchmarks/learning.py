"""Makes a Markdown table of finished learning runs, and a picture of their reward.

for s in 0 1 2; do posttrain run shapes-nft --set seed=$s --output runs/shapes-nft-$s; done
python benchmarks/learning.py docs/learning.svg runs/shapes-nft-*
"""

from __future__ import annotations

import sys
from pathlib import Path

from posttrain.evaluation.report.curves import chart
from posttrain.evaluation.report.results import load_results
from posttrain.evaluation.report.verdict import difference
from posttrain.support.wording import short

STYLE = (
    "<style>svg{font-family:sans-serif;background:#fff}.title{font-size:14px;font-weight:600}"
    ".tick{font-size:11px;fill:#66707e}.grid{stroke:#e3e7ec}</style>"
)


def main(picture: str, *folders: str) -> None:
    series = {}
    print("| run | base | trained | difference, 95 % | forward-equivalents | images | minutes |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for folder in map(Path, folders):
        base, *stages = load_results(folder).stages
        for stage in stages:
            score = next(iter(stage.scores))
            before, after = (s.scores[score]["mean"] for s in (base, stage))
            gain = difference(base, stage, score)
            assert gain is not None, "both were evaluated"
            account = stage.account
            change = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*gain)
            print(
                f"| {folder.name} | {before:.3f} | {after:.3f} | {change} "
                f"| {short(account['forward_equivalents'])} | {short(account['samples'])} "
                f"| {account['seconds'] / 60:.0f} |"
            )
            points = [(row["step"], row["reward"]) for row in stage.metrics if "reward" in row]
            series[folder.name] = points
    svg = str(chart("reward of the rollouts, by optimizer step", series, 720, 300))
    Path(picture).write_text(
        svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ').replace(">", f">{STYLE}", 1),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
