"""Counts what a stage did so far, and the time that its training took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from posttrain.distributed.world import World
from posttrain.policy.policy import Policy


@dataclass
class Account:
    """What a stage did so far: the part of a checkpoint that is neither weights nor optimizer state."""

    samples: int = 0
    seconds: float = 0.0
    """Of training, without image grids, held-out scores and checkpoints."""
    next_batch: int = 0
    """Number of the batch to draw next. Unusable batches are passed over, so this is not the step."""
    updates: int = 0
    """Optimizer steps taken; steps skipped for lack of items, and refused ones, do not count."""
    refused: int = 0
    """Steps not taken because a loss, a gradient or a reward was not finite."""
    refused_in_a_row: int = 0
    rewards: list[float] = field(default_factory=list)
    """The training reward's mean between readings."""
    spreads: list[float] = field(default_factory=list)
    """The reward's standard deviation within groups, one number per batch."""
    pending: list[float] = field(default_factory=list)
    """The training reward of each batch since the last reading."""
    read_at: int | None = None
    """Step of the last reading."""
    readings: list[dict[str, list[float]]] = field(default_factory=list)
    """The held-out scores of each reading; higher is better."""
    read_with: dict[str, Any] | None = None
    """The prompts and the settings of the readings. Those with others cannot be compared."""
    good: int | None = None
    """Step of the last reading without an alarm."""
    best: int | None = None
    """Step of the reading, after the first step, in which the score ``train.keep_best`` was best."""
    best_score: float | None = None
    """The mean of that score in that reading; higher is better."""
    best_by: str | None = None
    """The ``train.keep_best`` by which it was best. Another score cannot be compared with it."""
    alarms: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """The images that were left out up to the last checkpoint, by all processes, each with the reason."""
    ended_at: int | None = None
    """Step at which a hook ended the stage early, or to which an alarm rolled it back; None otherwise."""
    rows: int | None = 0
    """Rows of ``metrics.jsonl`` when the checkpoint was written: a resumed stage keeps these and no others.
    None if the checkpoint does not say."""

    def replace_by(self, kept: dict[str, Any]) -> None:
        """Take over the account that a checkpoint kept."""
        vars(self).update(vars(Account(**kept)))


class Clock:
    """Adds the time of training to an account, and leaves out the time of pauses."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self._samples_before, self._seconds_here = account.samples, 0.0
        self._since = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Bring the account up to date, and do not count the time of the block."""
        passed = time.monotonic() - self._since
        self.account.seconds += passed
        self._seconds_here += passed
        yield
        self._since = time.monotonic()

    def images_per_second(self) -> float:
        """Samples per second of training since this clock was made, up to the last pause."""
        return (self.account.samples - self._samples_before) / max(self._seconds_here, 1e-9)


def forward_equivalents(policy: Policy, world: World) -> int:
    """Forward-equivalents of all processes so far. Every process must call it."""
    return sum(world.gather_objects(policy.forward_equivalents))
