"""Writes docs/reference-recipe.md: every block of a recipe with its fields."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from words import NOTE, joined, markdown, number, one_line, table, value, wrapped

from posttrain.algorithm import Algorithm
from posttrain.cache.settings import Cache
from posttrain.data.family import Data
from posttrain.data.settings import PromptFile, ShapesPrompts
from posttrain.engine.monitor import Monitor
from posttrain.model import Model
from posttrain.models._mapping import Mapping
from posttrain.optim.settings import Train
from posttrain.parallel.auto import Auto
from posttrain.parallel.ddp import DDP
from posttrain.parallel.deepspeed import DeepSpeed
from posttrain.parallel.fsdp2 import FSDP2
from posttrain.parallel.single import Single
from posttrain.policy.tuning import Full, Lora
from posttrain.recipe.schema import Evaluation, Recipe, Stage
from posttrain.registry import FREE, LATE, Named, Spec, mark_of
from posttrain.reward import Reward

STRATEGIES = (Auto, Single, DDP, FSDP2, DeepSpeed)
HEAD = f"""{NOTE}
# Recipe fields

Every block of a recipe and every field of it, as `posttrain check` reads them. How the blocks work together, what changing them in
a run does, and what they cost is told in [Recipes](recipes.md). `posttrain schema` gives the same to an editor.

