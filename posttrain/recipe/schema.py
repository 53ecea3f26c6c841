"""What may a recipe say?

The schema of a recipe: strict pydantic models whose defaults are the published settings. Reading a file,
with lines and spellings in its errors, is :mod:`posttrain.recipe.file`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from posttrain.algorithm import Algorithm
from posttrain.cache.settings import Cache
from posttrain.data.settings import AnyData, AnyPrompts, Images, PromptData
from posttrain.engine.monitor import Monitor
from posttrain.flow.sampling_settings import Sampling
from posttrain.model import DtypeName, Model
from posttrain.optim.settings import Train
from posttrain.parallel.auto import Auto
from posttrain.parallel.ddp import DDP
from posttrain.parallel.deepspeed import DeepSpeed
from posttrain.parallel.fsdp2 import FSDP2
from posttrain.parallel.single import Single
from posttrain.policy.tuning import Full, Lora
from posttrain.recipe.reward_blocks import reward_blocks
from posttrain.registry import Spec, at, union
from posttrain.reward import Reward
from posttrain.support.paths import is_path
from posttrain.support.spelling import meant
from posttrain.support.wording import multiples_near

if TYPE_CHECKING:
    AnyAlgorithm = Algorithm
    AnyModel = Model
    AnyReward = Reward
else:
    AnyAlgorithm = union(Algorithm, "posttrain.algorithms")
    AnyModel = union(Model, "posttrain.models")
    AnyReward = union(Reward, "posttrain.rewards")

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
BASE = "base"
"""The name of the model before any stage, as ``start_from`` and the report spell it."""


def _device(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        hint = meant(value, ["auto", "cpu", "cuda", "mps"])
        raise ValueError(f"no device {value!r}{hint}: one of 'auto', 'cpu', 'cuda', 'cuda:N', 'mps'")
    return value


class Stage(Spec):
    """One algorithm run on one data set from given weights."""

    name: Name
    start_from: str | None = None
    """``base``, an earlier stage, or a folder that a stage wrote; the stage before by default."""
    algorithm: AnyAlgorithm
    data: AnyData
    rewards: Annotated[list[AnyReward], BeforeValidator(reward_blocks)] = []
    """What an online algorithm maximises: the weighted sum."""
    reference: str | None = None
    """What an online algorithm is held to by its KL term: ``base``, an earlier stage, or a folder that a
    stage wrote; what the stage starts from by default."""
    monitor: Monitor | None = None
    """Held-out scores while the stage trains, and alarms; none by default."""
    tune: Annotated[Full | Lora, Field(discriminator="type")] = Full()
    train: Train
    export_dtype: DtypeName = "fp32"
    """Of the transformer written to ``final/`` after full fine-tuning."""

    @model_validator(mode="after")
    def _name_is_free(self) -> Self:
        if self.name in (BASE, "data", "model"):
            raise ValueError(f"a stage cannot be called {self.name!r}: that folder of a run has another use")
        return self

    @model_validator(mode="after")
    def _algorithm_gets_what_it_needs(self) -> Self:
        kind, online = self.algorithm.type, self.algorithm.needs == "rewards"
        prompts = isinstance(self.data, PromptData)
        if online and not prompts:
            raise at(("data",), f"{kind} makes its own images: give it 'prompts', not images")
        if not online and prompts:
            raise at(("data",), f"{kind} trains on given images: give it 'images', not prompts")
        if online and not self.rewards:
            raise at(("rewards",), f"{kind} learns from rewards, and there is none")
        if not online and self.rewards:
            raise at(("rewards",), f"{kind} does not use rewards, so these would have no effect: remove them")
        if self.reference is not None and "reference" not in self.algorithm.roles:
            words = f"{kind}, as it is set here, has no reference, so it would have no effect: remove it"
            raise at(("reference",), words)
        if self.monitor is not None and self.monitor.every % self.train.steps_per_batch:
            words = f"{self.monitor.every} is no multiple of steps_per_batch, {self.train.steps_per_batch}"
            raise at(("monitor", "every"), words)
        if self.monitor is not None and not online:
            for alarm in ("reward_hacking", "spread_collapse"):
                if getattr(self.monitor, alarm) != "warn":
                    words = f"{kind} has no rewards, so this alarm never sounds: remove it"
                    raise at(("monitor", alarm), words)
        _no_reward_twice(self.rewards)
        size, batch = self.algorithm.samples_per_prompt, self.train.batch_size
        if batch % size:
            near = multiples_near(batch, size)
            words = f"{batch} samples cannot be split into groups of {size}; the nearest that can are {near}"
            raise at(("train", "batch_size"), words)
        return self


def _no_reward_twice(rewards: list[Reward]) -> None:
    kinds = [reward.label for reward in rewards]
    if twice := {kind for kind in kinds if kinds.count(kind) > 1}:
        raise at(("rewards",), f"{', '.join(sorted(twice))} is given twice")


class Evaluation(Sampling):
    """How the base model and every stage are compared: same prompts, same noise, same sampler."""

    prompts: AnyPrompts
    rewards: Annotated[list[AnyReward], Field(min_length=1), BeforeValidator(reward_blocks)]
    images_per_prompt: int = Field(1, ge=1)
    batch_size: int = Field(16, ge=1)
    grid: int = Field(8, ge=0)
    """How many prompts are shown as images in the report."""
    keep: Literal["grid", "png", "jpeg"] = "grid"
    """Which images stay: those that the report shows, or all, with prompt and scores in their metadata."""

    @model_validator(mode="after")
    def _rewards_differ(self) -> Self:
        _each_reported(self.rewards)
        return self


class Scoring(Spec):
    """Rewards that are reported, each by itself, for images that are there already."""

    rewards: Annotated[list[AnyReward], Field(min_length=1), BeforeValidator(reward_blocks)]

    @model_validator(mode="after")
    def _rewards_differ(self) -> Self:
        _each_reported(self.rewards)
        return self


class Recipe(Spec):
    """A model, the stages it goes through, and how the results are compared."""

    name: Name
    seed: int = 0
    """Every draw of the run is a function of it."""
    device: Annotated[str, BeforeValidator(_device)] = "auto"
    tf32: bool = True
    """Let CUDA multiply float32 matrices in TF32 while a stage trains; evaluations never do."""
    parallel: Annotated[Auto | Single | DDP | FSDP2 | DeepSpeed, Field(discriminator="strategy")] = Auto()
    """How the processes of a run train together; a run may go on under another strategy."""
    tracker: Literal["tensorboard", "none"] = "tensorboard"
    """Where curves and image grids go besides metrics.jsonl, which is always written."""
    model: AnyModel
    cache: Cache = Cache()
    """Which encodings are kept for other stages and runs; none by default."""
    stages: list[Stage]
    """What the model goes through; none, to evaluate it as it is."""
    evaluation: Evaluation | None = None

    @model_validator(mode="after")
    def _there_is_something_to_do(self) -> Self:
        if not self.stages and self.evaluation is None:
            raise at(("stages",), "there is neither a stage nor an evaluation")
        if self.stages and not self.model.trainable:
            words = f"{self.model.type} can be evaluated, not trained: give it no stages, or another model"
            raise at(("model", "type"), words)
        return self

    @model_validator(mode="after")
    def _stages_form_chains(self) -> Self:
        before: list[str] = [BASE]
        for i, stage in enumerate(self.stages):
            if stage.name in before:
                words = f"two stages are called {stage.name!r}: each writes a folder of its own"
                raise at(("stages", i, "name"), words)
            if (start := stage.start_from) is not None and not is_path(start) and start not in before:
                later = [s.name for s in self.stages if s.name not in before]
                why = "does not come before it" if start in later else "does not exist"
                why = "is itself" if start == stage.name else why
                raise at(
                    ("stages", i, "start_from"),
                    f"stage {stage.name!r} starts from {start!r}, which {why}: one of "
                    f"{', '.join(map(repr, before))}, or a path such as './{start}'",
                )
            reference = BASE if stage.reference is None else stage.reference
            if not is_path(reference) and reference not in before:
                known = ", ".join(map(repr, before))
                raise at(("stages", i, "reference"), f"no stage {reference!r} before this one: {known}")
            if stage.monitor is not None and self.evaluation is None:
                words = "reads the evaluation's prompts and rewards, and the recipe has no evaluation"
                raise at(("stages", i, "monitor"), words)
            before.append(stage.name)
        return self

    @model_validator(mode="after")
    def _what_is_cached_is_used(self) -> Self:
        if self.cache.prompts and not self.model.trainable:
            words = f"the prompts of {self.model.type} cannot be cached: remove it"
            raise at(("cache", "prompts"), words)
        if self.cache.latents == "off":
            return self
        if not any(stage.algorithm.needs == "images" for stage in self.stages):
            words = "no stage trains on images, so it would have no effect: remove it"
            raise at(("cache", "latents"), words)
        for i, stage in enumerate(self.stages):
            if isinstance(stage.data, Images) and stage.data.crop == "random":
                words = (
                    "cached latents are of one crop of each image, and this draws another one each epoch: "
                    "set 'crop: center' (no change where images have their bucket's shape)"
                )
                raise at(("stages", i, "data", "crop"), words)
        return self

    @model_validator(mode="after")
    def _training_fits_the_strategy(self) -> Self:
        for i, stage in enumerate(self.stages):
            if stage.train.optimizer == "adamw8bit" and self.parallel.strategy in ("fsdp2", "deepspeed"):
                words = (
                    f"adamw8bit needs whole weights, and {self.parallel.strategy} has parts of them: take "
                    "adamw, or 'parallel: {strategy: ddp}'"
                )
                raise at(("stages", i, "train", "optimizer"), words)
            if stage.train.compile and isinstance(self.parallel, DeepSpeed) and self.parallel.stage == 3:
                words = (
                    "under ZeRO-3 every block would be compiled by itself, since its weights come and go: "
                    "remove it, or take 'parallel: {strategy: fsdp2}'"
                )
                raise at(("stages", i, "train", "compile"), words)
        return self

    def parent(self, stage: Stage) -> str:
        """What ``stage`` starts from: ``base``, a stage's name, or a path."""
        if stage.start_from is not None:
            return stage.start_from
        index = self.stages.index(stage)
        return self.stages[index - 1].name if index else BASE

    def lineage(self, stage: Stage) -> list[str]:
        """What came before ``stage`` in its chain, from ``base`` (or a path) to its parent."""
        return self.lineage_of(self.parent(stage))

    def lineage_of(self, name: str) -> list[str]:
        """What must be loaded in turn to have the weights of ``name``: a stage, ``base`` or a path."""
        for other in self.stages:
            if other.name == name:
                return [*self.lineage(other), name]
        return [name]

    def depth(self, stage: Stage) -> int:
        """How many stages came before: part of the key of its draws, so that sibling branches draw alike."""
        return len(self.lineage(stage)) - 1


def _each_reported(rewards: list[AnyReward]) -> None:
    _no_reward_twice(rewards)
    if weighted := [reward.label for reward in rewards if reward.weight != 1]:
        raise ValueError(
            f"rewards: an evaluation reports each score by itself, so the weight of "
            f"{', '.join(weighted)} would have no effect: remove it"
        )
