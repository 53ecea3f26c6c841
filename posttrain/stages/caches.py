"""What does a stage or an evaluation encode before it begins, and who reads it then?

After this, prompts and images that were listed are not encoded again, so the text encoders and the image
encoder are idle, unless a file of the cache is damaged or was removed: they leave the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rich.markup import escape

from posttrain.cache.keys import store_identity
from posttrain.cache.latents import LatentCache
from posttrain.cache.prompts import PromptCache
from posttrain.cache.room import Room
from posttrain.cache.store import Store
from posttrain.data.batches import BatchSource, ImageBatchSource
from posttrain.data.prompts import prompt_rows
from posttrain.distributed.world import ALONE, World
from posttrain.sampling.sampler import FlowSampler
from posttrain.stages.watch import samples_shown

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.cache.settings import Cache
    from posttrain.model import EncoderName, FlowModel, Sampler
    from posttrain.recipe.schema import Recipe, Stage


def fill_for_stage(
    recipe: Recipe,
    stage: Stage,
    model: FlowModel,
    feed: BatchSource,
    console: Console,
    world: World = ALONE,
) -> None:
    """Encode what ``stage`` will need and the cache lacks; let ``model`` and ``feed`` read it from there.

    On several processes each encodes a share, and reads those of the others. Raises PosttrainError where
    the cache has no room or cannot be written, DataError where too many images cannot be decoded.
    """
    settings = recipe.cache
    room = Room(settings.folder(), settings.max_size)
    if settings.prompts:
        prompts = [*feed.prompts]
        if stage.train.sample_every:
            prompts += samples_shown(recipe, feed)[0]
        if stage.monitor is not None and recipe.evaluation is not None:
            rows = prompt_rows(recipe.evaluation.prompts)
            prompts += [row["prompt"] for row in rows[: stage.monitor.prompts]]
        cache = PromptCache(_store(room, "prompts", settings, model, "prompts", console), model)
        model.prompt_cache = cache
        cache.fill(prompts, stage.name, console, world.rank, world.size)
        model.rest("prompts")
    if settings.latents != "off" and isinstance(feed, ImageBatchSource):
        store = _store(room, settings.latents, settings, model, "images", console)
        feed.latents = LatentCache(store, model, feed.images, settings.latents)
        feed.latents.fill(stage.name, console, world.rank, world.size)
        model.rest("images")
    world.barrier()  # or some would be encoded twice


def fill_for_evaluation(
    recipe: Recipe, sampler: Sampler, name: str, console: Console, world: World = ALONE
) -> None:
    """Encode the evaluation's prompts that the cache lacks; let the ``sampler`` of ``name`` read them there.

    Raises PosttrainError as :func:`fill_for_stage`.
    """
    settings = recipe.cache
    if settings.prompts and recipe.evaluation is not None and isinstance(sampler, FlowSampler):
        model, room = sampler.policy.model, Room(settings.folder(), settings.max_size)
        prompts = [row["prompt"] for row in prompt_rows(recipe.evaluation.prompts)]
        cache = PromptCache(_store(room, "prompts", settings, model, "prompts", console), model)
        model.prompt_cache = cache
        cache.fill(prompts, f"evaluate {name}", console, world.rank, world.size)
        model.rest("prompts")
        world.barrier()


def _store(
    room: Room, kind: str, settings: Cache, model: FlowModel, encoder: EncoderName, console: Console
) -> Store:
    def tell(line: str) -> None:
        console.print(f"[yellow]{escape(line)}[/yellow]", highlight=False, soft_wrap=True)

    name, about = store_identity(kind, settings.dtype, model, encoder)
    return Store(room, name, about, torch.bfloat16 if settings.dtype == "bf16" else None, tell)
