"""What would a recipe do, and what would it need? Told without loading a weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from posttrain.data.settings import Images, PromptData, PromptFile, ShapesPrompts
from posttrain.engine.rehearsal import rehearse
from posttrain.errors import DataError
from posttrain.support.wording import short

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from posttrain.model import EncoderName, FlowModel
    from posttrain.recipe.schema import Recipe, Stage

Shapes = dict[str, tuple[int, ...]]


def plan(recipe: Recipe) -> RenderableType:
    """The stages in order with their cost, and the memory and disk that their weights need."""
    shapes = recipe.model.transformer_shapes()
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in ("stage", "from", "algorithm"):
        table.add_column(column, overflow="fold", min_width=len(column))
    for column in ("steps", "samples", "items", "params", "forwards", "memory", "disk"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in recipe.stages:
        table.add_row(
            stage.name, recipe.parent(stage), stage.algorithm.type, *_figures(stage, recipe, shapes)
        )
    lines: list[RenderableType] = [Text(f"{recipe.name}: the recipe is valid", style="bold"), "", table, ""]
    if shapes is None:
        lines.append(
            Text("The model is not on this machine yet, so its size is unknown before the download.")
        )
    lines.append(
        Text(
            "items: forward-backwards. params: trained ones. forwards: of the transformer on one sample, a "
            "forward-backward counting 3. memory: weights, gradients, optimizer and roles of the "
            "transformer; text encoders, VAE and the activations of one micro-batch come on top.",
            style="dim",
        )
    )
    lines += [f"{stage.name}: data {_data(stage)}" for stage in recipe.stages]
    if (e := recipe.evaluation) is not None:
        prompts = _prompts(e.prompts)
        names = ", ".join(reward.label for reward in e.rewards)
        lines.append(
            f"evaluation: base and every stage on {prompts}, {e.images_per_prompt} image(s) each at "
            f"{e.resolution} px, {e.steps} {e.solver} steps, guidance {e.guidance}; scores: {names}"
        )
    lines += _cache(recipe)
    lines += _to_fetch(recipe)
    return Group(*lines)


def _cache(recipe: Recipe) -> list[RenderableType]:
    """What is cached, how large one encoding is, and how much there is already."""
    import torch

    from posttrain.cache.contents import contents

    cache, parts = recipe.cache, []
    if not cache.prompts and cache.latents == "off":
        return []
    outline = recipe.model.outline("fp32", torch.device("meta"))
    if cache.prompts:
        size = kept_bytes(recipe, outline, "prompts", 0) if outline else None
        parts.append(f"prompts{_each(size)}")
    if cache.latents != "off":
        sides = {s.data.resolution for s in recipe.stages if isinstance(s.data, Images) and s.data.resolution}
        side = sides.pop() if len(sides) == 1 else None
        size = kept_bytes(recipe, outline, "images", side) if side and outline else None
        at = f" at {side} px" if size else ""
        parts.append(f"latents ({cache.latents}){_each(size)}{at}")
    if not parts:
        return []
    there = short(sum(kept.size for kept in contents(cache.folder())), "B")
    limit = short(cache.max_size, "B")
    words = f"cache: {' and '.join(parts)}; {cache.folder()} has {there} of at most {limit}"
    return [Text(f"{words}. Each stage says how much it needs before it encodes.")]


def kept_bytes(recipe: Recipe, outline: FlowModel, encoder: EncoderName, side: int) -> float:
    """What the cache keeps of a prompt, or of an image of ``side`` pixels squared."""
    size = encoding_bytes(outline, encoder, side)
    # what is computed in half precision is kept as it is; latents are always computed in float32
    rounds = recipe.cache.dtype == "bf16" and (encoder == "images" or recipe.model.frozen_dtype() == "fp32")
    halves = rounds + (encoder == "images" and recipe.cache.latents == "sampled")
    return size / 2**halves


def encoding_bytes(outline: FlowModel, encoder: EncoderName, side: int) -> int:
    """Bytes of an encoded prompt, or of the posterior of an image of ``side`` pixels squared, as they are
    computed."""
    if encoder == "images":
        return 2 * 4 * math.prod(outline.latent_shape(side, side))
    return sum(tensor.nbytes for tensor in outline.encode_prompts(["a"]).values())


def _each(size: float | None) -> str:
    return "" if size is None else f", {short(size, 'B')} each"


def _to_fetch(recipe: Recipe) -> list[RenderableType]:
    """A line for each of the rewards' weights that is not on this machine."""
    rewards = [reward for stage in recipe.stages for reward in stage.rewards]
    rewards += recipe.evaluation.rewards if recipe.evaluation is not None else []
    found = {}
    for reward in rewards:
        for name, weights in reward.weights.items():
            source = getattr(reward, name)
            if weights.local(source) is None:
                found[reward.type, source] = Text(
                    f"{reward.label}: {source} ({short(weights.size, 'B')}) is not on this machine "
                    f"yet; posttrain rewards fetch {reward.type}",
                    style="yellow",
                )
    return list(found.values())


