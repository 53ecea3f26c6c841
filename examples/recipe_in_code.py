"""Trains the tiny model by SFT and SOAR with a recipe that is written in Python, and reads the results.

Run it from anywhere: ``python examples/recipe_in_code.py``. It takes about a minute on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import posttrain
from posttrain import Evaluation, Recipe, Stage, Train
from posttrain.algorithms.sft import SFT
from posttrain.algorithms.soar import SOAR
from posttrain.data.image_data import ShapesData
from posttrain.data.settings import ShapesPrompts
from posttrain.models.sd3 import SD3
from posttrain.rewards.shapes import Shapes


def recipe(steps: int = 20) -> Recipe:
    """Two stages from the tiny model, and an evaluation of 24 prompts."""
    data = ShapesData(images=200)
    train = Train(steps=steps, batch_size=8, learning_rate=5e-4)
    return Recipe(
        name="recipe-in-code",
        model=SD3(path="posttrain/tiny-sd3", max_sequence_length=16),
        stages=[
            Stage(name="sft", algorithm=SFT(), data=data, train=train),
            Stage(name="soar", algorithm=SOAR(), data=data, train=train, start_from="base"),
        ],
        evaluation=Evaluation(
            prompts=ShapesPrompts(count=24), rewards=[Shapes()], resolution=64, steps=10, guidance=4.0
        ),
    )


def main(folder: Path) -> None:
    result = posttrain.run(recipe(), folder)
    print(result)
    for stage in result.stages:
        print(stage, result.scores(stage), result.final(stage))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/recipe-in-code"))
