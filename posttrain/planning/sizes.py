"""Counts what follows from a stage's settings and the transformer's shape: samples, weights, moments, disk.

``posttrain check`` and ``posttrain plan`` both count with these functions. The plan measures the model's
outline; the check reads shapes from the header of the weights' file, which needs no model library and takes
no time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.engine.trainer import REFERENCE
from posttrain.model import torch_dtype
from posttrain.policy.blocks import blocks
from posttrain.policy.packed import scale_bytes
from posttrain.weights.files import bytes_beside

if TYPE_CHECKING:
    from torch import nn

    from posttrain.model import EncoderName
    from posttrain.optim.settings import OptimizerName
    from posttrain.recipe.schema import Recipe, Stage

FLOAT32 = 4
"""Bytes of a trained number, of its gradient, and of each of its copies."""
SMALL_TENSOR, SCALE_BLOCK = 4096, 256
"""8-bit AdamW keeps float32 moments of tensors with fewer numbers, and one float32 scale for so many."""


@dataclass(frozen=True)
class Transformer:
    """The transformer's parameters in one stage."""

    trained: tuple[int, ...]
    """How many numbers each trained tensor has."""
    frozen: int
    """Bytes of the other parameters."""

    @classmethod
    def from_module(cls, transformer: nn.Module) -> Transformer:
        """Measure a transformer, on any device, to which the stage's ``tune`` was applied."""
        parameters = list(transformer.parameters())
        trained = tuple(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.nbytes for p in parameters if not p.requires_grad)
        return cls(trained, frozen + scale_bytes(transformer))

    @classmethod
    def from_shapes(cls, recipe: Recipe, stage: Stage, shapes: Mapping[str, tuple[int, ...]]) -> Transformer:
        """Derive it from ``shapes``, the parameters' shapes by name, without a model.

        The two matrices of an adapter count as one tensor. This matters only to 8-bit moments of matrices
        with fewer than 4096 numbers.
        """
        frozen = stage.tune.frozen_bytes(shapes, torch_dtype(recipe.model.frozen_dtype()).itemsize)
        return cls(tuple(stage.tune.trained_sizes(shapes)), frozen)


@dataclass(frozen=True)
class Outline:
    """A transformer's parameters in one stage, and those that a forward gathers where weights are sharded."""

    transformer: Transformer
    gathered: int
    """Bytes of the parameters outside the blocks, and twice those of the largest block."""
    gathered_gradients: int
    """Those of them that are trained."""

    @classmethod
    def from_module(cls, transformer: nn.Module) -> Outline:
        """Measure a transformer, as :meth:`Transformer.from_module` does."""
        by_block = [list(block.parameters()) for block in blocks(transformer)]
        largest = max(by_block, key=lambda parameters: sum(p.nbytes for p in parameters), default=[])
        inside = {id(p) for parameters in by_block for p in parameters}
        gathered = [p for p in transformer.parameters() if id(p) not in inside] + 2 * largest
        trained = [p for p in gathered if p.requires_grad]
        return cls(
            Transformer.from_module(transformer),
            sum(p.nbytes for p in gathered),
            sum(p.nbytes for p in trained),
        )

    def as_json(self) -> list[Any]:
        """The outline as JSON values."""
        return [self.transformer.trained, self.transformer.frozen, self.gathered, self.gathered_gradients]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Outline:
        """The inverse of :meth:`as_json`. Raises ValueError or TypeError for other values."""
        trained, *others = values
        frozen, gathered, gradients = map(int, others)
        return cls(Transformer(tuple(map(int, trained)), frozen), gathered, gradients)


@dataclass(frozen=True)
class Sizes:
    """What a stage holds if one device holds all of it. In bytes, except ``trained``."""

    trained: int
    """How many numbers are trained, in float32."""
    frozen: int
    """The transformer's other weights."""
    moments: float
    """What the optimizer keeps."""
    roles: int
    """Copies of weights: EMA, reference and old policy."""
    rewards: int = 0
    """The rewards' networks. Every device holds them whole."""
    encoders: Mapping[EncoderName, int] = field(default_factory=dict)
    """The text encoders (``prompts``) and the autoencoder (``images``)."""
    gathered: int = 0
    """The weights that a forward holds at a time when each device keeps a shard: those outside the blocks,
    and those of two blocks."""
    gathered_gradients: int = 0
    """Their gradients."""
    lowered: int = 0
    """Copies of the trained weights in the precision of the forwards."""
    exported: int = FLOAT32
    """Bytes of a number in an export."""
    companions: int | None = 0
    """Files of an export beside the transformer's; None if unknown."""


def stage_sizes(recipe: Recipe, stage: Stage, transformer: Transformer) -> Sizes:
    """The sizes of the transformer's weights, moments and roles in ``stage``."""
    trained, roles = sum(transformer.trained), stage.algorithm.roles
    copies = FLOAT32 * trained * (len(roles) + (stage.train.ema is not None))
    if (
        REFERENCE in roles
        and stage.reference not in (None, recipe.parent(stage))
        and stage.tune.type == "lora"
    ):
        copies += transformer.frozen  # the reference has weights of its own, not just another adapter
    moments = moment_bytes(stage.train.optimizer, transformer.trained)
    exported = torch_dtype(recipe.export_dtype(stage)).itemsize
    companions = bytes_beside("transformer", recipe.model.weight_files(), exported)
    return Sizes(trained, transformer.frozen, moments, copies, exported=exported, companions=companions)


def moment_bytes(optimizer: OptimizerName, tensors: Iterable[int]) -> float:
    """Bytes of the optimizer's two moments, given how many numbers each trained tensor has."""
    if optimizer == "adamw":
        return 8.0 * sum(tensors)
    return float(sum(8 * n if n < SMALL_TENSOR else 2 * (n + 4 * -(-n // SCALE_BLOCK)) for n in tensors))


def disk_bytes(stage: Stage, sizes: Sizes) -> float:
    """Bytes of the stage's checkpoints and of its artifact, which has its own copy of what was not trained.

    A checkpoint has the trained weights, the moments, the EMA, and the roles that move; the reference never
    does.
    """
    copies = len(stage.algorithm.roles - {REFERENCE}) + (stage.train.ema is not None)
    checkpoint = FLOAT32 * sizes.trained * (1 + copies) + sizes.moments
    artifact = FLOAT32 * sizes.trained
    if stage.tune.type == "full":
        exact = FLOAT32 * sizes.trained if sizes.exported < FLOAT32 else 0  # from which later stages start
        artifact = sizes.exported * sizes.trained + (sizes.companions or 0) + exact
    return checkpoint * _checkpoints_kept(stage) + artifact


def _checkpoints_kept(stage: Stage) -> int:
    """How many checkpoints of a stage are on disk at its end, at most."""
    train = stage.train
    kept = train.keep_checkpoints + (train.keep_best is not None)
    kept += stage.monitor is not None and stage.monitor.rolls_back  # the one to roll back to
    return kept if train.keep_every is None else kept + train.steps // train.keep_every


def samples_of(stage: Stage) -> int:
    """How many samples the stage trains on, in all processes together."""
    return stage.train.steps * stage.train.batch_size // stage.train.steps_per_batch
