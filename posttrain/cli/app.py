"""Defines ``posttrain`` with the commands for runs, recipes and Shapes; adds the other commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli import cache as cli_cache
from posttrain.cli import catalogue as cli_catalogue
from posttrain.cli import evaluate as cli_eval
from posttrain.cli import export as cli_export
from posttrain.cli import import_flags as cli_import
from posttrain.cli import plan as cli_plan
from posttrain.cli import report as cli_report
from posttrain.cli import rewards as cli_rewards
from posttrain.cli import sample as cli_sample
from posttrain.cli import schema as cli_schema
from posttrain.cli import smoke as cli_smoke
from posttrain.cli import status as cli_status
from posttrain.cli import version as cli_version
from posttrain.cli.ending import run_to_the_end
from posttrain.cli.options import (
    MAX_SEED,
    DebugOption,
    RecipeArgument,
    terminal,
)
from posttrain.cli.warn import show_in_one_line
from posttrain.support.display import print_any_text, restart_in_utf8

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",  # else the line ends of docstrings are shown, in addition to the terminal's
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback()(cli_version.options)
recipes_app = typer.Typer(
    help="List, show or copy the recipes that come with posttrain.", no_args_is_help=False
)
shapes_app = typer.Typer(
    help="Make a data set of Shapes: rendered coloured shapes with captions.", no_args_is_help=True
)

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="A recipe's name, as 'posttrain recipes' lists it.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A.B=C",
        help="Set a field of the recipe, such as stages.soar.train.steps=100. Repeatable.",
    ),
]


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    output: Annotated[Path | None, typer.Option(help="The run folder. Default: runs/NAME.")] = None,
    nproc: Annotated[
        int, typer.Option(min=1, max=1024, help="Number of processes, each on its own GPU.")
    ] = 1,
    fresh: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE",
            help="Remove what this stage, and those trained from it, wrote; begin them anew. Repeatable.",
        ),
    ] = None,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Run all of it once in about a minute, shrunk, in runs/NAME-smoke."),
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Run a recipe: train its stages, evaluate them and write a report.

    The same command resumes an interrupted run, also with a changed recipe if nothing that was trained would
    differ. Ctrl-C and SIGTERM finish the step and write a checkpoint (exit code 75); a second one stops at
    once. It also works under torchrun, accelerate launch and srun.
    """
    del debug
    from posttrain.distributed.launch import run_in_processes
    from posttrain.recipe.file import check_or_raise, load_recipe
    from posttrain.stages.chain import run as run_recipe
    from posttrain.stages.processes import check_processes

    if output is not None:
        _check_output(recipe, output)
    if smoke:
        cli_smoke.run_shrunk(recipe, overrides or (), output, nproc, fresh or ())
        return
    loaded = load_recipe(recipe, overrides or ())
    if nproc == 1:
        run_recipe(loaded, output, terminal(), fresh or ())
        return
    # check once here, not once in every process
    check_or_raise(loaded)
    check_processes(loaded, nproc)
    run_in_processes(nproc)


def _check_output(recipe: str, output: Path) -> None:
    """Raise PosttrainError if a run in ``output`` would replace the file ``recipe`` by its full form."""
    from posttrain.errors import PosttrainError
    from posttrain.stages.stage_state import RECIPE
    from posttrain.support.paths import is_file
    from posttrain.weights.run_folders import is_run

    kept = output / RECIPE
    if is_file(recipe) and is_file(kept) and os.path.samefile(recipe, kept) and not is_run(output):
        raise PosttrainError(
            f"--output: a run in {str(output)!r} would replace {recipe} by the recipe with all its defaults: "
            "give another folder, or the file another name"
        )


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    data: Annotated[
        bool, typer.Option("--data", help="Also read every image and list the bad ones.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Validate a recipe and print what it would do, without loading weights."""
    del debug
    from posttrain.errors import RecipeError
    from posttrain.planning.overview import overview
    from posttrain.recipe.file import load_recipe

    console, loaded = terminal(), load_recipe(recipe, overrides or ())
    if (reason := loaded.model.unfit()) is not None:
        raise RecipeError(f"model.path: {reason}")
    console.print(overview(loaded))
    if data:
        from posttrain.planning.scan import scan_data

        scan_data(loaded, console)


app.command("plan")(cli_plan.plan_resources)


@recipes_app.callback(invoke_without_command=True)
def recipes_list(context: typer.Context) -> None:
    """List the recipes that come with posttrain."""
    if context.invoked_subcommand is not None:
        return
    from rich.table import Table
    from rich.text import Text

    from posttrain.recipe.file import shipped_recipes

    table = Table(box=None, pad_edge=False, show_header=False)
    for name, summary in shipped_recipes().items():
        table.add_row(Text(name, "bold"), summary)
    terminal().print(table)


@recipes_app.command("show")
def recipes_show(name: NameArgument, debug: DebugOption = False) -> None:
    """Print a shipped recipe."""
    del debug
    from posttrain.recipe.file import recipe_text

    sys.stdout.write(recipe_text(name))


@recipes_app.command("copy")
def recipes_copy(
    name: NameArgument,
    target: Annotated[
        Path | None, typer.Argument(metavar="TARGET", help="A file or folder. Default: NAME.yaml.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Copy a shipped recipe to a file that you can edit."""
    del debug
    from shlex import quote

    from posttrain.errors import PosttrainError
    from posttrain.recipe.file import recipe_text
    from posttrain.support.files import write

    text, target = recipe_text(name), target or Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    if target.exists():
        raise PosttrainError(f"{str(target)!r} exists: give another target")
    write(target, text)
    terminal().print(f"wrote {target}; run it with: posttrain run {quote(str(target))}", soft_wrap=True)


@shapes_app.command("build")
def shapes_build(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write the data set.")],
    images: Annotated[int, typer.Option(min=1, max=10_000_000, help="Number of images.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the scenes.")] = 0,
    style: Annotated[str, typer.Option(help="clean, or web (wrong captions and clutter).")] = "clean",
    debug: DebugOption = False,
) -> None:
    """Render images (images/) with captions (train.jsonl) and GenEval-format metadata (metadata.jsonl)."""
    del debug
    from posttrain.errors import PosttrainError
    from posttrain.shapes.dataset import build
    from posttrain.shapes.scene import STYLES
    from posttrain.support.wording import counted

    if style not in STYLES:
        raise PosttrainError(f"--style: no style {style!r}; there are {', '.join(STYLES)}")
    build(folder, images, seed, style)
    terminal().print(f"wrote {counted(images, 'image')} to {folder}", soft_wrap=True)


app.command("sample")(cli_sample.draw_samples)
app.command("eval")(cli_eval.evaluate_model)
app.command("compare")(cli_eval.compare_evaluations)
app.command("status")(cli_status.show_status)
app.command("export")(cli_export.export_stage)
app.command("import-flags")(cli_import.import_flags)
app.add_typer(recipes_app, name="recipes")
app.add_typer(shapes_app, name="shapes")
app.command("report")(cli_report.write_reports)
app.command("schema")(cli_schema.show_schema)
cli_catalogue.register(app)
cli_rewards.register(app)
cli_cache.register(app)


def main() -> None:
    """Run the command line."""
    restart_in_utf8()
    print_any_text()
    show_in_one_line()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns that torchvision is missing
    run_to_the_end(app)
