"""Writes the model card of what a stage trained: ``README.md`` with the hub's front matter, and images.

It has no times and no dates, so that equal runs have equal cards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import DamagedError
from posttrain.evaluation.parts import CARD
from posttrain.recipe.file import dump_recipe
from posttrain.recipe.schema import BASE, Recipe, Stage
from posttrain.stages.lineage import FINAL
from posttrain.stages.stage_state import SUMMARY, recorded
from posttrain.support.files import write
from posttrain.support.paths import is_path
from posttrain.support.records import read_object
from posttrain.support.wording import without_logins

if TYPE_CHECKING:
    from PIL.Image import Image

README, GRID = "README.md", "grid.png"
SHOWN = 4
"""Prompts in the grid, at most."""
PIXELS = 256
"""Larger images of the grid are made smaller."""


def complete_card(run_folder: Path, name: str) -> None:
    """Write the model card of the finished stage ``name`` anew, with the scores and images of its evaluation.

    A file that has its content already is left alone. Raises PosttrainError.
    """
    final = run_folder / name / FINAL
    image = grid_image(run_folder, name)
    contents = {README: card_text(run_folder, name).encode()}
    if image is not None:
        from posttrain.support.images import png

        contents[GRID] = png(image)
    for file, content in contents.items():
        if not (final / file).is_file() or (final / file).read_bytes() != content:
            write(final / file, content)


def card_text(run_folder: Path, name: str, kind: str | None = None, file: str = "", dtype: str = "") -> str:
    """The model card of the stage ``name``, by default of its ``final/``.

    ``kind`` is the format of an export, ``file`` what it is called, and ``dtype`` what was asked for. Raises
    PosttrainError where the stage's recipe cannot be read.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, PackageLoader

    recipe = recorded(run_folder, name)
    stage = next(stage for stage in recipe.stages if stage.name == name)
    is_lora = stage.tune.type == "lora" and kind != "merged"
    chain = [s for n in recipe.lineage_of(name) for s in recipe.stages if s.name == n]
    tags = ["posttrain", recipe.model.type, *(s.algorithm.type for s in chain), "lora" if is_lora else "full"]
    front: dict[str, Any] = {
        "pipeline_tag": "text-to-image",
        "tags": list(dict.fromkeys(tags)),
        **recipe.model.origin(),
    }
    if kind not in ("comfyui", "kohya"):
        front["library_name"] = "diffusers"
    if "base_model" in front:
        front["base_model_relation"] = "adapter" if is_lora else "finetune"
    # Markdown, so nothing is escaped as in HTML
    environment = Environment(loader=PackageLoader("posttrain.stages", ""), trim_blocks=True)
    body = environment.get_template("model_card.md.j2").render(
        format=kind or ("lora" if is_lora else "diffusers"),
        file=file,
        exported=kind is not None,
        export_dtype=dtype,
        is_lora=is_lora,
        **_facts(recipe, chain, run_folder),
        **_below(recipe, chain, kind),
        **_scores(run_folder, name),
    )
    return f"---\n{ModelCardData(**front).to_yaml()}\n---\n\n{body}\n"


def grid_image(run_folder: Path, name: str) -> Image | None:
    """Images of the evaluation of the stage ``name``, each beside that of the base; None without them."""
    import numpy as np
    import torch
    from PIL import Image

    from posttrain.support.images import grid

    def images(of: str) -> dict[str, Path]:
        # by its number: a file that is gone must not move the others to wrong prompts
        folder = run_folder / of / "evaluation" / "grid"
        prompts = _card(run_folder, of)[0].get("grid_prompts", [])
        files = {prompt: folder / f"{n:03d}.png" for n, prompt in enumerate(prompts)}
        return {prompt: file for prompt, file in files.items() if file.is_file()}

    own, base, tiles = images(name), images(BASE), []
    for prompt in list(own)[:SHOWN]:
        tiles += [
            (who, prompt, files[prompt]) for who, files in ((BASE, base), (name, own)) if prompt in files
        ]
    pixels, captions = [], []
    for who, prompt, file in tiles:
        # a damaged one is left out: the card must not end a long run
        with (
            contextlib.suppress(OSError, SyntaxError, Image.DecompressionBombError),
            Image.open(file) as image,
        ):
            image.thumbnail((PIXELS, PIXELS))
            pixels.append(np.asarray(image.convert("RGB")))
            captions.append(f"{who}: {prompt}")
    if len({one.shape for one in pixels}) != 1:
        return None
    return grid(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255, 4, captions)


