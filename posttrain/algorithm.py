"""What every training algorithm answers: what do we train on, and what is the loss on it?

An algorithm turns a batch into *n weighted items* (:meth:`Algorithm.collect`) and has *a loss per item*
(:meth:`Algorithm.loss`). Splitting into micro-batches, averaging, back-propagation, ranks, precision and
records belong to the engine and are the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from posttrain.condition import Condition, Conditions
from posttrain.distributed.world import ALONE, World
from posttrain.registry import Named

if TYPE_CHECKING:
    from posttrain.policy.policy import Policy
    from posttrain.support.randomness import Draws


@dataclass(frozen=True)
class Batch:
    """n samples of the data set, each with its prompt."""

    latents: Tensor
    """(n, c, h, w) float32 clean latents, scaled as the model wants them; for prompts, whose images are
    still to be made, a tensor that has the shape only (on torch's meta device)."""
    prompt_index: Tensor
    """(n,) int64: each sample's row in ``conditions``."""
    conditions: Conditions
    """The encoded prompts; row 0 is the empty prompt."""
    metadata: Sequence[Mapping[str, Any]] = ()
    """n rows of whatever the prompt file says of each sample, ``prompt`` included, or nothing."""
    group: Tensor | None = None
    """(n,) int64: which samples are of one prompt; for algorithms that need rewards."""
    sample_index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """(n,) int64: each sample's place in the whole batch, of all processes, or -1 for one that only fills
    the batch up, so that every process has as many; 0 to n - 1 by default."""
    total: int = 0
    """Samples of all processes, fillers not counted; n by default."""

    def __post_init__(self) -> None:
        if not len(self.sample_index):
            object.__setattr__(self, "sample_index", torch.arange(len(self), device=self.prompt_index.device))
        if not self.total:
            object.__setattr__(self, "total", len(self))

    def __len__(self) -> int:
        return len(self.prompt_index)

    def take(self, index: slice) -> Batch:
        """Some of the samples, with the same conditions."""
        return replace(
            self,
            latents=self.latents[index],
            prompt_index=self.prompt_index[index],
            metadata=self.metadata[index],
            group=None if self.group is None else self.group[index],
            sample_index=self.sample_index[index],
        )


@dataclass(frozen=True)
class Items:
    """Training items: named tensors that share a first axis n, one entry per item.

    A field is read as an attribute, ``items.latents``. Two are always among them: ``prompt_index`` (n,),
    since items index the batch's conditions and do not copy them, and ``sample_index`` (n,), that of the
    item's sample. Raises ValueError where one is missing, or where first axes differ.
    """

    weight: Tensor
    """(n,) How much each item counts; the update divides by the global sum. Items of 0 cost nothing."""
    fields: dict[str, Tensor]
    conditions: Conditions
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """What to record of the batch: scalars, and vectors (n,) to be recorded as histograms."""

    def __post_init__(self) -> None:
        if missing := [name for name in ("prompt_index", "sample_index") if name not in self.fields]:
            raise ValueError(
                f"items lack {' and '.join(map(repr, missing))}; they have {sorted(self.fields)}"
            )
        lengths = {name: len(tensor) for name, tensor in {"weight": self.weight, **self.fields}.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ValueError(f"items: every field needs one entry per item, and the lengths are {found}")

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.fields[name]
        except KeyError:
            raise AttributeError(f"no field {name!r}; these items have {sorted(self.fields)}") from None

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def condition(self) -> Condition:
        """Each item's own condition, gathered from the batch's."""
        return self.conditions.rows(self.fields["prompt_index"])

    def take(self, index: Tensor | slice) -> Items:
        """The items at ``index``, with the same conditions."""
        return replace(self, weight=self.weight[index], fields={k: v[index] for k, v in self.fields.items()})

    def split(self, size: int) -> Iterator[Items]:
        """Consecutive runs of at most ``size`` items."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def parts(self, count: int) -> Iterator[Items]:
        """The items in ``count`` parts by the place of their sample, so that samples of one prompt, which
        are neighbours, spread over all parts, on any number of processes alike."""
        for i in range(count):
            yield self.take(self.fields["sample_index"] % count == i) if count > 1 else self

    @property
    def nbytes(self) -> int:
        """Memory that the items hold, the shared conditions aside."""
        return sum(tensor.nbytes for tensor in (self.weight, *self.fields.values()))

    @staticmethod
    def cat(parts: Sequence[Items]) -> Items:
        """All items of ``parts``, which share fields and conditions, in order."""
        fields = {k: torch.cat([p.fields[k] for p in parts]) for k in parts[0].fields}
        return Items(torch.cat([p.weight for p in parts]), fields, parts[0].conditions)


@dataclass(frozen=True)
class Losses:
    """What :meth:`Algorithm.loss` returns."""

    per_item: Tensor
    """(n,) The loss of each item, not weighted and not averaged: the update does both."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Name -> (n,) values to record, averaged with the items' weights; NaN where an item has none."""


@dataclass(frozen=True)
class Verdict:
    """The scores of n samples."""

    rewards: dict[str, Tensor]
    """Reward -> (n,) float32."""
    details: dict[str, Tensor]
    """``reward/detail`` -> (n,) float32: recorded, not trained on."""

    @staticmethod
    def cat(parts: Sequence[Verdict]) -> Verdict:
        """The scores of all samples, in order."""

        def joined(dicts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.cat([d[name] for d in dicts]) for name in dicts[0]}

        return Verdict(joined([p.rewards for p in parts]), joined([p.details for p in parts]))


class Judge(Protocol):
    """Scores samples by the stage's rewards."""

    weights: Mapping[str, float]
    """Reward -> its weight in the sum to maximise; negative where lower scores are better."""

    def submit(self, latents: Tensor, batch: Batch) -> Future[Verdict]:
        """Score the images of ``latents`` (n, c, h, w) for the prompts in ``batch.metadata``.

        The future's result raises RewardError, by the reward's name, where a score could not be computed.
        """
        ...


def _no_grid(steps: int) -> list[float]:
    raise NotImplementedError("only a stage with prompts has a sampling grid")


@dataclass(frozen=True)
class Tools:
    """What a stage lends its algorithm while it collects."""

    policy: Policy
    """The trained weights and their roles."""
    draws: Draws
    """Randomness for this batch, a function of the samples' ids."""
    sigmas: Callable[[int], list[float]] = _no_grid
    """Number of steps -> the sampling grid of the batch's latents, from 1 down to 0."""
    judge: Judge | None = None
    """Scores samples by the stage's rewards; for algorithms that need rewards."""
    world: World = ALONE
    """Lets an algorithm see the whole batch: ``world.gather(rows)`` has all processes' rows,
    ``world.local(rows)`` this one's part of them. With one process both change nothing."""


class Algorithm(Named, ABC):
    """A training algorithm. Fields are its hyper-parameters; it keeps no other state."""

    needs: ClassVar[Literal["images", "rewards"]]
    """What the stage must supply: captioned images, or prompts and rewards to score samples of them."""

    @property
    def roles(self) -> frozenset[str]:
        """Frozen copies of the weights that the policy must hold: some of "reference", which never moves
        and is what the stage's ``reference`` names, and "old", which :meth:`after_batch` moves."""
        return frozenset()

    @property
    def samples_per_prompt(self) -> int:
        """How many samples of each prompt a batch must have; 1 for algorithms without groups."""
        return 1

    @abstractmethod
    def collect(self, batch: Batch, tools: Tools) -> Items:
        """Turn one batch into training items. Runs without gradients; all randomness is here."""

    @abstractmethod
    def loss(self, items: Items, policy: Policy) -> Losses:
        """The loss of each item (n,), with gradients. A function of its arguments alone."""

    def check_on_policy(self, losses: Losses) -> None:
        """Raise TrainingError if the first losses of a run, by the very weights that collected the items,
        are not what they must be."""
        del losses

    def after_batch(self, policy: Policy, step: int) -> None:
        """Move the roles, if the algorithm moves any, after the last optimizer step on a batch, which is
        the ``step``-th of the stage (from 1)."""
        del policy, step
