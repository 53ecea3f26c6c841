"""A whole run on a random pipeline and a few rendered shapes, in seconds."""

import io

import pytest
from pipelines import pipeline_folder
from rich.console import Console

from posttrain.recipe.file import parse_recipe
from posttrain.stages.chain import run
from posttrain.stages.watch import StageWatch

TRAIN = "{steps: 6, batch_size: 4, micro_batch: 4, learning_rate: 1e-3, checkpoint_every: 2, log_every: 1, ema: 0.9, sample_every: null}"
DATA = "{type: shapes, images: 10, seed: 1}"
HEAD = f"""
name: small
tracker: none
device: cpu
model: {{type: sd3, path: {pipeline_folder()}, max_sequence_length: 16}}
"""
EVALUATION = """
evaluation:
  prompts: {type: shapes, count: 6}
  rewards: shapes
  resolution: 16
  steps: 2
  guidance: 2
  grid: 2
"""


def stage(name, algorithm="{type: sft}", train=TRAIN, **fields):
    rest = "".join(f"    {key}: {value}\n" for key, value in fields.items())
    return f"  - name: {name}\n    algorithm: {algorithm}\n    data: {DATA}\n    train: {train}\n{rest}"


def recipe(*stages, evaluation="", head=HEAD, overrides=()):
    return parse_recipe(head + "stages:\n" + "".join(stages) + evaluation, "small.yaml", overrides)


def run_quietly(recipe, folder):
    """Runs it; returns what was printed."""
    text = io.StringIO()
    run(recipe, folder, Console(file=text, width=200))
    return text.getvalue()


def cut_off_after(steps, recipe, folder, monkeypatch):
    """Runs it until a stage has taken so many steps, and interrupts it there."""

    def cut(self, step, samples, metrics, original=StageWatch.after_step):
        original(self, step, samples, metrics)
        if step == steps:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StageWatch, "after_step", cut)
        with pytest.raises(KeyboardInterrupt):
            run_quietly(recipe, folder)
