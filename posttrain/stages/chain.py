"""How does a whole recipe run: its stages in order, each evaluated, and a report at the end?"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import math
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import PosttrainError, RecipeError
from posttrain.recipe.file import check_or_raise, dump_recipe, parse_recipe
from posttrain.recipe.schema import BASE, Recipe, Stage
from posttrain.support.differences import differences
from posttrain.support.files import locked, write, writing
from posttrain.support.versions import versions
from posttrain.support.wording import multiples_near

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor

    from posttrain.distributed.world import World
    from posttrain.model import FlowModel, Model

PACKAGES = (
    "posttrain",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "pydantic",
    "numpy",
    "pillow",
)

NEUTRAL = ("device", "cache.path", "cache.max_size", "model.offload")
"""Fields that may differ when a run goes on: they change no result."""


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
        with _exclusive(folder) if world.is_main else contextlib.nullcontext():
            if world.is_main:
                _claim(folder, recipe, device)
            world.barrier()
            if not (folder / "recipe.yaml").is_file():
                raise PosttrainError(
                    f"process {world.rank} does not see what process 0 wrote to {str(folder)!r}: the run "
                    "folder must be one that all processes share"
                )
            with world.main_first():
                spec = recipe.model.materialise(folder / "model")
            _stages(recipe, spec, folder, device, console, world)
            if not world.is_main:
                return folder
            report = write_report(folder)
    console.print(table(folder, console.width))
    console.print(f"report: {report}", soft_wrap=True, highlight=False)
    return folder


def _stages(
    recipe: Recipe, spec: Model, folder: Path, device: torch.device, console: Console, world: World
) -> None:
    """Evaluate the base, then train and evaluate each stage, where that is not done yet."""
    if recipe.evaluation is not None:
        _evaluate(recipe, spec, None, folder, device, console, world)
    for stage in recipe.stages:
        if world.broadcast((folder / stage.name / "stage.json").is_file()):
            console.print(f"[dim]{stage.name}: finished before, skipped[/dim]", highlight=False)
        else:
            _train(recipe, spec, stage, folder, device, console, world)
        if recipe.evaluation is not None:
            _evaluate(recipe, spec, stage, folder, device, console, world)


def _train(
    recipe: Recipe,
    spec: Model,
    stage: Stage,
    folder: Path,
    device: torch.device,
    console: Console,
    world: World,
) -> None:
    from posttrain.stages.lineage import describe, sources
    from posttrain.stages.stage import run_stage
    from posttrain.support.device import set_tf32

    set_tf32(recipe.tf32)
    model = spec.load(device, "fp32" if stage.tune.type == "full" else spec.frozen_dtype())
    reference = _reference(recipe, stage, model, folder)
    parents = sources(recipe, recipe.parent(stage), folder)
    for source in parents:
        model.load_weights(source, merge=stage.tune.merges)
    description = describe(spec, parents, stage, folder / stage.name / "final")
    run_stage(recipe, stage, model, folder, description, console, reference, world)


def _reference(recipe: Recipe, stage: Stage, model: FlowModel, folder: Path) -> dict[str, Tensor] | None:
    """The weights of a ``reference`` that is not what the stage starts from; ``model`` is left as it was.

    They are in the CPU's memory: a device that is to hold a part of each has no room for three models.
    """
    if stage.reference is None or stage.reference == recipe.parent(stage):
        return None
    from posttrain.stages.lineage import sources

    def now() -> dict[str, Tensor]:
        return {n: p.detach().to("cpu", copy=True) for n, p in model.transformer.named_parameters()}

    base = now()
    for source in sources(recipe, stage.reference, folder):
        model.load_weights(source)
    found = now()
    for name, parameter in model.transformer.named_parameters():
        parameter.data.copy_(base[name])
    return found


def _evaluate(
    recipe: Recipe,
    spec: Model,
    stage: Stage | None,
    folder: Path,
    device: torch.device,
    console: Console,
    world: World,
) -> None:
    """Evaluate what a stage wrote (the base model for None), reading it as any other tool would."""
    from posttrain.evaluation.evaluate import Share, evaluate
    from posttrain.sampling.sampler import flow_sampler, sampler_of
    from posttrain.stages.caches import fill_for_evaluation
    from posttrain.stages.lineage import sources
    from posttrain.support.device import set_tf32

    assert recipe.evaluation is not None, "called for recipes with an evaluation"
    name = stage.name if stage else BASE
    target = folder / name / "evaluation"
    if world.broadcast((target / "eval.json").is_file()):
        return
    set_tf32(False)
    weights = BASE if stage is None else "raw" if stage.train.ema is None else "ema"
    if stage is None:
        sampler = sampler_of(spec, device, recipe.evaluation)
    else:
        model = spec.load(device, "fp32")
        for source in sources(recipe, stage.name, folder):
            model.load_weights(source)
        sampler = flow_sampler(model, spec, recipe.evaluation, f"{name}/final")
    fill_for_evaluation(recipe, sampler, name, console, world)
    share = Share(world.rank, world.size)
    evaluate(sampler, recipe.evaluation, target, name=name, weights=weights, console=console, share=share)
    world.barrier()
    if not (target / "eval.json").is_file():
        raise PosttrainError(f"another process is evaluating into {str(target)!r}; wait for it")


def check_processes(recipe: Recipe, processes: int) -> None:
    """Raise RecipeError where the recipe cannot run in that many processes."""
    if problem := recipe.parallel.problem(processes):
        raise RecipeError(f"parallel: {problem}")
    for stage in recipe.stages:
        size = stage.train.batch_size
        if stage.algorithm.needs == "rewards" and size % processes:
            unit = math.lcm(stage.algorithm.samples_per_prompt, processes)
            raise RecipeError(
                f"stages.{stage.name}.train.batch_size: {size} samples do not split over {processes} "
                f"processes; the nearest that do are {multiples_near(size, unit)}"
            )


def _claim(folder: Path, recipe: Recipe, device: torch.device) -> None:
    """Write what the run is, or check that the folder holds this very run."""
    resolved = folder / "recipe.yaml"
    if resolved.is_file():
        before = parse_recipe(resolved.read_text("utf-8"), str(resolved), checks=False)
        # where and on how many devices it goes on does not change what the run is
        one, other = (r.model_dump(mode="json", exclude={"device", "parallel"}) for r in (before, recipe))
        if changed := list(differences(one, other, NEUTRAL)):
            raise RecipeError(
                f"{str(folder)!r} holds a run of another recipe; it differs in: {'; '.join(changed[:5])}. "
                "Give another --output or name, or remove the folder"
            )
        return
    stages = [{"name": BASE, "parent": None, "algorithm": None}] + [
        {"name": s.name, "parent": recipe.parent(s), "algorithm": s.algorithm.type} for s in recipe.stages
    ]
    write(folder / "run.json", json.dumps({"name": recipe.name, "stages": stages}, indent=2))
    write(folder / "environment.json", json.dumps(environment(recipe, device), indent=2))
    write(resolved, dump_recipe(recipe))


def environment(recipe: Recipe, device: torch.device) -> dict:
    """Versions, machine and seed, as ``environment.json`` keeps them."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "versions": versions(PACKAGES),
        "device": f"{device} {name}".strip(),
        "threads": torch.get_num_threads(),
        "seed": recipe.seed,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process. Raises PosttrainError where another run holds it."""
    with contextlib.ExitStack() as held:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            free = held.enter_context(locked(folder / ".lock", wait=False))
        if not free:
            raise PosttrainError(f"another run is writing to {str(folder)!r}; wait for it or give --output")
        yield
