"""Evaluates the base model, or what a stage wrote, within a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.data.prompts import prompt_rows
from posttrain.errors import DamagedError, PosttrainError
from posttrain.evaluation.card import other_settings, other_weights
from posttrain.evaluation.evaluate import Share, evaluate
from posttrain.evaluation.parts import CARD, CLAIM, SHOWN, put_aside, read_records
from posttrain.recipe.file import dump_recipe
from posttrain.recipe.schema import BASE, Evaluation, Stage
from posttrain.sampler import Sampler
from posttrain.sampling.sampler import flow_sampler, loaded_to_draw, sampler_of
from posttrain.stages.caches import fill_for_evaluation
from posttrain.stages.lineage import FINAL, exact, exported_weights, sources
from posttrain.stages.made_from import confirm_weights
from posttrain.stages.run import Run
from posttrain.stages.stage_state import RECIPE
from posttrain.support.device import set_tf32
from posttrain.support.files import write
from posttrain.support.records import read_object
from posttrain.weights.fingerprints import by_component


def evaluate_stage(run: Run, evaluation: Evaluation, stage: Stage | None) -> None:
    """Evaluate the artifact of ``stage``, or the base model for None, unless that was done.

    An evaluation with other settings, or a damaged one, is put aside, and a line says why.
    The artifact is read as any other tool would read it, in float32 and without TF32. Raises PosttrainError.
    """
    name, world = stage.name if stage else BASE, run.world
    folder = run.folder / name / "evaluation"
    if world.is_main:
        _put_others_aside(folder, evaluation, run)
    if world.broadcast((folder / CARD).is_file()):
        return
    if stage is None and world.is_main:
        write(run.folder / BASE / RECIPE, dump_recipe(run.recipe))
    set_tf32(False)
    sampler = _sampler(run, evaluation, stage)
    fill_for_evaluation(run.recipe, sampler, name, run.console, world)
    evaluate(
        sampler,
        evaluation,
        folder,
        name=name,
        weights=exported_weights(stage) if stage else BASE,
        console=run.console,
        share=Share(world.rank, world.size),
    )
    world.barrier()
    if not (folder / CARD).is_file():
        raise PosttrainError(f"another process is evaluating into {str(folder)!r}; wait for it")


def _put_others_aside(folder: Path, evaluation: Evaluation, run: Run) -> None:
    """See to it that ``folder`` holds this ``evaluation``, finished or begun, or nothing."""
    rows = prompt_rows(evaluation.prompts, evaluation.rewards)
    if not folder.is_dir() or not (why := _reason_against(folder, evaluation, rows)):
        return
    kept = put_aside(folder)
    place = (
        f"the one of before is kept as {kept.name}" if kept else "what was measured of it before is removed"
    )
    run.note(f"{folder.parent.name}: is evaluated again ({why}); {place}")


def _reason_against(folder: Path, evaluation: Evaluation, rows: Sequence[Any]) -> str | None:
    """Why ``folder`` does not hold the ``evaluation`` of ``rows``; None if it does, finished or begun."""
    keys = ("prompts", "sampler", "shown", "scorers")
    try:
        if (folder / CARD).exists():
            # a finished one has the images that were kept then
            free = ("shown", "sampler.batch_size")
            card = read_object(folder / CARD, *keys, *SHOWN, "images")
            lines = other_settings(card, evaluation, rows, free) or [*other_weights(card, evaluation)]
            read_records(folder, card["images"])
        elif (folder / CLAIM).exists():
            card = read_object(folder / CLAIM, *keys)
            lines = other_settings(card, evaluation, rows) or [*other_weights(card, evaluation)]
        else:
            return (
                f"there is no {CARD}" if any(not p.name.startswith(".") for p in folder.iterdir()) else None
            )
    except DamagedError as error:
        return str(error)
    return f"{lines[0]}{'; and more' if len(lines) > 1 else ''}" if lines else None


def _sampler(run: Run, evaluation: Evaluation, stage: Stage | None) -> Sampler:
    if stage is None:
        sampler = sampler_of(run.spec, run.device, evaluation)
        base = confirm_weights(run, None)
    else:
        parents = sources(run.recipe, run.recipe.parent(stage), run.folder)
        trained = (*map(exact, parents), run.folder / stage.name / FINAL)
        model = loaded_to_draw(run.spec, run.device, evaluation, trained)
        base = confirm_weights(run, stage, parents, evaluating=True)
        sampler = flow_sampler(model, run.spec, evaluation, f"{stage.name}/final")
    sampler.base = lambda: by_component(base)
    return sampler
