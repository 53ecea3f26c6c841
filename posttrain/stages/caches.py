"""Encodes prompts and images before a stage or an evaluation begins, and lets the model read them.

Afterwards the text encoders and the image encoder leave the device, since their outputs are cached. They
come back only for a cache file that is damaged or was removed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from posttrain.cache.keys import store_identity
from posttrain.cache.latents import LatentCache
from posttrain.cache.prompts import PromptCache
from posttrain.cache.room import Room
from posttrain.cache.store import Store
from posttrain.data.prompts import prompt_rows
from posttrain.data.source import BatchSource
from posttrain.distributed.world import ALONE, World
from posttrain.sampling.sampler import FlowSampler
from posttrain.stages.hooks.image_grids import grid_samples
from posttrain.support.terminal import note

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.cache.settings import Cache
    from posttrain.model import EncoderName, FlowModel
    from posttrain.recipe.schema import Recipe, Stage
    from posttrain.sampler import Sampler


def fill_for_stage(
    recipe: Recipe,
    stage: Stage,
    model: FlowModel,
    source: BatchSource,
    console: Console,
    world: World = ALONE,
) -> None:
    """Encode what ``stage`` needs and the cache lacks; let ``model`` and ``source`` read from the cache.

    Each process encodes a share, and reads those of the others. Raises PosttrainError where the cache has
    no room or cannot be written, DataError where too many images cannot be decoded.
    """
    settings = recipe.cache
    room = Room(settings.folder(), settings.max_size)
    if settings.prompts:
        store = _store(room, "prompts", settings, model, "prompts", console)
        _cache_prompts(store, model, _prompts_of_stage(recipe, stage, source), stage.name, console, world)
    if settings.latents != "off" and source.images:
        store = _store(room, settings.latents, settings, model, "images", console)
        for name, images in source.images.items():
            cache = LatentCache(store, model, images, settings.latents, world)
            # one name says nothing beside the stage's
            cache.fill(
                stage.name if len(source.images) == 1 else f"{stage.name}: {name}",
                console,
                world.rank,
                world.size,
            )
            source.latents[name] = cache
            world.barrier()  # an image may be in both lists
        model.rest("images")
    world.barrier()  # otherwise a process could encode what another is still writing


def fill_for_evaluation(
    recipe: Recipe, sampler: Sampler, name: str, console: Console, world: World = ALONE
) -> None:
    """Encode the evaluation's prompts that the cache lacks; let the ``sampler`` read them from there.

    ``name`` is that of the evaluated stage, for messages. Raises PosttrainError as :func:`fill_for_stage`.
    """
    settings = recipe.cache
    if settings.prompts and recipe.evaluation is not None and isinstance(sampler, FlowSampler):
        model, room = sampler.policy.model, Room(settings.folder(), settings.max_size)
        prompts = [row["prompt"] for row in prompt_rows(recipe.evaluation.prompts)]
        store = _store(room, "prompts", settings, model, "prompts", console)
        _cache_prompts(store, model, prompts, f"evaluate {name}", console, world)
        world.barrier()


def _prompts_of_stage(recipe: Recipe, stage: Stage, source: BatchSource) -> list[str]:
    """The prompts of the data, the image grids and the held-out scores."""
    prompts = [*source.prompts]
    if stage.train.sample_every:
        prompts += grid_samples(recipe, source)[0]
    if stage.monitor is not None and recipe.evaluation is not None:
        rows = prompt_rows(recipe.evaluation.prompts)
        prompts += [row["prompt"] for row in rows[: stage.monitor.prompts]]
    return prompts


def _cache_prompts(
    store: Store, model: FlowModel, prompts: list[str], name: str, console: Console, world: World
) -> None:
    """Encode the ``prompts`` that the store lacks; move the text encoders off the device."""
    cache = PromptCache(store, model)
    model.prompt_cache = cache
    cache.fill(prompts, name, console, world.rank, world.size)
    model.rest("prompts")


def _store(
    room: Room, kind: str, settings: Cache, model: FlowModel, encoder: EncoderName, console: Console
) -> Store:
    """The store for the outputs of ``encoder``; it warns on the console of damaged files."""
    name, about = store_identity(kind, settings.dtype, model, encoder)
    dtype = torch.bfloat16 if settings.dtype == "bf16" else None
    return Store(room, name, about, dtype, lambda line: note(console, line, "yellow"))
