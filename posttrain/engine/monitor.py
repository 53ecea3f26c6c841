"""Held-out scores while a stage trains, and alarms for reward hacking and for collapsed groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from statistics import fmean, stdev
from typing import Any, Literal

from pydantic import Field

from posttrain.registry import Spec

Action = Literal["warn", "stop", "rollback"]
"""``warn`` prints a warning and continues; ``stop`` ends the run with an error; ``rollback`` ends the stage
with the weights of the last reading without an alarm, and the run continues from them."""

BATCHES = 5
"""Number of batches over which the spread within groups is averaged."""


class Monitor(Spec):
    """Held-out scores of a stage: the evaluation's prompts, scored while it trains.

    A reading scores the weights that would be exported."""

    every: int = Field(default=50, ge=1)
    """Optimizer steps between readings. The first reading comes before the first step."""
    prompts: int = Field(default=48, ge=2)
    """How many of the evaluation's prompts are scored: the first ones."""
    window: int = Field(default=3, ge=2)
    """``reward_hacking`` compares the last reading with the one ``window`` - 1 readings before."""
    reward_hacking: Action = "warn"
    """What to do when the training reward rises while a held-out score becomes worse by more than two
    standard errors of the paired difference."""
    spread_collapse: Action = "warn"
    """What to do when the reward's standard deviation within groups, over the last 5 batches, is less than
    ``spread_fraction`` of what it was over the first 5, because samples of a prompt have become alike."""
    spread_fraction: float = Field(default=0.1, gt=0, lt=1)
    """The share of the first batches' spread, between 0 and 1, below which ``spread_collapse`` acts."""

    @property
    def rolls_back(self) -> bool:
        """Whether an alarm may change the weights that the stage ends with."""
        return "rollback" in (self.reward_hacking, self.spread_collapse)

    def deciding(self, *, late: bool = True) -> dict[str, Any]:
        """As :meth:`posttrain.registry.Spec.deciding`; nothing where no alarm changes the stage's weights."""
        return super().deciding(late=late) if self.rolls_back else {}


def hacking(
    rewards: Sequence[float], readings: Sequence[Mapping[str, Sequence[float]]], window: int
) -> str | None:
    """The alarm's message if the reward rose while a held-out score became worse, else None.

    ``rewards`` has the training reward's mean up to each reading, -inf if there was no batch yet.
    ``readings`` map each score to its values, higher is better, of the same samples in the same order.
    A change counts if it exceeds two standard errors of the paired difference.
    """
    if len(readings) < window or not rewards[-1] > rewards[-window] > -inf:
        return None
    for name, now in readings[-1].items():
        if len(now) < 2:
            continue  # one value has no standard error
        change = [a - b for a, b in zip(now, readings[-window][name], strict=True)]
        error = stdev(change) / len(change) ** 0.5
        if fmean(change) < -2 * error:
            return (
                f"the training reward rose from {rewards[-window]:.4g} to {rewards[-1]:.4g} while the "
                f"held-out score {name!r} became worse by {-fmean(change):.4g} (+- {error:.2g}): "
                "reward hacking?"
            )
    return None


def collapsed(spreads: Sequence[float], fraction: float) -> str | None:
    """The alarm's message if the spread within groups (one number per batch) has collapsed, else None."""
    if len(spreads) < 2 * BATCHES:
        return None
    first, last = fmean(spreads[:BATCHES]), fmean(spreads[-BATCHES:])
    if last >= fraction * first:
        return None
    return (
        f"the reward's spread within groups fell from {first:.4g} to {last:.4g}: "
        "samples of a prompt have become alike, or all have the highest reward"
    )
