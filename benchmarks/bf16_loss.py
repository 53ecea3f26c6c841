"""Trains the shipped Shapes model in float32 and in bf16 on the same samples, and prints the losses.

    python benchmarks/bf16_loss.py
    python benchmarks/bf16_loss.py --steps 200 --batch 16 --tune lora

The third column is float32 with another training seed: how far two runs of equal precision are apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from posttrain.engine.tracker import read_metrics
from posttrain.recipe.file import parse_recipe
from posttrain.stages.chain import run

RECIPE = """
name: precision
seed: {seed}
tracker: none
device: {device}
model: {{type: sd3, path: posttrain/tiny-sd3, max_sequence_length: 16}}
stages:
  - name: {precision}
    algorithm: {{type: sft}}
    data: {{type: shapes, images: 1000, seed: 1}}
    tune: {{type: {tune}}}
    train: {{steps: {steps}, batch_size: {batch}, micro_batch: 4, learning_rate: 1e-4, precision: {precision},
            log_every: 1, sample_every: null, checkpoint_every: {steps}}}
"""


def losses(options: argparse.Namespace, precision: str, seed: int) -> list[float]:
    """The loss of every step."""
    settings = {**vars(options), "precision": precision, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        run(parse_recipe(RECIPE.format(**settings), "precision.yaml"), Path(folder) / "run")
        return [row["loss"] for row in read_metrics(Path(folder) / "run" / precision / "metrics.jsonl")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tune", choices=("full", "lora"), default="full")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    runs = {
        "fp32": losses(options, "fp32", 1),
        "bf16": losses(options, "bf16", 1),
        "fp32, other seed": losses(options, "fp32", 2),
    }
    print(f"{'steps':>12} " + " ".join(f"{name:>18}" for name in runs))
    each = max(options.steps // 5, 1)
    for start in range(0, options.steps, each):
        means = [statistics.fmean(values[start : start + each]) for values in runs.values()]
        print(f"{start + 1:>5} to {start + each:>3} " + " ".join(f"{mean:18.5f}" for mean in means))
    apart = [abs(a - b) for a, b in zip(runs["fp32"], runs["bf16"], strict=True)]
    print(f"a step's loss differs by {statistics.fmean(apart):.2g} on average, {max(apart):.2g} at most")


if __name__ == "__main__":
    main()
