"""Small recipes to plan, and the counts of models, each made once in a process."""

import math

from posttrain.planning.counts import Counts
from posttrain.planning.needs import stage_needs
from posttrain.recipe.file import parse_recipe

PROMPTS = "{prompts: {type: shapes, count: 24}, resolution: 64}"


CASES = {
    "sft": ("{type: sft}", "{type: shapes, images: 100}", ""),
    "soar": ("{type: soar}", "{type: shapes, images: 100}", ""),
    "reflexflow": ("{type: reflexflow}", "{type: shapes, images: 100}", ""),
    "dpo": ("{type: dpo}", "{type: shapes_pairs, pairs: 100}", ""),
    "dpo_online": (
        "{type: dpo_online, group_size: 4, num_steps: 3, points_per_pair: 4}",
        PROMPTS,
        "rewards: jpeg_compressibility",
    ),
    "awm": ("{type: awm, group_size: 4, num_steps: 3}", PROMPTS, "rewards: jpeg_compressibility"),
    "flow_grpo": ("{type: flow_grpo, group_size: 4, num_steps: 3}", PROMPTS, "rewards: jpeg_compressibility"),
    "diffusion_nft": (
        "{type: diffusion_nft, group_size: 4, num_steps: 3}",
        PROMPTS,
        "rewards: jpeg_compressibility",
    ),
}


COUNTED = {}


def counts_of(model, *, cuda):
    """The counts of a model, one for all tests: they remember what they counted."""
    return COUNTED.setdefault((model.model_dump_json(), cuda), Counts(model, cuda=cuda))


def planned(name, tune="{type: full}", train="micro_batch: 32"):
    algorithm, data, rewards = CASES[name]
    return parse_recipe(
        f"""
name: planned
tracker: none
device: cpu
model: {{type: sd3, path: posttrain/tiny-sd3, max_sequence_length: 16}}
stages:
  - name: only
    algorithm: {algorithm}
    data: {data}
    tune: {tune}
    {rewards}
    train: {{steps: 2, batch_size: 32, sample_every: null, {train}}}
""",
        "planned.yaml",
    )


def need(recipe, *, cuda=False, devices=1, limit=math.inf, counts=None):
    counts = counts or counts_of(recipe.model, cuda=cuda)
    return stage_needs(recipe, recipe.stages[0], counts, devices, limit)


SOAR = [
    "stages.soar.train.sample_every=null",
    "stages.soar.train.micro_batch=4",
    "stages.soar.train.gradient_checkpointing=full",
    "stages.soar.train.compile=false",
]


def soar_counts(recipe):
    """The counts of ``sd35m-soar``'s model, one for all its settings, which change no count."""
    return COUNTED.setdefault("sd35m-soar", Counts(recipe.model, cuda=True))
