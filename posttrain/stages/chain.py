"""Runs a whole recipe: its stages in order, each evaluated, and a report at the end."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.recipe.file import check_or_raise
from posttrain.recipe.schema import Recipe, Stage
from posttrain.stages.processes import check_processes
from posttrain.stages.run import Run
from posttrain.stages.run_folder import claimed

if TYPE_CHECKING:
    from rich.console import Console

# what needs torch or diffusers is imported where it is used, so that the command line starts fast


def run(recipe: Recipe, output: Path | None = None, console: Console | None = None) -> Path:
    """Run every stage that is not finished, evaluate, write the report, and return the run folder.

    The folder is ``output`` or ``runs/<name>``. Given the same recipe again, finished stages are skipped
    and an unfinished one goes on from its last checkpoint. Raises RecipeError where the folder holds a run
    of another recipe, and PosttrainError for whatever stops a stage.
    """
    from rich.console import Console

    from posttrain.distributed.world import joined
    from posttrain.evaluation.report.page import write_report
    from posttrain.evaluation.report.table import table
    from posttrain.support.device import resolve

    console = console or Console()
    check_or_raise(recipe)
    folder = (output or Path("runs") / recipe.name).absolute()
    device = resolve(recipe.device)
    with joined(device, group=recipe.parallel.needs_group) as world:
        check_processes(recipe, world.size)
        if not world.is_main:
            console = Console(file=io.StringIO())
        with claimed(folder, recipe, device, world):
            with world.main_first():
                spec = recipe.model.build(folder / "model")
            _run_stages(Run(recipe, spec, folder, device, console, world))
            if not world.is_main:
                return folder
            report = write_report(folder)
    console.print(table(folder, console.width))
    console.print(f"report: {report}", soft_wrap=True, highlight=False)
    return folder


def _run_stages(run: Run) -> None:
    """Evaluate the base model, then train and evaluate each stage; skip what was done before."""
    from posttrain.stages.stage_evaluation import evaluate_stage

    evaluation = run.recipe.evaluation
    if evaluation is not None:
        evaluate_stage(run, evaluation, None)
    for stage in run.recipe.stages:
        if run.world.broadcast((run.folder / stage.name / "stage.json").is_file()):
            run.console.print(f"[dim]{stage.name}: finished before, skipped[/dim]", highlight=False)
        else:
            _train(run, stage)
        if evaluation is not None:
            evaluate_stage(run, evaluation, stage)


def _train(run: Run, stage: Stage) -> None:
    """Load the model with the weights that ``stage`` starts from, and run the stage."""
    from posttrain.stages.lineage import describe, sources
    from posttrain.stages.reference import reference_weights
    from posttrain.stages.stage import run_stage
    from posttrain.stages.stage_run import StageRun
    from posttrain.support.device import set_tf32

    recipe, folder = run.recipe, run.folder
    set_tf32(recipe.tf32)
    model = run.spec.load(run.device, "fp32" if stage.tune.type == "full" else run.spec.frozen_dtype())
    reference = reference_weights(recipe, stage, model, folder)
    parents = sources(recipe, recipe.parent(stage), folder)
    for source in parents:
        model.load_weights(source, merge=stage.tune.merges)
    description = describe(run.spec, parents, stage, folder / stage.name / "final")
    run_stage(StageRun(recipe, stage, model, folder, run.console, run.world), description, reference)
