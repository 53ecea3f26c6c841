"""Describes what a recipe would do and what each stage costs, without loading weights or a model library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from posttrain.engine.rehearsal import rehearse
from posttrain.errors import PosttrainError
from posttrain.parallel.shares import Shares
from posttrain.planning.memory import Phase, memory
from posttrain.planning.sizes import Transformer, disk_bytes, samples_of, stage_sizes
from posttrain.stages.lineage import runs_named
from posttrain.support.wording import counted, short

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from posttrain.model import EncoderName
    from posttrain.recipe.schema import Evaluation, Recipe, Stage

Shapes = dict[str, tuple[int, ...]]
LEGEND = (
    "items: forward-backwards. params: trained ones. forwards: of the transformer on one sample, a "
    "forward-backward counting 3. memory: weights, gradients, optimizer and roles of the transformer; text "
    "encoders, VAE and the activations of one micro-batch come on top ('posttrain plan' counts them)."
)


def overview(recipe: Recipe) -> RenderableType:
    """The stages in order with their cost, then data, evaluation, cache, and the weights that are missing
    here."""
    shapes = recipe.model.transformer_shapes()
    lines: list[RenderableType] = [
        Text(f"{recipe.name}: the recipe is valid", style="bold"),
        "",
        _stage_table(recipe, shapes),
        "",
    ]
    if shapes is None:
        lines.append("The model is not on this machine, so its size is unknown until it is downloaded.")
    lines.append(Text(LEGEND, style="dim"))
    lines += [f"{stage.name}: data {_data(stage)}" for stage in recipe.stages]
    if recipe.evaluation is not None:
        lines.append(_evaluation(recipe.evaluation))
    lines += [*runs_named(recipe), *_cache(recipe)]
    lines += _missing_rewards(recipe)
    return Group(*lines)


def _stage_table(recipe: Recipe, shapes: Shapes | None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in ("stage", "from", "algorithm"):
        table.add_column(column, overflow="fold", min_width=len(column))
    for column in ("steps", "samples", "items", "params", "forwards", "memory", "disk"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in recipe.stages:
        names = stage.name, recipe.parent(stage), stage.algorithm.type
        table.add_row(*names, *_figures(recipe, stage, shapes))
    return table


def _figures(recipe: Recipe, stage: Stage, shapes: Shapes | None) -> list[str]:
    """The cells of a stage's row from ``steps`` on."""
    samples, calls = samples_of(stage), rehearse(stage.algorithm, recipe.model.guidance_rule())
    amounts = [short(n) for n in (stage.train.steps, samples, samples * calls.items)]
    forwards = short(samples * calls.forward_equivalents)
    if shapes is None:
        return [*amounts, "?", forwards, "?", "?"]
    sizes = stage_sizes(recipe, stage, Transformer.from_shapes(recipe, stage, shapes))
    held = memory(sizes, {"optimizer": Phase(0.0, gradients=True)}, Shares()).total
    disk = disk_bytes(stage, sizes)
    return [*amounts, short(sizes.trained), forwards, short(held, "B"), short(disk, "B")]


def _data(stage: Stage) -> str:
    words, size = stage.data.in_words(), stage.algorithm.samples_per_prompt
    if stage.data.gives == "prompts":
        groups, per_batch = stage.train.batch_size // size, stage.train.steps_per_batch
        words += (
            f"; an iteration: {groups} prompts x {size} samples = {stage.train.batch_size} images, "
            f"{counted(per_batch, 'optimizer step')}"
        )
    if stage.rewards:
        words += "; rewards: " + ", ".join(f"{r.label} x {r.weight:g}" for r in stage.rewards)
    return words


def _evaluation(evaluation: Evaluation) -> str:
    rewards = ", ".join(reward.label for reward in evaluation.rewards)
    return (
        f"evaluation: base and every stage on {evaluation.prompts.in_words()}, "
        f"{counted(evaluation.images_per_prompt, 'image')} each at {evaluation.resolution} px, "
        f"{evaluation.steps} {evaluation.solver} steps, guidance {evaluation.guidance}; scores: {rewards}"
    )


def _cache(recipe: Recipe) -> Iterator[Text]:
    """One line with what is cached, how large one encoding is, and how full the cache is; none if it is
    off."""
    cache = recipe.cache
    if not cache.prompts and cache.latents == "off":
        return
    from posttrain.cache.contents import contents

    held = short(sum(store.size for store in contents(cache.folder())), "B")
    limit = short(cache.max_size, "B")
    yield Text(
        f"cache: {' and '.join(_encodings(recipe))}; {cache.folder()} has {held} of at most {limit}. "
        "Each stage says how much it needs before it encodes."
    )


def _encodings(recipe: Recipe) -> Iterator[str]:
    """What is cached, each with the size of one encoding if that is known."""
    from posttrain.planning.cache_size import kept_bytes
    from posttrain.planning.counts import Counts
    from posttrain.planning.store import store_of

    with store_of(recipe.model) as store:
        counts = Counts(recipe.model, cuda=False, store=store)

        def each(encoder: EncoderName, side: int) -> str:
            try:
                return f", {short(kept_bytes(recipe, counts, encoder, side), 'B')} each"
            except PosttrainError:  # the model's shape is unknown
                return ""

        if recipe.cache.prompts:
            yield f"prompts{each('prompts', 0)}"
        if recipe.cache.latents != "off":
            sides = {
                getattr(s.data, "resolution", None) for s in recipe.stages if s.data.images_per_sample
            } - {None}
            known = ""
            if len(sides) == 1 and (side := sides.pop()) is not None and (size := each("images", side)):
                known = f"{size} at {side} px"
            yield f"latents ({recipe.cache.latents}){known}"


def _missing_rewards(recipe: Recipe) -> list[Text]:
    """A line for each file of the rewards' weights that is not on this machine."""
    rewards = [reward for stage in recipe.stages for reward in stage.rewards]
    rewards += recipe.evaluation.rewards if recipe.evaluation is not None else []
    lines = {}
    for reward in rewards:
        for field, weights in reward.weights.items():
            source = getattr(reward, field)
            if weights.local(source) is None:
                lines[reward.type, source] = Text(
                    f"{reward.label}: {source} ({short(weights.size, 'B')}) is not on this machine "
                    f"yet; posttrain rewards fetch {reward.type}",
                    style="yellow",
                )
    return list(lines.values())
