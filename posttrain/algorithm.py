"""The interface between the engine and a training algorithm: weighted items, and a loss for each item.

An algorithm turns a batch into weighted items (:meth:`Algorithm.collect`) and has a loss for each item
(:meth:`Algorithm.loss`). The engine does the rest for all algorithms alike: micro-batches, averages,
back-propagation, processes, precision and records.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

from posttrain.distributed.world import ALONE, World
from posttrain.items import Batch, Items, Losses, Verdict
from posttrain.registry import Named

if TYPE_CHECKING:
    from posttrain.policy.policy import Policy
    from posttrain.support.randomness import Draws

__all__ = ["Algorithm", "Batch", "Items", "Judge", "Losses", "Tools", "Verdict"]


class Judge(Protocol):
    """Scores samples with the stage's rewards."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Reward -> its weight in the sum that is maximised; negative if lower scores are better."""
        ...

    def submit(self, latents: Tensor, batch: Batch) -> Future[Verdict]:
        """Score the images of ``latents`` (n, c, h, w) for the prompts in ``batch.metadata``.

        If a score cannot be computed, the future's result raises RewardError with the reward's name, and
        NotFinite if an image or a score is not finite.
        """
        ...


def _no_grid(steps: int) -> list[float]:
    raise NotImplementedError("only a stage with prompts has a sampling grid")


@dataclass(frozen=True)
class Tools:
    """What :meth:`Algorithm.collect` may use beside the batch."""

    policy: Policy
    """The model with its trained weights and their roles."""
    draws: Draws
    """All random numbers of the batch, each a function of (seed, stage, step, sample)."""
    sigmas: Callable[[int], list[float]] = _no_grid
    """Number of steps -> the sigmas of the sampling grid for the batch's image size, from 1 down to 0."""
    judge: Judge | None = None
    """Scores samples; None for algorithms that need no rewards."""
    world: World = ALONE
    """All processes of the run. ``world.gather(rows)`` has the rows of all processes, ``world.local(rows)``
    this process's part of them. With one process both return their argument."""


class Algorithm(Named, ABC):
    """A training algorithm. Its fields are its hyper-parameters; it has no other state."""

    needs: ClassVar[str]
    """What the stage's data must give (:class:`posttrain.data.family.Data`), such as ``images``."""
    uses_rewards: ClassVar[bool] = False
    """Whether the stage must have rewards; if not, it must have none."""

    @property
    def roles(self) -> frozenset[str]:
        """Names of the frozen copies of the weights that the algorithm uses.

        ``reference`` never moves; it has the weights that the stage's ``reference`` names. ``old`` starts as
        the stage's first weights, and :meth:`after_batch` moves it.
        """
        return frozenset()

    @property
    def samples_per_prompt(self) -> int:
        """The number of samples of each prompt in a batch; 1 for algorithms without groups."""
        return 1

    def as_given(self, batch: Batch) -> Batch:
        """``batch``, random latents that the plan rehearses with, as the algorithm's data would give it."""
        return batch

    @abstractmethod
    def collect(self, batch: Batch, tools: Tools) -> Items:
        """Turn one batch into training items. It runs without gradients, and all randomness is here."""

    @abstractmethod
    def loss(self, items: Items, policy: Policy) -> Losses:
        """The loss of each item (n,), with gradients. It is a function of its arguments alone."""

    def check_on_policy(self, losses: Losses) -> None:
        """Check the losses before the first update; GRPO's ratio, for example, must be 1.

        The weights are still those that collected the items. Raises TrainingError if the check fails.
        """
        del losses

    def after_batch(self, policy: Policy, step: int) -> None:
        """Move the roles that move. Called after the last optimizer step on a batch; ``step`` is the number
        of the stage's steps so far."""
        del policy, step
