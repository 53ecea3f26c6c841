"""Defines ``posttrain`` with the commands for runs, recipes, samples and Shapes; adds the other commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli import cache as cli_cache
from posttrain.cli import evaluate as cli_eval
from posttrain.cli import plan as cli_plan
from posttrain.cli import rewards as cli_rewards
from posttrain.cli.options import BaseOption, DebugOption, DeviceOption, RecipeArgument, terminal
from posttrain.distributed.launch import CHILD

app = typer.Typer(
    help="Post-train rectified-flow text-to-image models by SFT, SOAR, Flow-GRPO, DiffusionNFT, or chains.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
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
    nproc: Annotated[int, typer.Option(min=1, help="Number of processes, each on its own GPU.")] = 1,
    debug: DebugOption = False,
) -> None:
    """Run a recipe: train its stages, evaluate them and write a report.

    The same command resumes an interrupted run. It also works under torchrun, accelerate launch and srun.
    """
    del debug
    from posttrain.distributed.launch import run_in_processes
    from posttrain.recipe.file import check_or_raise, load_recipe
    from posttrain.stages.chain import run as run_recipe
    from posttrain.stages.processes import check_processes

    loaded = load_recipe(recipe, overrides or ())
    if nproc == 1:
        run_recipe(loaded, output, terminal())
        return
    # check once here, not once in every process
    check_or_raise(loaded)
    check_processes(loaded, nproc)
    run_in_processes(nproc)


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
    from posttrain.planning.overview import overview
    from posttrain.recipe.file import load_recipe

    console, loaded = terminal(), load_recipe(recipe, overrides or ())
    console.print(overview(loaded), highlight=False)
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

    from posttrain.recipe.file import shipped_recipes

    table = Table(box=None, pad_edge=False, show_header=False)
    for name, summary in shipped_recipes().items():
        table.add_row(f"[bold]{name}[/bold]", summary)
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
    from posttrain.errors import PosttrainError
    from posttrain.recipe.file import recipe_text

    text, target = recipe_text(name), target or Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    if target.exists():
        raise PosttrainError(f"{str(target)!r} exists: give another target")
    target.write_text(text)
    terminal().print(f"wrote {target}; run it with: posttrain run {target}", highlight=False)


@app.command()
def sample(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A stage's folder, a diffusers folder, or a hub name.")
    ],
    prompt: Annotated[list[str], typer.Option(help="The prompt. Repeatable.")],
    output: Annotated[Path, typer.Option(help="The folder for the images.")] = Path("samples"),
    images: Annotated[int, typer.Option(min=1, help="Images for each prompt.")] = 4,
    resolution: Annotated[int, typer.Option(min=8, help="Side of the images in pixels.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Number of sampling steps.")] = 40,
    guidance: Annotated[float, typer.Option(min=0, help="Classifier-free guidance; 1 is none.")] = 4.5,
    solver: Annotated[str, typer.Option(help="euler, dpm1 or dpm2.")] = "euler",
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Sample images for prompts and write them with a grid."""
    del debug
    from posttrain.stages.samples import SampleSettings, draw

    settings = SampleSettings(images, resolution, steps, guidance, solver, seed, base, device)
    files = draw(model, prompt, output, settings, terminal())
    terminal().print(f"wrote {len(files)} images and grid.png to {output}", highlight=False)


@shapes_app.command("build")
def shapes_build(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write the data set.")],
    images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 0,
    style: Annotated[str, typer.Option(help="clean, or web (wrong captions and clutter).")] = "clean",
    debug: DebugOption = False,
) -> None:
    """Render images (images/) with captions (train.jsonl) and GenEval-format metadata (metadata.jsonl)."""
    del debug
    from posttrain.errors import PosttrainError
    from posttrain.shapes.dataset import build
    from posttrain.shapes.scene import STYLES

    if style not in STYLES:
        raise PosttrainError(f"--style: no style {style!r}; there are {', '.join(STYLES)}")
    build(folder, images, seed, style)
    terminal().print(f"wrote {images} images to {folder}", highlight=False)


app.command("eval")(cli_eval.evaluate_model)
app.command("compare")(cli_eval.compare_evaluations)
app.add_typer(recipes_app, name="recipes")
app.add_typer(shapes_app, name="shapes")
cli_rewards.register(app)
cli_cache.register(app)


def main() -> None:
    """Run the command line. An error that the user can correct is one message and exit code 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns that torchvision is missing
    debug = "--debug" in sys.argv
    try:
        app()
    except (KeyboardInterrupt, SystemExit) as stop:
        # typer turns Ctrl-C into an exit with code 130
        if isinstance(stop, SystemExit) and stop.code != 130:
            raise
        if CHILD in os.environ:
            sys.exit(130)  # the process that started this one prints the message
        _fail("interrupted; the same command resumes from the last checkpoint", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        from posttrain.errors import PosttrainError

        if debug or not isinstance(error, (PosttrainError, OSError, MemoryError)):
            raise
        _fail(str(error) or type(error).__name__, 1)


def _fail(message: str, code: int) -> None:
    from rich.console import Console

    Console(stderr=True).print(
        f"[bold red]error:[/bold red] {_escaped(message)}", soft_wrap=True, highlight=False
    )
    sys.exit(code)


def _escaped(message: str) -> str:
    from rich.markup import escape

    return escape(message)