def _figures(stage: Stage, recipe: Recipe, shapes: Shapes | None) -> list[str]:
    train, algorithm = stage.train, stage.algorithm
    samples = train.steps * train.batch_size // train.steps_per_batch
    calls = rehearse(algorithm)
    items = samples * calls.items
    figures = [short(n) for n in (train.steps, samples, items)]
    cost = short(samples * calls.forward_equivalents)
    if shapes is None:
        return [*figures, "?", cost, "?", "?"]
    trained = stage.tune.trainable_parameters(shapes)
    everything = sum(_product(shape) for shape in shapes.values())
    copies = len(algorithm.roles) + (train.ema is not None)
    # float32: weights, gradients and AdamW's two moments, and a copy for each role
    memory = trained * 4 * (4 + copies)
    if stage.tune.type != "full":
        memory += everything * (4 if recipe.model.frozen_dtype() == "fp32" else 2)
    return [*figures, short(trained), cost, short(memory, "B"), short(disk_bytes(stage, trained), "B")]


def disk_bytes(stage: Stage, trained: int) -> int:
    """What the checkpoints and the artifact of a stage that trains so many numbers take."""
    copies = len(stage.algorithm.roles) + (stage.train.ema is not None)
    checkpoint = trained * 4 * (3 + copies)
    export = {"fp32": 4, "bf16": 2, "fp16": 2}[stage.export_dtype] if stage.tune.type == "full" else 4
    return checkpoint * stage.train.keep_checkpoints + trained * export


def _data(stage: Stage) -> str:
    data = stage.data
    if isinstance(data, PromptData):
        size = stage.algorithm.samples_per_prompt
        groups, per_batch = stage.train.batch_size // size, stage.train.steps_per_batch
        return (
            f"{_prompts(data.prompts)} at {data.resolution} px; an iteration: {groups} prompts x {size} "
            f"samples = {stage.train.batch_size} images, {per_batch} optimizer step(s); rewards: "
            + ", ".join(f"{r.label} x {r.weight:g}" for r in stage.rewards)
        )
    if isinstance(data, Images):
        return f"{data.images}, resolution {data.resolution or 'as named in its rows'}"
    return f"{data.images} rendered Shapes images ({data.style})"


def _prompts(prompts: PromptFile | ShapesPrompts) -> str:
    return str(prompts.path) if isinstance(prompts, PromptFile) else f"{prompts.count} Shapes prompts"


def scan_data(recipe: Recipe, console: Console) -> None:
    """Read every image of every stage. Lists the bad ones; raises DataError where they are too many."""
    from posttrain.data.loader import ImageSource
    from posttrain.support.progress import stage_progress

    for stage in recipe.stages:
        if not isinstance(stage.data, Images):
            continue  # rendered by the run itself
        # everything is to be listed, however much it is; the tolerance is judged at the end
        tolerant = stage.data.model_copy(update={"tolerance": 1.0})
        source = ImageSource(tolerant, divisor=recipe.model.divisor() or 1)
        with stage_progress(f"{stage.name}: reading", len(source.records), 0, console) as bar:
            problems = source.scan(lambda done, total: bar.update(done))
        for problem in problems:
            place = f"{stage.data.images}:{problem.line}: {problem.reason}"
            console.print(place, soft_wrap=True, highlight=False, markup=False)
        console.print(f"{stage.name}: {source.rows} rows, {len(problems)} of them bad", highlight=False)
        if len(problems) > stage.data.tolerance * source.rows:
            raise DataError(
                f"{stage.name}: {len(problems)} of {source.rows} rows cannot be used, more than the "
                f"tolerated {stage.data.tolerance:.1%} (data.tolerance)"
            )


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
