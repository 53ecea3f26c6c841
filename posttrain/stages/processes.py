"""Checks that a recipe can run in a given number of processes."""

from __future__ import annotations

import math

from posttrain.errors import RecipeError
from posttrain.recipe.schema import Recipe
from posttrain.support.wording import nearest


def check_processes(recipe: Recipe, processes: int) -> None:
    """Raise RecipeError where the recipe cannot run in that many processes."""
    if problem := recipe.parallel.problem(processes):
        raise RecipeError(f"parallel: {problem}")
    for stage in recipe.stages:
        size = stage.train.batch_size
        if stage.data.gives == "prompts" and size % processes:
            unit = math.lcm(stage.algorithm.samples_per_prompt, processes)
            raise RecipeError(
                f"stages.{stage.name}.train.batch_size: {size} samples do not split over {processes} "
                f"processes; {nearest(size, unit)}"
            )
