"""Evaluates the base model, or what a stage wrote, within a run."""

from __future__ import annotations

from posttrain.errors import PosttrainError
from posttrain.evaluation.evaluate import Share, evaluate
from posttrain.model import Sampler
from posttrain.recipe.schema import BASE, Evaluation, Stage
from posttrain.sampling.sampler import flow_sampler, sampler_of
from posttrain.stages.caches import fill_for_evaluation
from posttrain.stages.lineage import exported_weights, sources
from posttrain.stages.run import Run
from posttrain.support.device import set_tf32


def evaluate_stage(run: Run, evaluation: Evaluation, stage: Stage | None) -> None:
    """Evaluate the artifact of ``stage``, or the base model for None, unless there is a result card.

    The artifact is read as any other tool would read it, in float32 and without TF32. Raises PosttrainError.
    """
    name, world = stage.name if stage else BASE, run.world
    folder = run.folder / name / "evaluation"
    if world.broadcast((folder / "eval.json").is_file()):
        return
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
    if not (folder / "eval.json").is_file():
        raise PosttrainError(f"another process is evaluating into {str(folder)!r}; wait for it")


def _sampler(run: Run, evaluation: Evaluation, stage: Stage | None) -> Sampler:
    if stage is None:
        return sampler_of(run.spec, run.device, evaluation)
    model = run.spec.load(run.device, "fp32")
    for source in sources(run.recipe, stage.name, run.folder):
        model.load_weights(source)
    return flow_sampler(model, run.spec, evaluation, f"{stage.name}/final")