- *Required* stands where a field has no default.
- `null` as a default means that the field is off, or that posttrain finds the value; the meaning says which.
- *Free* after a meaning: a run may go on with another value, because results change by rounding at most. *May grow* and *rewritten*
  are told in [changing a run](recipes.md#changing-a-run).
- A block with variants is chosen by its `type` (`parallel` by its `strategy`). Types of installed plug-ins are not on this page:
  `posttrain algorithms`, `models`, `rewards` and `data` list them.
"""
BLOCKS: dict[type[Spec], str] = {
    Cache: "cache", Stage: "stages", Train: "stages: train", Monitor: "stages: monitor", Evaluation: "evaluation",
    Mapping: "mapping of a diffusers model",
}  # fmt: skip
"""The headings of blocks without variants."""
FAMILIES: dict[type[Named], str] = {Algorithm: "algorithm", Reward: "reward", Model: "model", Data: "data"}
IN_WORDS: dict[tuple[type[Spec], str], str] = {
    (Recipe, "device"): "`auto`, `cpu`, `mps`, `cuda` or `cuda:N`",
    (Recipe, "model"): "a [model](#models)",
    (Recipe, "parallel"): "a [strategy](#parallel)",
    (Recipe, "stages"): "a list of [stages](#stages)",
    (Cache, "max_size"): "a size such as `50GB`, or bytes; at least 1 MB",
    (Stage, "algorithm"): "an [algorithm](#algorithms)",
    (Stage, "data"): "[data](#data)",
    (Stage, "tune"): "[`full` or `lora`](#tune)",
    (Train, "micro_batch"): "whole number, at least 1; or `auto`",
    (Train, "gradient_checkpointing"): "`off`, `selective`, `full`, `auto`; or a number between 0 and 1",
}  # fmt: skip
"""Fields whose schema says less than the reader accepts."""
BY_NAME = {
    "rewards": "a [reward](#rewards)'s name, a list of names or blocks, or names with weights",
    "prompts": "a file's path, or [prompts](#prompts)",
}
"""The same for fields of several blocks."""


def page() -> str:
    """The whole page."""
    return "\n".join([wrapped(HEAD) + "\n", *_parts()]).rstrip() + "\n"


def _parts() -> Iterator[str]:
    yield _block("Top level", Recipe)
    yield _family("Models", Model, "`model: {type: sd3, ...}`. See [Models](models.md).")
    yield _block("mapping of a diffusers model", Mapping, 3)
    yield "## parallel\n\n`parallel: {strategy: fsdp2}`. See [many processes](parallel.md).\n"
    for strategy in STRATEGIES:
        yield _block(f"strategy: {strategy.model_fields['strategy'].default}", strategy, 3)
    yield _block("cache", Cache)
    yield _block("stages", Stage)
    yield _family("Algorithms", Algorithm, "`algorithm: {type: soar, ...}` of a stage.")
    yield _family(
        "Data",
        Data,
        "The `data` of a stage. Without a `type`, the key `images`, `pairs` or `prompts` says which it is.",
    )
    yield "## Prompts\n\nThe field `prompts` of data and of an evaluation.\n"
    yield _block("prompts: file", PromptFile, 3)
    yield _block("prompts: shapes", ShapesPrompts, 3)
    yield _family(
        "Rewards", Reward,
        "The `rewards` of a stage or an evaluation. Licences, weights and servers: [Rewards](rewards.md).",
    )  # fmt: skip
    yield "## tune\n\n`tune: {type: lora, rank: 32}` of a stage.\n"
    yield _block("tune: full", Full, 3)
    yield _block("tune: lora", Lora, 3)
    yield _block("stages: train", Train)
    yield _block("stages: monitor", Monitor)
    yield _block("evaluation", Evaluation)


def _family(heading: str, family: type[Named], words: str) -> str:
    own = {n: kind for n, kind in sorted(family.variants.items()) if kind.__module__.startswith("posttrain.")}
    links = ", ".join(f"[`{name}`](#{_anchor(f'{FAMILIES[family]}: {name}')})" for name in own)
    blocks = [_block(f"{FAMILIES[family]}: {name}", kind, 3) for name, kind in own.items()]
    return "\n".join([f"## {heading}\n\n{wrapped(words)}\n\n{wrapped(links)}\n", *blocks])


def _block(heading: str, spec: type[Spec], level: int = 2) -> str:
    about = markdown(inspect.getdoc(spec))
    if issubclass(spec, Algorithm):  # its items are for those who change it
        about = about.split("\n\nItems")[0]
    parts = [f"{'#' * level} {heading}", wrapped(about), _needs(spec)]
    rows = [_row(spec, name) for name in spec.model_fields if name not in ("type", "strategy")]
    parts.append(table(("field", "values", "default", "meaning"), rows) if rows else "It has no fields.\n")
    return "\n\n".join(part for part in parts if part)


def _needs(spec: type[Spec]) -> str:
    if issubclass(spec, Algorithm):
        return f"It needs data that give {spec.needs}{', and rewards' if spec.uses_rewards else ''}."
    if issubclass(spec, Data):
        return f"It gives {spec.gives}."
    if issubclass(spec, Model) and not spec.trainable:
        return "It can be sampled and evaluated, not trained."
    return ""


def _row(spec: type[Spec], name: str) -> tuple[str, ...]:
    field = spec.model_fields[name]
    marks = {FREE: " *Free.*", LATE: " *May grow.*"}
    mark = " *Rewritten.*" if name == "export_dtype" else marks.get(mark_of(field), "")
    default = "*required*" if field.is_required() else _default(spec, name)
    return f"`{name}`", _values(spec, name), default, one_line(field.description) + mark


def _default(spec: type[Spec], name: str) -> str:
    found = spec.model_fields[name].get_default(call_default_factory=True)
    if spec is Cache and name == "max_size":
        return "`50GB`"
    if isinstance(found, Cache):
        return "off"
    if isinstance(found, Spec):
        found = found.model_dump(mode="json")
        found = {key: found[key] for key in ("type", "strategy") if key in found}
    if isinstance(found, str) and "\n" in found:
        return f'"{" ".join(found.split())}"'
    return value(found)


def _values(spec: type[Spec], name: str) -> str:
    for base in spec.__mro__:
        if (base, name) in IN_WORDS:
            return IN_WORDS[base, name]
    schema = spec.model_json_schema()
    field = schema["properties"][name]
    if name in BY_NAME and field.get("type") not in ("integer", "boolean"):
        return BY_NAME[name]
    return _in_words(field, schema.get("$defs", {}))


def _in_words(field: dict[str, Any], blocks: dict[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        heading = next(heading for spec, heading in BLOCKS.items() if spec.__name__ == name)
        return f"a block: [{heading}](#{_anchor(heading)})"
    if "anyOf" in field:
        *words, last = dict.fromkeys(_in_words(each, blocks) for each in field["anyOf"])
        return f"{joined(words)}; or {last}" if words else last
    if "enum" in field:
        return joined([f"`{each}`" for each in field["enum"]])
    if "const" in field:
        return f"`{field['const']}`"
    kind = field["type"]
    if kind == "array":
        few, many = field.get("minItems"), field.get("maxItems")
        count = f" of {few}" if few == many and few else ""
        return f"list{count}: {_in_words(field['items'], blocks)}"
    if kind in ("integer", "number"):
        return ("whole number" if kind == "integer" else "number") + _range(field)
    if kind == "string" and field.get("format") == "path":
        return "path"
    return {"string": "text", "boolean": "`true` or `false`", "null": "`null`", "object": "mapping"}[kind]


def _range(field: dict[str, Any]) -> str:
    """The bounds of a number, in words."""
    least, above = field.get("minimum", field.get("ge")), field.get("exclusiveMinimum")
    most, below = field.get("maximum"), field.get("exclusiveMaximum")
    words = [f"at least {number(least)}"] if least is not None else []
    words += [f"above {number(above)}"] if above is not None else []
    words += [f"at most {number(most)}"] if most is not None else []
    words += [f"below {number(below)}"] if below is not None else []
    words += [f"a multiple of {field['multipleOf']}"] if "multipleOf" in field else []
    return f", {', '.join(words)}" if words else ""


def _anchor(heading: str) -> str:
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in "-_ ")
    return kept.strip().replace(" ", "-")
