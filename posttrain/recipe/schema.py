"""The schema of a recipe: strict pydantic models whose defaults are the published settings.

:mod:`posttrain.recipe.file` reads a file into it, with line numbers and spelling hints in its errors.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from posttrain.cache.settings import Cache
from posttrain.model import DtypeName
from posttrain.parallel.auto import Auto
from posttrain.parallel.ddp import DDP
from posttrain.parallel.deepspeed import DeepSpeed
from posttrain.parallel.fsdp2 import FSDP2
from posttrain.parallel.single import Single
from posttrain.recipe.evaluation_block import Evaluation
from posttrain.recipe.stage_block import BASE, Stage
from posttrain.recipe.variants import AnyModel, Name
from posttrain.registry import FREE, Spec, field_error
from posttrain.support.paths import is_path
from posttrain.support.spelling import meant

__all__ = ["BASE", "Evaluation", "Recipe", "Stage"]


def _device(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,4})?", value):
        hint = meant(value, ["auto", "cpu", "cuda", "mps"])
        raise ValueError(f"no device {value!r}{hint}: one of 'auto', 'cpu', 'cuda', 'cuda:N', 'mps'")
    return value


class Recipe(Spec):
    """A model, the stages it goes through, and how the results are compared."""

    name: Annotated[Name, FREE]
    """Name of the run and of its folder in ``runs/``."""
    seed: int = 0
    """Seed of every random draw of the run."""
    device: Annotated[str, BeforeValidator(_device), FREE] = "auto"
    """Device to run on: ``cpu``, ``cuda``, ``cuda:N``, ``mps``, or ``auto``: CUDA, else MPS, else the CPU."""
    tf32: bool = True
    """Whether CUDA multiplies float32 matrices in TF32 during training. Evaluations never do."""
    parallel: Annotated[Auto | Single | DDP | FSDP2 | DeepSpeed, Field(discriminator="strategy"), FREE] = (
        Auto()
    )
    """How the processes of a run train together. An unfinished run may continue under another strategy."""
    tracker: Annotated[Literal["tensorboard", "wandb", "mlflow", "trackio", "none"], FREE] = "tensorboard"
    """Where curves and image grids are logged, besides ``metrics.jsonl``, which is always written. A service
    names its project after the recipe, and its runs after the run's folder and the stage."""
    model: AnyModel
    """The model to train or evaluate, chosen by its ``type``, and where its weights are."""
    cache: Cache = Cache()
    """Encodings of prompts and images that are kept for other stages and runs. Default: none."""
    stages: list[Stage]
    """Training stages, in order. An empty list evaluates the model without training."""
    evaluation: Annotated[Evaluation | None, FREE] = None
    """How the base model and every stage are compared. Default: no evaluation."""

    @model_validator(mode="after")
    def _there_is_something_to_do(self) -> Self:
        if not self.stages and self.evaluation is None:
            raise field_error(("stages",), "there is neither a stage nor an evaluation")
        if self.stages and not self.model.trainable:
            message = f"{self.model.type} can be evaluated, not trained: give it no stages, or another model"
            raise field_error(("model", "type"), message)
        return self

    @model_validator(mode="after")
    def _stages_form_chains(self) -> Self:
        for i, stage in enumerate(self.stages):
            earlier = [BASE, *(s.name for s in self.stages[:i])]
            if stage.name in earlier:
                message = f"two stages are called {stage.name!r}: each writes a folder of its own"
                raise field_error(("stages", i, "name"), message)
            self._check_start(i, stage, earlier)
            reference = BASE if stage.reference is None else stage.reference
            if not is_path(reference) and reference not in earlier:
                known = ", ".join(map(repr, earlier))
                raise field_error(
                    ("stages", i, "reference"), f"no stage {reference!r} before this one: {known}"
                )
            if stage.monitor is not None and self.evaluation is None:
                message = "reads the evaluation's prompts and rewards, and the recipe has no evaluation"
                raise field_error(("stages", i, "monitor"), message)
        return self

    @model_validator(mode="after")
    def _best_is_a_score(self) -> Self:
        scores = [reward.label for reward in self.evaluation.rewards] if self.evaluation is not None else []
        for i, stage in enumerate(self.stages):
            if (name := stage.train.keep_best) is not None and name not in scores:
                known = ", ".join(map(repr, scores))
                message = f"the evaluation has no score {name!r}{meant(name, scores)}: {known}"
                raise field_error(("stages", i, "train", "keep_best"), message)
        return self

    def _check_start(self, i: int, stage: Stage, earlier: list[str]) -> None:
        start = stage.start_from
        if start is None or is_path(start) or start in earlier:
            return
        if start == stage.name:
            why = "is itself"
        elif start in [s.name for s in self.stages]:
            why = "does not come before it"
        else:
            why = "does not exist"
        message = (
            f"stage {stage.name!r} starts from {start!r}, which {why}: one of "
            f"{', '.join(map(repr, earlier))}, or a path such as './{start}'"
        )
        raise field_error(("stages", i, "start_from"), message)

    @model_validator(mode="after")
    def _what_is_cached_is_used(self) -> Self:
        if self.cache.prompts and not self.model.trainable:
            raise field_error(
                ("cache", "prompts"), f"the prompts of {self.model.type} cannot be cached: remove it"
            )
        if self.cache.latents == "off":
            return self
        if not any(stage.data.images_per_sample for stage in self.stages):
            raise field_error(
                ("cache", "latents"), "no stage trains on images, so it would have no effect: remove it"
            )
        for i, stage in enumerate(self.stages):
            for field, value in stage.data.for_cache().items():
                message = (
                    "the cache keeps the latents of one crop of each image, and "
                    f"{getattr(stage.data, field)!r} draws another crop each epoch: set '{field}: {value}' "
                    "(no change where images have their bucket's shape)"
                )
                raise field_error(("stages", i, "data", field), message)
        return self

    @model_validator(mode="after")
    def _packed_weights_are_shared(self) -> Self:
        for i, stage in enumerate(self.stages):
            other = stage.reference not in (None, self.parent(stage))
            if stage.tune.packing is not None and other:
                message = (
                    f"{stage.reference!r} has other weights than the stage starts from, and packed weights "
                    "cannot be exchanged for others: remove it, or 'tune.base'"
                )
                raise field_error(("stages", i, "reference"), message)
        return self

    @model_validator(mode="after")
    def _training_fits_the_strategy(self) -> Self:
        strategy = self.parallel.strategy
        for i, stage in enumerate(self.stages):
            if stage.train.optimizer == "adamw8bit" and strategy in ("fsdp2", "deepspeed"):
                message = (
                    f"adamw8bit needs whole weights, and {strategy} shards them: take adamw, or "
                    "'parallel: {strategy: ddp}'"
                )
                raise field_error(("stages", i, "train", "optimizer"), message)
            if stage.tune.packing is not None and strategy in ("fsdp2", "deepspeed"):
                message = (
                    f"{stage.tune.packing} packs weights whole, and {strategy} shards or moves them: take "
                    "'parallel: {strategy: ddp}', or remove it"
                )
                raise field_error(("stages", i, "tune", "base"), message)
            if (
                stage.train.compile is True
                and isinstance(self.parallel, DeepSpeed)
                and self.parallel.stage == 3
            ):
                message = (
                    "ZeRO-3 gathers and releases each block's weights, so every block would be compiled by "
                    "itself: remove it, or take 'parallel: {strategy: fsdp2}'"
                )
                raise field_error(("stages", i, "train", "compile"), message)
        return self

    def export_dtype(self, stage: Stage) -> DtypeName:
        """The precision of the weights in the ``final/`` of ``stage``. Raises ModelError for a damaged file
        of the base."""
        if stage.tune.type == "lora":
            return "fp32"
        return self.model.export_dtype() if stage.export_dtype == "auto" else stage.export_dtype

    def parent(self, stage: Stage) -> str:
        """The weights that ``stage`` starts from: ``base``, a stage's name, or a path."""
        if stage.start_from is not None:
            return stage.start_from
        index = self.stages.index(stage)
        return self.stages[index - 1].name if index else BASE

    def lineage(self, stage: Stage) -> list[str]:
        """The chain before ``stage``, in order: from ``base`` (or a path) to its parent."""
        return self.lineage_of(self.parent(stage))

    def lineage_of(self, name: str) -> list[str]:
        """What is loaded, in order, to get the weights of ``name`` (a stage, ``base`` or a path)."""
        for other in self.stages:
            if other.name == name:
                return [*self.lineage(other), name]
        return [name]

    def depth(self, stage: Stage) -> int:
        """The number of stages before ``stage`` in its chain.

        It is part of the key of the stage's draws: sibling branches have equal depth, so they draw alike.
        """
        return len(self.lineage(stage)) - 1
