"""Counts samples and optimizer steps."""

from __future__ import annotations

from torch import Tensor

from posttrain.stages.account import Account
from posttrain.stages.hooks.hook import Hook


class Totals(Hook):
    """Keeps the totals of the account."""

    def __init__(self, account: Account) -> None:
        self.account = account

    def after_step(self, step: int, samples: int, metrics: dict[str, Tensor]) -> None:
        self.account.samples += samples
        self.account.updates += "skipped_steps" not in metrics
