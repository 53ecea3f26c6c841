"""Draws a grid of images of fixed prompts and noise while a stage trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posttrain.data.prompts import prompt_rows
from posttrain.data.source import BatchSource
from posttrain.engine.tracker import Tracker
from posttrain.engine.trainer import EMA
from posttrain.sampling.latents import sample_images
from posttrain.stages.hooks.hook import Hook
from posttrain.stages.stage_run import Training
from posttrain.support.files import write
from posttrain.support.images import grid, grid_png

if TYPE_CHECKING:
    from posttrain.recipe.schema import Recipe

SHOWN = 8
"""Prompts in a grid."""
COLUMNS = 4


class ImageGrids(Hook):
    """Writes ``samples/step-N.png`` every ``train.sample_every`` steps and after the last."""

    def __init__(self, training: Training, tracker: Tracker | None) -> None:
        self.run, self.policy, self.tracker = training.run, training.policy, tracker
        self.prompts, self.sampling = grid_samples(training.run.recipe, training.source)

    def between_batches(self, step: int, *, last: bool) -> bool:
        every = self.run.stage.train.sample_every
        if every and (last or step % every == 0):
            self._draw(step)
        return True

    def _draw(self, step: int) -> None:
        """Draw with the weights that would be exported. The cost does not count as the stage's."""
        spent = self.policy.forward_equivalents
        with self.policy.using(EMA if EMA in self.policy.roles else None):
            images = sample_images(self.policy, self.prompts, [0] * len(self.prompts), **self.sampling)
        self.policy.forward_equivalents = spent
        if self.tracker is None:
            return
        picture = grid(images.cpu(), COLUMNS, captions=self.prompts)
        write(self.run.folder / "samples" / f"step-{step:08d}.png", grid_png(picture))
        self.tracker.image("samples", step, picture)


def grid_samples(recipe: Recipe, source: BatchSource) -> tuple[list[str], dict[str, Any]]:
    """The prompts of a stage's grids, and the settings for :func:`sample_images`.

    They are the evaluation's where the recipe has one, and those of the stage's data otherwise.
    """
    if (evaluation := recipe.evaluation) is not None:
        prompts = [row["prompt"] for row in prompt_rows(evaluation.prompts)]
        settings = evaluation.model_dump(include={"resolution", "steps", "guidance", "solver", "seed"})
    else:
        prompts = source.prompts
        usual = recipe.model.guidance_rule().usual
        settings = {"resolution": source.size[0], "steps": 40, "guidance": 4.5 if usual is None else usual}
    return list(dict.fromkeys(prompts))[:SHOWN], settings