def _facts(recipe: Recipe, chain: Sequence[Stage], run_folder: Path) -> dict[str, Any]:
    """What the page says of the last stage of ``chain`` itself."""
    model, stage = recipe.model, chain[-1]
    return {
        "title": f"{recipe.name}: {stage.name}",
        "run": recipe.name,
        "stage": stage.name,
        "base": model.model_dump().get("path", f"a {model.type} model"),
        "pipeline": model.pipelines[0] if model.pipelines else None,
        "call": _call(recipe),
        "in_comfyui": model.in_comfyui,
        "stages": [_row(recipe, s, run_folder) for s in chain],
        "recipe": without_logins(dump_recipe(recipe).rstrip()),  # the page is made to be published
    }


def _below(recipe: Recipe, chain: Sequence[Stage], kind: str | None) -> dict[str, Any]:
    """What is trained, and the weights that have to be loaded before it."""
    if (tune := chain[-1].tune).type == "full":
        return {"kind": "Full fine-tuning", "below": None, "before": []}
    if kind == "merged":
        return {"kind": "A LoRA, merged into its base,", "below": None, "before": []}
    whole = [i for i, stage in enumerate(chain) if stage.tune.type == "full"]
    first = recipe.lineage_of(chain[-1].name)[0]
    below = chain[whole[-1]].name if whole else first if is_path(first) else None
    # an export joins the LoRAs of the stages
    before = [s.name for s in chain[whole[-1] + 1 if whole else 0 : -1]]
    if kind is not None and before:
        names = " and ".join(f"`{name}`" for name in (*before, chain[-1].name))
        return {"kind": f"The LoRAs of {names}, joined into one,", "below": below, "before": []}
    return {"kind": f"A LoRA of rank {tune.rank}", "below": below, "before": before}


def _row(recipe: Recipe, stage: Stage, run_folder: Path) -> dict[str, Any]:
    """A stage's row in the table of stages."""
    file = run_folder / stage.name / SUMMARY
    steps = read_object(file, "steps")["steps"] if file.is_file() else stage.train.steps
    tune = stage.tune
    trained = f"LoRA, rank {tune.rank}, alpha {tune.alpha:g}" if tune.type == "lora" else "all weights"
    algorithm = stage.algorithm.type
    return {
        "name": stage.name,
        "parent": recipe.parent(stage),
        "algorithm": algorithm,
        "tune": trained,
        "steps": steps,
    }


def _call(recipe: Recipe) -> str:
    """The arguments of a pipeline's call that draw as the run does, as Python."""
    given: dict[str, Any] = {}
    if (evaluation := recipe.evaluation) is not None:
        side = evaluation.resolution
        given = {
            "height": side,
            "width": side,
            "num_inference_steps": evaluation.steps,
            "guidance_scale": evaluation.guidance,
        }
    given |= recipe.model.call_settings()
    return "".join(f", {name}={value!r}" for name, value in given.items())


def _scores(run_folder: Path, name: str) -> dict[str, Any]:
    """The scores of the stage beside those of the base, as text, and how they were measured."""
    (card, unread), (base, _) = _card(run_folder, name), _card(run_folder, BASE)
    own, before = card.get("scores", {}), base.get("scores", {})
    rows = [{"name": n, "own": _score(s), "base": _score(before.get(n))} for n, s in own.items()]
    if not rows:
        return {"scores": [], "settings": "", "grid": False, "unread": unread}
    sampler, prompts = card["sampler"], card["prompts"]
    of = prompts.get("published_as") or prompts.get("path") or prompts.get("type")
    settings = (
        f"{card['images']} images of {prompts['distinct']} prompts ({of}), {sampler['resolution']} px, "
        f"{sampler['steps']} steps, guidance {sampler['guidance']:g}, seed {sampler['seed']}; "
        f"weights: {card['model']['weights']}."
    )
    return {"scores": rows, "settings": settings, "grid": grid_image(run_folder, name) is not None}


def _score(score: Mapping[str, Any] | None) -> str | None:
    if score is None:
        return None
    # one sample does not tell how far others lie apart
    ends = "" if score.get("count") == 1 else f" [{score['low']:.4g}, {score['high']:.4g}]"
    return f"{score['mean']:.4g}{ends}"


def _card(run_folder: Path, name: str) -> tuple[dict[str, Any], str]:
    """The result card of a stage's evaluation; without one it is empty, and if it cannot be read, its file's
    name follows."""
    file = run_folder / name / "evaluation" / CARD
    try:
        return (read_object(file) if file.is_file() else {}), ""
    except DamagedError:
        return {}, file.name
