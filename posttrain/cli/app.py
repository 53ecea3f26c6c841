"""The command line: runs and recipes here, evaluations, rewards and the cache in modules of their own."""

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
    help="Post-train rectified-flow text-to-image models: SFT, SOAR, Flow-GRPO, DiffusionNFT, and chains.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(
    help="List, show or copy the recipes that come with posttrain.", no_args_is_help=False
)
shapes_app = typer.Typer(
    help="The small world of coloured shapes that needs no download.", no_args_is_help=True
)
app.add_typer(recipes_app, name="recipes")
app.add_typer(shapes_app, name="shapes")
app.command("plan")(cli_plan.plan_resources)
app.command("eval")(cli_eval.evaluate_model)
app.command("compare")(cli_eval.compare_evaluations)
cli_rewards.register(app)
cli_cache.register(app)

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="A.B=C", help="Change a field, e.g. stages.soar.train.steps=100. Repeatable."
    ),
]


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    output: Annotated[Path | None, typer.Option(help="The run folder; runs/NAME by default.")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="How many processes train, each on its GPU.")] = 1,
    debug: DebugOption = False,
) -> None:
    """Run a recipe's stages, evaluate them and write the report. Given again, it goes on where it stopped.

    Under torchrun, accelerate launch or srun it is one of the processes that these started.
    """
    del debug
    from posttrain.distributed.launch import run_in_processes
    from posttrain.recipe.file import check_or_raise, load_recipe
    from posttrain.stages.chain import check_processes
    from posttrain.stages.chain import run as run_recipe

    loaded = load_recipe(recipe, overrides or ())
    if nproc == 1:
        run_recipe(loaded, output, terminal())
        return
    # what every process would say is said once
    check_or_raise(loaded)
    check_processes(loaded, nproc)
    run_in_processes(nproc)


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    data: Annotated[
        bool, typer.Option("--data", help="Also read every image, and list the bad ones.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Validate a recipe and print what it would do, without loading a weight."""
    del debug
    from posttrain.planning.outline import plan, scan_data
    from posttrain.recipe.file import load_recipe

    console, loaded = terminal(), load_recipe(recipe, overrides or ())
    console.print(plan(loaded))
    if data:
        scan_data(loaded, console)


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
def recipes_show(name: str, debug: DebugOption = False) -> None:
    """Print a shipped recipe."""
    del debug
    from posttrain.recipe.file import recipe_text

    sys.stdout.write(recipe_text(name))


@recipes_app.command("copy")
def recipes_copy(
    name: str,
    target: Annotated[Path | None, typer.Argument(help="Where to; NAME.yaml by default.")] = None,
    debug: DebugOption = False,
) -> None:
    """Copy a shipped recipe to a file of yours."""
    del debug
    from posttrain.errors import PosttrainError
    from posttrain.recipe.file import recipe_text

    text, target = recipe_text(name), target or Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    if target.exists():
        raise PosttrainError(f"{str(target)!r} exists; give another target")
    target.write_text(text)
    terminal().print(f"wrote {target}; run it with: posttrain run {target}", highlight=False)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="A stage's folder, a diffusers folder, or a hub name.")],
    prompt: Annotated[list[str], typer.Option(help="What to draw. Repeatable.")],
    output: Annotated[Path, typer.Option(help="The folder for the images.")] = Path("samples"),
    images: Annotated[int, typer.Option(min=1, help="Images a prompt.")] = 4,
    resolution: Annotated[int, typer.Option(min=8, help="Side in pixels.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 40,
    guidance: Annotated[float, typer.Option(min=0, help="Classifier-free guidance scale.")] = 4.5,
    solver: Annotated[str, typer.Option(help="euler, dpm1 or dpm2.")] = "euler",
    seed: int = 0,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Draw images and a grid of them."""
    del debug
    from posttrain.stages.samples import draw

    files = draw(
        model, prompt, output, images, resolution, steps, guidance, solver, seed, base, device, terminal()
    )
    terminal().print(f"wrote {len(files)} images and grid.png to {output}", highlight=False)


@shapes_app.command("build")
def shapes_build(
    folder: Annotated[Path, typer.Argument(help="Where to write the data set.")],
    images: Annotated[int, typer.Option(min=1, help="How many images.")] = 2000,
    seed: int = 0,
    style: Annotated[str, typer.Option(help="clean, or web: noisy captions and clutter.")] = "clean",
    debug: DebugOption = False,
) -> None:
    """Render images with captions (train.jsonl, images/) and GenEval-format metadata (metadata.jsonl)."""
    del debug
    from posttrain.errors import PosttrainError
    from posttrain.shapes.dataset import build
    from posttrain.shapes.scene import STYLES

    if style not in STYLES:
        raise PosttrainError(f"--style: no style {style!r}; there are {', '.join(STYLES)}")
    build(folder, images, seed, style)
    terminal().print(f"wrote {images} images to {folder}", highlight=False)


def main() -> None:
    """Run the command line: errors of the user's making are one message and exit code 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # torchvision's absence is not news to anyone
    debug = "--debug" in sys.argv
    try:
        app()
    except (KeyboardInterrupt, SystemExit) as stop:
        # typer makes an exit with code 130 of Ctrl-C
        if isinstance(stop, SystemExit) and stop.code != 130:
            raise
        if CHILD in os.environ:
            sys.exit(130)  # and the one that started this says it
        _fail("interrupted; the same command goes on from the last checkpoint", 130)
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
