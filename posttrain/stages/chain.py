"""Runs a whole recipe: its stages in order, each evaluated, and a report at the end."""

from __future__ import annotations

import gc
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import ModelError
from posttrain.recipe.file import check_or_raise, dump_recipe, load_recipe
from posttrain.recipe.schema import Recipe, Stage
from posttrain.stages.adjust import Reopened, reopen
from posttrain.stages.processes import check_processes
from posttrain.stages.run import Run
from posttrain.stages.run_folder import claimed
from posttrain.stages.stage_state import RECIPE, SUMMARY, as_trained
from posttrain.support.files import write
from posttrain.support.user_errors import told

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.stages.result import RunResult

# what needs torch or diffusers is imported where it is used, so that the command line starts fast


@told()
def run(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    console: Console | None = None,
    fresh: Sequence[str] = (),
) -> RunResult:
    """Run every stage that is not finished, evaluate, write the report, and return the results.

    ``recipe`` may be a file or the name of a shipped recipe. The run's folder is ``output`` or
    ``runs/<name>``. Given the same recipe again, finished stages are skipped
    and an unfinished one goes on from its last checkpoint. Of the stages ``fresh``, and those trained from
    their weights, what they wrote is removed first. Raises RecipeError where the recipe would change what
    was trained, and PosttrainError for whatever stops a stage.
    """
    from posttrain.distributed.world import joined
    from posttrain.evaluation.report.page import write_report
    from posttrain.evaluation.report.table import table
    from posttrain.stages.lineage import pinned, runs_named
    from posttrain.stages.result import RunResult
    from posttrain.support.device import resolve
    from posttrain.support.terminal import Terminal, note

    console = console or Terminal()
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, checks=False)
    check_or_raise(recipe)
    folder = Path(output or Path("runs") / recipe.name).absolute()
    device = resolve(recipe.device)
    with joined(device, group=recipe.parallel.needs_group) as world:
        check_processes(recipe, world.size)
        if not world.is_main:
            console = Terminal(file=io.StringIO())

        with claimed(folder, recipe, device, world, partial(note, console), fresh) as reopened:
            with world.main_first():
                spec = pinned(recipe.model.build(folder / "model", device))
            if (reason := spec.unfit()) is not None:  # in seconds, where loading finds it after all weights
                raise ModelError(f"model.path: {reason}")
            for line in runs_named(recipe):
                note(console, line)
            _run_stages(Run(as_trained(recipe, folder), spec, folder, device, console, world), reopened)
            if not world.is_main:
                return RunResult(folder)
            report = write_report(folder)
    console.print(table(folder, console.width))
    console.print(f"report: {report}", soft_wrap=True, highlight=False, markup=False)
    return RunResult(folder)


def _run_stages(run: Run, reopened: Reopened) -> None:
    """Evaluate the base model, then train and evaluate each stage; skip what was done before."""
    from posttrain.stages.model_card import complete_card
    from posttrain.stages.stage_evaluation import evaluate_stage
    from posttrain.support.device import free_memory

    evaluation = run.recipe.evaluation
    if evaluation is not None:
        evaluate_stage(run, evaluation, None)
    for stage in run.recipe.stages:
        finished = run.world.broadcast((run.folder / stage.name / SUMMARY).is_file())
        if finished and stage.name not in reopened:
            run.console.print(f"{stage.name}: finished before, skipped", style="dim", highlight=False)
        else:
            _train(run, stage, reopened)
            gc.collect()  # compiled blocks refer to themselves, and would keep their weights on the device
            free_memory(run.device)
        if evaluation is not None:
            evaluate_stage(run, evaluation, stage)
        if run.world.is_main:
            complete_card(run.folder, stage.name)


def _train(run: Run, stage: Stage, reopened: Reopened) -> None:
    """Load the model with the weights that ``stage`` starts from, and run the stage."""
    from posttrain.model import loaded
    from posttrain.stages.lineage import FINAL, describe, exact, sources
    from posttrain.stages.made_from import confirm_weights
    from posttrain.stages.reference import reference_weights
    from posttrain.stages.stage import run_stage
    from posttrain.stages.stage_run import StageRun
    from posttrain.support.device import set_tf32

    recipe, folder = run.recipe, run.folder
    set_tf32(recipe.tf32)
    model = loaded(run.spec, run.device, "fp32" if stage.tune.type == "full" else run.spec.frozen_dtype())
    parents = sources(recipe, recipe.parent(stage), folder)
    base, ended = confirm_weights(run, stage, parents), reopened.get(stage.name)
    if run.world.is_main and stage.name in reopened and ended is None:
        reopen(folder / stage.name, run.note)
    reference = reference_weights(recipe, stage, model, folder)
    for source in parents:
        model.load_weights(exact(source), merge=stage.tune.merges)
    description = describe(run.spec, parents, stage, folder / stage.name / FINAL, base)
    if run.world.is_main:
        write(folder / stage.name / RECIPE, dump_recipe(recipe))
    run_stage(StageRun(recipe, stage, model, folder, run.console, run.world, ended), description, reference)
